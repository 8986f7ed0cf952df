"""What `inspect` says and draws: facts equal the manifest, pictures are complete files, mistakes are named."""

import dataclasses
import io
import json
import subprocess
import sys
import warnings

import pytest
from rich.console import Console

from rtpurbo.manifests.manifest import BaseModel, Indexer, Manifest, ModelShape, roles_from_heads
from rtpurbo.manifests.report import describe, format_bytes, format_seconds, plot, render, role_string


def manifest(layers=4, heads=6, groups=2, retrieval=((), (1,), (3, 4, 5), (0, 5)), keys="head", identity="org/[bold]$x_1$"):
    scores = [[round((i + h) / (layers + heads), 3) for h in range(heads)] for i in range(layers)]
    return Manifest(
        base_model=BaseModel(id=identity, revision=None, config_sha256="0" * 64, tokenizer_sha256=None),
        model=ModelShape(
            model_type="llama",
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=64,
            max_position_embeddings=8192,
        ),
        granularity="head",
        group_threshold=0.0,
        layers=roles_from_heads(scores, [list(r) for r in retrieval], heads // groups),
        sliding_window=512,
        sinks=4,
        indexer=Indexer(dim=16, keys=keys, scale=0.125),
        top_p=0.9,
        decode_block=64,
        prefill_block=128,
        prefill_pattern="dense",
        dense_below=1024,
        recipe={"seed": 3},
        metrics={"needle_16k": 0.75},
    )


def test_the_summary_says_how_a_sparse_prefill_selects():
    sparse = dataclasses.replace(manifest(), prefill_pattern="topp", prefill_top_p=0.95)
    assert describe(sparse)["prefill_top_p"] == 0.95
    console = Console(file=io.StringIO(), width=200)
    render(sparse, console)
    assert "prefill topp 0.95 in blocks of 128" in console.file.getvalue()  # type: ignore[attr-defined]


def test_roles_read_as_one_character_per_query_head():
    rows = [role_string(layer, 3) for layer in manifest().layers]
    assert rows == ["... ...", "o#o ...", "... ###", "#oo oo#"]


def test_the_description_agrees_with_the_manifest_and_is_json():
    facts = json.loads(json.dumps(describe(manifest()), allow_nan=False))
    assert facts["digest"] == manifest().to_dict()["digest"]
    assert (facts["num_heads"], facts["num_retrieval_heads"], facts["sparsity"]) == (24, 6, 0.75)
    assert (facts["num_groups"], facts["num_retained_groups"], facts["kv_sparsity"]) == (8, 4, 0.5)
    assert [layer["retrieval_heads"] for layer in facts["layers"]] == [[], [1], [3, 4, 5], [0, 5]]
    assert facts["layers"][3]["score_max"] == 0.8
    assert (facts["sliding_window"], facts["sinks"], facts["top_p"], facts["dense_below"]) == (512, 4, 0.9, 1024)
    assert facts["recipe"] == {"seed": 3}
    assert facts["metrics"] == {"needle_16k": 0.75}


@pytest.mark.parametrize(("keys", "sets"), [("head", 6), ("group", 4)])
def test_the_cache_sizes_count_groups_rings_and_index(keys, sets):
    cache = describe(manifest(keys=keys))["cache"]
    assert cache["dense_bytes_per_token"] == 8 * 2 * 64 * 2
    assert cache["retained_bytes_per_token"] == 4 * 2 * 64 * 2
    assert cache["index_bytes_per_token"] == sets * 16 * 2
    assert cache["ring_bytes"] == 4 * 2 * 64 * 2 * 516
    at = cache["at"]["32K"]
    assert at["num_tokens"] == 32768
    assert at["converted_bytes"] == 32768 * (1024 + sets * 32) + cache["ring_bytes"]
    assert cache["at"]["1M"]["dense_bytes"] == 2048 << 20


def test_no_index_is_counted_when_everything_is_selected():
    cache = describe(dataclasses.replace(manifest(), top_p=1.0))["cache"]
    assert cache["index_bytes_per_token"] == cache["at"]["1M"]["index_bytes"] == 0


@pytest.mark.parametrize("width", [60, 120])
def test_the_tables_show_every_layer_and_names_with_brackets(width):
    console = Console(width=width, file=io.StringIO(), record=True)
    render(manifest(), console)
    text = console.export_text()
    assert "org/[bold]$x_1$" in text
    for row in ("... ...", "o#o ...", "... ###", "#oo oo#"):
        assert row in text
    assert "6 of 24 (75.0% local)" in text


@pytest.mark.parametrize(("name", "start"), [("roles.png", b"\x89PNG\r\n\x1a\n"), ("roles.svg", b"<?xml")])
def test_a_plot_is_written_complete_and_twice_the_same(tmp_path, name, start):
    pytest.importorskip("matplotlib")
    plot(manifest(), tmp_path / name)
    first = (tmp_path / name).read_bytes()
    assert first.startswith(start)
    plot(manifest(), tmp_path / name)
    assert (tmp_path / name).read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_the_plot_marks_the_retrieval_heads(tmp_path):
    pytest.importorskip("matplotlib")
    counts = []
    for retrieval in (((), (), (), ()), ((), (1,), (3, 4, 5), (0, 5))):
        plot(manifest(retrieval=retrieval), tmp_path / "roles.svg")
        text = (tmp_path / "roles.svg").read_text()
        _, _, marks = text.partition('<g id="retrieval-heads">')
        counts.append(marks.partition('<g id="')[0].count("<use "))
    assert counts == [0, 6]


@pytest.mark.parametrize(("layers", "heads", "groups"), [(1, 1, 1), (2, 64, 8), (80, 8, 8)])
def test_extreme_shapes_are_drawn_without_warnings(tmp_path, layers, heads, groups):
    pytest.importorskip("matplotlib")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot(manifest(layers, heads, groups, [[0]] * layers), tmp_path / "roles.png")
    assert (tmp_path / "roles.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["roles.pdf", "roles", "roles.PNG"])
def test_another_suffix_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"wanted \.png or \.svg"):
        plot(manifest(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_missing_matplotlib_is_named_with_the_remedy(tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from pathlib import Path\n"
        "from rtpurbo.manifests.manifest import Manifest\n"
        "from rtpurbo.manifests.report import plot\n"
        "try: plot(Manifest.load(Path(sys.argv[1])), Path(sys.argv[1]).with_name('x.png'))\n"
        "except ValueError as error: print(error)\n"
    )
    manifest().save(tmp_path / "rtpurbo.json")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "rtpurbo.json")], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "plotting needs matplotlib: pip install 'rtpurbo[plot]'"


def test_sizes_and_times_read_well():
    assert [format_bytes(n) for n in (0, 999, 1000, 98304, 141e9, 2.5e12)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "98.30 kB",
        "141.00 GB",
        "2.50 TB",
    ]
    assert [format_seconds(s) for s in (1.25, 119, 600, 7200)] == ["1.2 s", "119.0 s", "10.0 min", "2.0 h"]
