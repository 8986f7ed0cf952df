"""The manifest on disk: what is written is read back, and every damaged or dishonest file is refused by ValueError."""

import copy
import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtpurbo.manifests.manifest import (
    MAX_MANIFEST_BYTES,
    BaseModel,
    Indexer,
    Manifest,
    ModelShape,
    digest,
    file_digest,
    roles_from_heads,
    verify_files,
)


def example(keys="head", **changes):
    scores = [[0.01, 0.02, 0.03, 0.04], [0.5, 0.02, 0.9, 0.8], [0.0, 0.0, 0.125, 1.0]]
    values = {
        "base_model": BaseModel(id="org/model", revision="abc", config_sha256="0" * 64, tokenizer_sha256=None),
        "model": ModelShape(
            model_type="qwen3",
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=4096,
        ),
        "granularity": "head",
        "group_threshold": 0.0,
        "layers": roles_from_heads(scores, [[], [2, 0, 3], [3]], 2),
        "sliding_window": 256,
        "sinks": 4,
        "indexer": Indexer(dim=16, keys=keys, scale=0.25),
        "top_p": 0.9,
        "decode_block": 64,
        "prefill_block": 128,
        "prefill_pattern": "dense",
        "dense_below": 0,
        "calibration": {"documents": 4, "depths": [0.1, 0.9]},
        "recipe": {"seed": 1},
        "metrics": {"needle": 1.0},
        "libraries": {"torch": "2.11"},
    }
    return Manifest(**{**values, **changes})


def signed(body):
    """The text of a manifest whose digest fits its (possibly wrong) content."""
    body = {**body, "digest": digest(body)}
    return json.dumps(body)


def changed(path, value):
    """Text of the example with one value replaced and the digest made anew."""
    body = example().to_dict()
    node = body
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return signed(body)


def test_a_saved_manifest_is_read_back_equal_and_leaves_no_partial_file(tmp_path):
    manifest = example()
    manifest.save(tmp_path / "rtpurbo.json")
    assert Manifest.load(tmp_path / "rtpurbo.json") == manifest
    assert [p.name for p in tmp_path.iterdir()] == ["rtpurbo.json"]


def test_sparse_prefill_keeps_the_decode_share_unless_it_has_its_own(tmp_path):
    shares = {}
    for name, own in (("same", None), ("own", 0.97)):
        manifest = example(prefill_pattern="topp", prefill_top_p=own)
        manifest.save(tmp_path / name)
        assert Manifest.load(tmp_path / name) == manifest
        shares[name] = (manifest.prefill_mass, "prefill_top_p" in manifest.to_dict())
    assert shares == {"same": (0.9, False), "own": (0.97, True)}


def test_the_digest_does_not_depend_on_key_order_or_white_space():
    body = example().to_dict()
    text = json.dumps(dict(reversed(body.items())), indent=7)
    assert Manifest.from_json(text) == example()


def test_a_tampered_value_is_refused_by_its_digest():
    body = example().to_dict()
    body["top_p"] = 0.8
    with pytest.raises(ValueError, match=r"digest is .* changed after it was written"):
        Manifest.from_json(json.dumps(body))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("extra",), 1, "extra"),
        (("model", "extra"), 1, "model: .*extra"),
        (("sliding_window",), "256", "sliding_window"),
        (("sliding_window",), 256.0, "sliding_window"),
        (("sliding_window",), True, "sliding_window"),
        (("sliding_window",), 0, "sliding_window"),
        (("sliding_window",), 10**30, "sliding_window"),
        (("sinks",), -1, "sinks"),
        (("top_p",), 0, "top_p"),
        (("top_p",), 1.01, "top_p"),
        (("decode_block",), 96, "decode_block is 96, wanted a power of two"),
        (("granularity",), "layer", "granularity"),
        (("prefill_pattern",), "magic", "prefill_pattern"),
        (("prefill_top_p",), 1.5, "prefill_top_p"),
        (("prefill_top_p",), 0.9, "prefill_top_p is 0.9, wanted .* only with prefill_pattern topp"),
        (("prefill_top_p",), None, "prefill_top_p"),
        (("indexer", "dim"), 33, "indexer.dim is 33"),
        (("indexer", "scale"), 0, "indexer.scale"),
        (("indexer", "key_dtype"), "int4", "indexer.key_dtype"),
        (("model", "num_attention_heads"), 10**9, "model.num_attention_heads"),
        (("model", "num_key_value_heads"), 3, "wanted a multiple"),
        (("model", "num_hidden_layers"), 4, "layers has 3 entries"),
        (("model", "model_type"), "gpt2", "model.model_type"),
        (("layers",), [], "layers"),
        (("layers", 1, "scores"), [0.5], "layers.1.scores has 1 entries"),
        (("layers", 1, "scores", 0), 1.5, "layers.1.scores.0"),
        (("layers", 1, "retrieval_heads"), [3, 2, 0], "layers.1.retrieval_heads"),
        (("layers", 1, "retrieval_heads"), [0, 2, 4], "layers.1.retrieval_heads"),
        (("layers", 1, "retrieval_heads"), [0, 0, 2], "layers.1.retrieval_heads"),
        (("layers", 1, "retained_groups"), [0], "layers.1.retained_groups is .0., but its retrieval heads need .0, 1."),
        (("num_retrieval_heads",), 5, "num_retrieval_heads is 5, but the layers list 4"),
        (("num_retained_groups",), 2, "num_retained_groups is 2, but the layers list 3"),
        (("base_model", "config_sha256"), "0" * 63, "base_model.config_sha256"),
        (("base_model", "config_sha256"), "0" * 64 + "\n", "base_model.config_sha256"),
        (("base_model", "id"), "", "base_model.id"),
        (("libraries", "torch"), 2.11, "libraries.torch"),
    ],
)
def test_a_wrong_value_is_refused_by_key_even_with_a_fitting_digest(path, value, message):
    with pytest.raises(ValueError, match=message) as error:
        Manifest.from_json(changed(path, value), "some/rtpurbo.json")
    assert str(error.value).startswith("some/rtpurbo.json: ")


@pytest.mark.parametrize("name", ["../evil", "..", "a/b", "a\\b", "/etc/passwd", ".hidden", "", "nul\0", "line\n", "x" * 256])
def test_a_file_name_that_could_leave_the_folder_is_refused(name):
    with pytest.raises(ValueError, match="files"):
        Manifest.from_json(changed(("files",), {name: {"sha256": "0" * 64, "size_bytes": 1}}))


@pytest.mark.parametrize("key", sorted(set(example().to_dict()) - {"digest"}))
def test_each_top_level_key_is_required(key):
    body = example().to_dict()
    del body[key]
    with pytest.raises(ValueError, match=key):
        Manifest.from_json(signed(body))


def test_an_absent_digest_is_refused():
    body = example().to_dict()
    del body["digest"]
    with pytest.raises(ValueError, match="digest"):
        Manifest.from_json(json.dumps(body))


@pytest.mark.parametrize("version", [0, 2, "1", None, 1.0, True])
def test_another_schema_version_is_refused(version):
    with pytest.raises(ValueError, match="schema_version"):
        Manifest.from_json(changed(("schema_version",), version))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a valid JSON manifest"),
        ("[]", "top level"),
        ("null", "top level"),
        ("{", "not a valid JSON manifest"),
        (json.dumps(example().to_dict())[:-20], "not a valid JSON manifest"),
        (json.dumps(example().to_dict()) + "x", "not a valid JSON manifest"),
        ('{"a": 1, "a": 2}', "duplicate key 'a'"),
        ('{"top_p": NaN}', "NaN"),
        ('{"top_p": -Infinity}', "Infinity"),
        ('{"top_p": 1e999}', "too large"),
        ('{"sinks": ' + "9" * 5000 + "}", "not a valid JSON manifest"),
        ("[" * 100_000, "not a valid JSON manifest"),
        ('{"metrics": ' + "[" * 200 + "]" * 200 + "}", "nested deeper than 64"),
    ],
)
def test_text_that_is_no_strict_json_object_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Manifest.from_json(text)


def test_a_duplicate_key_is_refused_although_the_last_one_would_fit_the_digest():
    text = json.dumps(example().to_dict())
    with pytest.raises(ValueError, match="duplicate key 'top_p'"):
        Manifest.from_json(text[:-1] + ', "top_p": 0.9}')


def test_a_file_that_is_not_utf8_missing_or_a_folder_is_refused_by_name(tmp_path):
    (tmp_path / "latin.json").write_bytes('{"id": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.json: not UTF-8"):
        Manifest.load(tmp_path / "latin.json")
    with pytest.raises(ValueError, match=r"absent\.json: cannot be read"):
        Manifest.load(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="cannot be read"):
        Manifest.load(tmp_path)


def test_a_huge_file_is_refused_unread(tmp_path):
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(ValueError, match="wanted at most"):
        Manifest.load(path)


def test_a_manifest_that_could_not_be_read_again_is_not_written(tmp_path):
    deep = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(ValueError, match="nested deeper"):
        example(metrics={"deep": deep}).save(tmp_path / "rtpurbo.json")
    with pytest.raises(ValueError, match="files"):
        example(files={"../x": file_digest_of(tmp_path)}).save(tmp_path / "rtpurbo.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        example(metrics={"loss": float("nan")}).save(tmp_path / "rtpurbo.json")
    assert not (tmp_path / "rtpurbo.json").exists()


def file_digest_of(folder):
    path = folder / "model.safetensors"
    path.write_bytes(b"weights")
    return file_digest(path)


def test_nan_scores_and_scales_are_refused_in_memory_too():
    layers = example().layers
    bad = dataclasses.replace(layers[0], scores=(float("nan"), 0.0, 0.0, 0.0))
    with pytest.raises(ValueError, match=r"layers\.0\.scores"):
        example(layers=(bad, *layers[1:]))
    with pytest.raises(ValueError, match=r"indexer\.scale"):
        example(indexer=Indexer(dim=16, keys="head", scale=float("inf")))


def test_listed_files_are_compared_by_presence_size_and_content(tmp_path):
    manifest = example(files={"model.safetensors": file_digest_of(tmp_path)})
    verify_files(tmp_path, manifest)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"Weights")
    with pytest.raises(ValueError, match=r"model\.safetensors: sha256 .*, wanted"):
        verify_files(tmp_path, manifest)
    path.write_bytes(b"weight")
    with pytest.raises(ValueError, match=r"model\.safetensors: 6 bytes, wanted 7"):
        verify_files(tmp_path, manifest)
    path.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: missing"):
        verify_files(tmp_path, manifest)


def test_index_shapes_and_key_sets_follow_the_roles():
    by_head, by_group = example(), example(keys="group")
    assert by_head.index_shapes()["layers.1.index_k"] == (3, 16, 32)
    assert by_group.index_shapes()["layers.1.index_k"] == (2, 16, 32)
    assert by_group.index_shapes()["layers.1.index_q"] == (3, 16, 32)
    assert "layers.0.index_q" not in by_head.index_shapes()
    assert by_head.key_sets(1) == (0, 1, 2)
    assert by_group.key_sets(1) == (0, 1, 1)
    assert by_group.key_sets(2) == (0,)


def leaves(node, path=()):
    yield path
    if isinstance(node, dict | list):
        for key in node if isinstance(node, dict) else range(len(node)):
            yield from leaves(node[key], (*path, key))


BODY = example().to_dict()
PATHS = [path for path in leaves(BODY) if path]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=True),
    st.text(max_size=80),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=8), st.integers(), max_size=3),
)


def mutated(path, value):
    body = copy.deepcopy(BODY)
    node = body
    for key in path[:-1]:
        node = node[key]
    old, node[path[-1]] = node[path[-1]], value
    return body, old


@settings(max_examples=400, deadline=None)
@given(path=st.sampled_from(PATHS), value=VALUES)
def test_any_single_changed_value_is_refused(path, value):
    body, old = mutated(path, value)
    if type(old) is type(value) and old == value:
        return
    with pytest.raises(ValueError):  # noqa: PT011 - whatever the reason, the kind of error is the promise
        Manifest.from_json(json.dumps(body))


@settings(max_examples=400, deadline=None)
@given(path=st.sampled_from([p for p in PATHS if p != ("digest",)]), value=VALUES)
def test_a_changed_value_with_a_fitting_digest_is_valid_or_a_value_error(path, value):
    body, _ = mutated(path, value)
    try:
        text = signed(body)
    except ValueError:  # NaN and infinities have no canonical form
        text = json.dumps(body)
    try:
        manifest = Manifest.from_json(text)
    except ValueError:
        return
    assert Manifest.from_json(json.dumps(manifest.to_dict())) == manifest


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_text_is_refused(data):
    text = json.dumps(BODY)
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, min(len(text), start + 20)))
    damaged = text[:start] + data.draw(st.text(max_size=4)) + text[end:]
    try:
        unchanged = json.dumps(json.loads(damaged)) == text
    except (ValueError, RecursionError):
        unchanged = False
    if not unchanged:
        with pytest.raises(ValueError):  # noqa: PT011
            Manifest.from_json(damaged)
