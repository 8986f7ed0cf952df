"""The recipe: TOML there and back, refusals that name the field, and one option and one line of help for every field."""

import dataclasses
import tomllib
import typing

import click
import pytest

from rtpurbo.converter.recipe import HELP, PRESETS, Recipe

FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}
# Every field at a value that is neither its default nor the demo preset's.
CHANGED = {
    "preset": "paper",
    "seed": 7,
    "device": "cuda:1",
    "dtype": "float32",
    "granularity": "head",
    "group_threshold": 0.25,
    "retrieval_ratio": 0.5,
    "sliding_window": 4096,
    "sinks": 0,
    "dense_below": 100,
    "rope_scaling": "yarn:4",
    "index_dim": 32,
    "index_keys": "group",
    "index_key_dtype": "float8_e4m3fn",
    "top_p": 0.95,
    "decode_block": 32,
    "prefill_block": 64,
    "prefill_pattern": "topp",
    "prefill_top_p": 0.97,
    "calibration_documents": 3,
    "calibration_tokens": 16384,
    "needle_tokens": 48,
    "indexer_data": 'a "quoted" \\ path/Ünïcode.txt',
    "indexer_steps": 5,
    "indexer_min_tokens": 1000,
    "indexer_max_tokens": 2000,
    "indexer_learning_rate": 0.002,
    "indexer_warmup": 0,
    "distill_data": "org/name:config@main",
    "distill_steps": 0,
    "distill_batch": 3,
    "distill_min_tokens": 1001,
    "distill_max_tokens": 2001,
    "answer_tokens": 17,
    "distill_learning_rate": 1e-6,
    "distill_warmup": 1,
    "train": "lora",
    "lora_rank": 4,
    "teacher_top_k": 5,
    "realign_steps": 7,
    "weight_decay": 0.0,
    "gradient_clip": 0.5,
    "checkpoint_every": 11,
    "evaluation_documents": 6,
    "evaluation_tokens": 700,
    "evaluation_needles": 0,
}


def test_the_changed_values_cover_every_field():
    assert CHANGED.keys() == FIELDS.keys()
    assert all(value != FIELDS[name].default for name, value in CHANGED.items() if name != "preset")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_come_back_from_toml_as_they_were(preset, tmp_path):
    recipe = Recipe.preset_named(preset)
    (tmp_path / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    assert Recipe.from_toml(tmp_path / "recipe.toml") == recipe
    assert tomllib.loads(recipe.to_toml()).keys() == {"recipe"}
    assert tomllib.loads(recipe.to_toml())["recipe"].keys() == FIELDS.keys()


def test_a_recipe_changed_in_every_field_comes_back_from_toml(tmp_path):
    recipe = Recipe(**CHANGED)
    (tmp_path / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    read = Recipe.from_toml(tmp_path / "recipe.toml")
    assert read == recipe
    assert dataclasses.asdict(read) == CHANGED


def test_a_file_with_some_keys_takes_the_papers_values_for_the_others(tmp_path):
    (tmp_path / "recipe.toml").write_text("[recipe]\ntop_p = 1\n")
    recipe = Recipe.from_toml(tmp_path / "recipe.toml")
    assert recipe == Recipe(top_p=1.0)
    assert isinstance(recipe.top_p, float)


def test_presets_replace_only_fields_that_exist_and_the_paper_is_the_default():
    assert Recipe.preset_named("paper") == Recipe()
    for name, values in PRESETS.items():
        assert values.keys() <= FIELDS.keys() - {"preset"}
        assert Recipe.preset_named(name).preset == name
    assert Recipe.preset_named("demo", seed=3).seed == 3
    with pytest.raises(ValueError, match="preset is 'quick', wanted one of paper, demo"):
        Recipe.preset_named("quick")


def test_the_papers_values_are_the_papers():
    paper = Recipe()
    assert (paper.retrieval_ratio, paper.sliding_window, paper.sinks, paper.index_dim, paper.top_p) == (0.15, 8192, 4, 16, 0.9)
    assert (paper.indexer_steps, paper.indexer_learning_rate, paper.indexer_warmup) == (600, 1e-3, 100)
    assert (paper.distill_steps, paper.distill_batch, paper.distill_learning_rate, paper.teacher_top_k) == (600, 8, 3e-6, 10)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[recipe]\ntop_q = 0.5\n", "unknown key 'top_q'"),
        ("[recipe]\ntop_p = 0.5\n[extra]\n", "'extra', 'recipe'"),
        ("top_p = 0.5\n", "'top_p'"),
        ("recipe = 5\n", "wanted \\[recipe\\]"),
        ("", "wanted \\[recipe\\]"),
        ("[recipe]\ntop_p = 0.5\ntop_p = 0.5\n", "not a readable recipe"),
        ("[recipe\n", "not a readable recipe"),
        ("[recipe]\ntop_p = '0.9'\n", "top_p is '0.9', wanted a number"),
        ("[recipe]\nseed = 1.0\n", "seed is 1.0, wanted a whole number"),
        ("[recipe]\nseed = true\n", "seed is True, wanted a whole number"),
        ("[recipe]\ntop_p = true\n", "top_p is True, wanted a number"),
        ("[recipe]\ntop_p = nan\n", "top_p is nan"),
        ("[recipe]\ndevice = 0\n", "device is 0, wanted text"),
        ("[recipe]\ntrain = 'most'\n", "train is 'most', wanted one of all, attention, lora"),
        ("[recipe]\nsinks = -1\n", "sinks is -1, wanted 0 ... 65536"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_file_and_key(text, named, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=named) as caught:
        Recipe.from_toml(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"none\.toml: not a readable recipe"):
        Recipe.from_toml(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b"[recipe]\n# caf\xe9\n")
    with pytest.raises(ValueError, match=r"latin\.toml: not a readable recipe"):
        Recipe.from_toml(tmp_path / "latin.toml")


def _wrong_values() -> list[tuple[str, typing.Any]]:
    """For every field: a wrong type, and where it is a number both ends beyond its range."""
    wrong: list[tuple[str, typing.Any]] = []
    for name, hint in typing.get_type_hints(Recipe).items():
        wrong.append((name, None))
        wrong.append((name, 5 if hint not in (int, float) else "5"))
        if hint in (int, float):
            wrong += [(name, -1), (name, 2**40)]
    return wrong


@pytest.mark.parametrize(("name", "value"), _wrong_values())
def test_every_field_refuses_wrong_types_and_numbers_out_of_range_by_its_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value!r}|^{name} is {value}"):
        Recipe(**{name: value})


def test_fields_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="indexer_min_tokens 9000 is above indexer_max_tokens 8000"):
        Recipe(indexer_min_tokens=9000, indexer_max_tokens=8000)
    with pytest.raises(ValueError, match="distill_min_tokens 90000 is above distill_max_tokens 65536"):
        Recipe(distill_min_tokens=90000)
    with pytest.raises(ValueError, match="answer_tokens 40000 must be below distill_min_tokens 32768"):
        Recipe(answer_tokens=40000)
    with pytest.raises(ValueError, match=r"prefill_top_p 0.9 wants prefill_pattern topp, found dense"):
        Recipe(prefill_top_p=0.9)
    for block in ("decode_block", "prefill_block"):
        with pytest.raises(ValueError, match=f"{block} is 48, wanted a power of two"):
            Recipe(**{block: 48})  # type: ignore[arg-type]


def test_a_recipe_cannot_be_changed_and_takes_no_positions():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().seed = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        Recipe("paper")  # type: ignore[misc]


def test_the_manifests_recipe_leaves_out_device_data_paths_and_the_interval_of_states():
    provenance = Recipe(**CHANGED).provenance()
    assert FIELDS.keys() - provenance.keys() == {"device", "indexer_data", "distill_data", "checkpoint_every"}
    assert provenance == {name: value for name, value in CHANGED.items() if name in provenance}
    assert Recipe(top_p=1).provenance() == Recipe(top_p=1.0).provenance()  # type: ignore[arg-type]
    assert str(Recipe(top_p=1).provenance()["top_p"]) == "1.0"  # type: ignore[arg-type]


def test_help_covers_exactly_the_fields():
    assert HELP.keys() == FIELDS.keys() - {"preset"}
    assert all(text.endswith(".") and "\n" not in text and len(text) <= 90 for text in HELP.values())


@pytest.mark.parametrize("command", ["convert", "calibrate", "plan"])
def test_every_field_has_an_option_of_its_type_with_its_help(command):
    from rtpurbo.cli import main

    options = {option.name: option for option in main.commands[command].params if isinstance(option, click.Option)}
    assert "preset" in options
    for name, hint in typing.get_type_hints(Recipe).items():
        option = options[name]
        assert option.opts == [f"--{name.replace('_', '-')}"]
        assert option.default is None, "an option that is not given must leave the preset's value"
        if name == "preset":
            assert tuple(option.type.choices) == tuple(PRESETS)  # type: ignore[attr-defined]
            continue
        assert option.help is not None
        assert option.help.startswith(HELP[name])
        if typing.get_origin(hint) is typing.Literal:
            assert tuple(option.type.choices) == typing.get_args(hint)  # type: ignore[attr-defined]
        else:
            assert option.type == click.types.convert_type(hint)


def test_options_replace_the_values_of_a_preset_or_a_file_and_data_sets_both_stages(tmp_path):
    from rtpurbo.cli import _recipe

    empty = dict.fromkeys([*FIELDS, "recipe_file", "data"])
    assert _recipe("demo", dict(empty)) == Recipe.preset_named("demo")
    assert _recipe("org/model", dict(empty)) == Recipe()
    assert _recipe("demo", {**empty, "preset": "paper"}) == Recipe()
    assert _recipe("org/model", {**empty, "preset": "demo", "top_p": 0.5}) == Recipe.preset_named("demo", top_p=0.5)
    both = _recipe("org/model", {**empty, "data": "a.txt", "distill_data": "b.txt"})
    assert (both.indexer_data, both.distill_data) == ("a.txt", "b.txt")
    (tmp_path / "recipe.toml").write_text(Recipe.preset_named("demo", seed=5).to_toml())
    read = _recipe("org/model", {**empty, "recipe_file": tmp_path / "recipe.toml", "sinks": 2})
    assert read == Recipe.preset_named("demo", seed=5, sinks=2)
    with pytest.raises(ValueError, match="--recipe and --preset exclude each other"):
        _recipe("org/model", {**empty, "recipe_file": tmp_path / "recipe.toml", "preset": "demo"})
