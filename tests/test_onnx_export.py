"""The exported ONNX model, run by its function bodies in ONNX Runtime, against the PyTorch runtime; and what the export refuses."""

import dataclasses
from pathlib import Path
from typing import Any

import eager_model as eager
import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from test_runtime_equality import CASES, ROPE, random_ids
from tiny_checkpoints import edit_json

from rtpurbo.converter.checkpoint import open_checkpoint
from rtpurbo.converter.package import write_artifact
from rtpurbo.manifests.manifest import Manifest
from rtpurbo.plugins.trt.export import Export, ExportOptions, export
from rtpurbo.plugins.trt.nodes import DECODE, NODES, PREFILL
from rtpurbo.plugins.trt.onnx_engine import OnnxEngine
from rtpurbo.runtime.loader import load

TOLERANCE = 1e-3
CHUNK, CAPACITY, STEPS = 37, 330, 32
# 7 whole chunks and one of a single token, which still is prefill; both rows wrap the ring of 32 several times.
PROMPTS = (260, 241)


def checked(folder: Path, options: ExportOptions) -> Export:
    exported = export(folder, options)
    exported.save(folder / "model.onnx")
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    return exported


def assert_equals_runtime(
    folder: Path, *, chunk: int = CHUNK, dense: bool = False, kept: tuple[float, float] = (0.05, 0.5), **model: Any
) -> None:
    """Prefill in chunks and 32 decode steps of two rows of different lengths, logits against the runtime's."""
    engine = OnnxEngine(checked(folder, ExportOptions(dtype="float32", dense=dense, **model)), folder, len(PROMPTS), CAPACITY)
    runtime = load(folder, device="cpu", **model)
    state = runtime.start(len(PROMPTS), CAPACITY, dense=dense)
    shares, block = [], runtime.manifest.decode_block
    state.on_selection = lambda _, mask_BHN, visible_B: shares.append(mask_BHN.sum(-1) / torch.ceil(visible_B[:, None] / block))
    rows = [random_ids(p + STEPS, seed) for seed, p in enumerate(PROMPTS)]
    width = max(PROMPTS)
    ids = torch.tensor([row[:p] + [0] * (width - p) for row, p in zip(rows, PROMPTS, strict=True)])
    mask = torch.tensor([[1] * p + [0] * (width - p) for p in PROMPTS])
    want = [runtime.prefill(state, ids, mask, chunk=chunk)]
    got = [engine.prefill([row[:p] for row, p in zip(rows, PROMPTS, strict=True)], chunk)]
    for step in range(STEPS):
        tokens = [row[p + step] for row, p in zip(rows, PROMPTS, strict=True)]
        want.append(runtime.decode(state, torch.tensor(tokens)))
        got.append(engine.decode(tokens))
    assert np.abs(np.stack(got) - torch.stack(want).numpy()).max() < TOLERANCE
    assert np.stack(got).std() > 0.1
    assert bool(shares) == engine.phased
    if shares:
        assert min(PROMPTS) >= 15 * block
        assert kept[0] <= float(torch.cat([s.flatten() for s in shares]).mean()) <= kept[1]


@pytest.mark.parametrize("family", CASES)
def test_onnx_logits_equal_the_runtimes_in_prefill_and_decode_of_every_family(tmp_path: Path, family: str) -> None:
    heads, groups, retrieval, keys = CASES[family]
    eager.save_artifact(tmp_path, eager.tiny_config(family, heads=heads, groups=groups), retrieval, keys=keys)
    assert_equals_runtime(tmp_path)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    eager.save_artifact(folder, eager.tiny_config("llama", layers=2, groups=4), [[0, 3, 4, 5], [2]])
    return folder


@pytest.mark.parametrize(
    "model",
    [{"top_p": 1.0}, {"roles": "all-local"}, {"roles": "all-retrieval", "top_p": 1.0}, {"dense": True}],
    ids=["top_p 1", "all local", "all retrieval", "dense"],
)
def test_onnx_logits_equal_the_runtimes_without_selection(artifact: Path, model: dict[str, Any]) -> None:
    assert_equals_runtime(artifact, **model)


def test_another_top_p_selects_as_the_runtime_does(artifact: Path) -> None:
    assert_equals_runtime(artifact, top_p=0.6)


@pytest.mark.parametrize("sinks", [0, 20])
def test_a_chunk_longer_than_the_ring_and_unusual_sinks_are_exact(tmp_path: Path, sinks: int) -> None:
    eager.save_artifact(tmp_path, eager.tiny_config("qwen2", layers=2), [[0, 5], [4, 5, 6, 7]], sinks=sinks, sliding_window=7)
    assert_equals_runtime(tmp_path, chunk=113)


@pytest.mark.parametrize("key_dtype", ["bfloat16", "float8_e4m3fn"])
def test_narrow_index_keys_are_rounded_once_and_select_as_the_runtime_does(tmp_path: Path, key_dtype: str) -> None:
    eager.save_artifact(tmp_path, eager.tiny_config("qwen3", layers=2), [[0, 5], [4, 5, 6, 7]], key_dtype=key_dtype)
    assert_equals_runtime(tmp_path)


def test_caches_that_onnx_runtime_cannot_compute_with_are_refused(artifact: Path) -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.\w+ is TensorProto.BFLOAT16, wanted TensorProto.FLOAT or FLOAT16"):
        OnnxEngine(export(artifact, ExportOptions(dtype="bfloat16")), artifact, 1, CAPACITY)


def test_scaled_rope_tables_are_the_models_own(tmp_path: Path) -> None:
    config = eager.tiny_config("llama", layers=2, tie_word_embeddings=True, rope_parameters=ROPE["yarn"])
    eager.save_artifact(tmp_path, config, [[0, 5], [4, 5, 6, 7]])
    assert_equals_runtime(tmp_path)


def test_an_idle_row_changes_neither_its_caches_nor_the_other_rows_logits(artifact: Path) -> None:
    exported = export(artifact)
    both, one = (OnnxEngine(exported, artifact, 2, CAPACITY) for _ in range(2))
    rows = [random_ids(90, 1), random_ids(70, 2)]
    for engine in (both, one):
        engine.prefill(rows, CHUNK)
    before = {name: cache.numpy()[1].copy() for name, cache in one.caches.items()}
    want, got = both.step([[5], [6]], DECODE), one.step([[5], []], DECODE)
    assert np.array_equal(got[0], want[0])
    assert all(np.array_equal(cache.numpy()[1], before[name]) for name, cache in one.caches.items())
    assert one.lengths.tolist() == [91, 70]


def test_the_graph_lets_an_idle_sequence_see_nothing(artifact: Path) -> None:
    graph = export(artifact).model.graph
    place = [port.name for port in NODES["AttentionLocal"].inputs].index("visible")
    (visible,) = {node.input[place] for node in graph.node if node.op_type.startswith("Attention")}
    wanted, kept = {visible}, []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.insert(0, node)
    ports = [port for port in graph.input if port.name in wanted]
    result = onnx.helper.make_tensor_value_info(visible, onnx.TensorProto.INT32, None)
    evaluate = ReferenceEvaluator(onnx.helper.make_model(onnx.helper.make_graph(kept, "visible", ports, [result])))
    feeds = {"lengths": np.array([9, 9, 0, 0, 4], np.int32), "counts": np.array([0, 1, 0, 1, 37], np.int32)}
    (found,) = evaluate.run(None, feeds)
    assert found.dtype == np.int32
    assert found.tolist() == [0, 10, 0, 1, 41]


def test_the_phase_and_not_the_number_of_tokens_chooses_the_pattern(artifact: Path) -> None:
    exported = export(artifact)
    rows = [random_ids(260, 1)]
    logits = []
    for phase in (PREFILL, DECODE):
        engine = OnnxEngine(exported, artifact, 1, CAPACITY)
        engine.prefill(rows, CHUNK)
        logits.append(engine.step([[5]], phase))
    assert np.abs(logits[0] - logits[1]).max() > 10 * TOLERANCE


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_tensor_of_a_half_precision_export_has_the_dtype_that_its_use_wants(artifact: Path, dtype: str) -> None:
    # check_model infers all types strictly, so a mixed-up dtype is an error.
    model = checked(artifact, ExportOptions(dtype=dtype)).model
    wanted = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}[dtype]
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert {kind for name, kind in kinds.items() if "index_" not in name} == {wanted}
    assert {kind for name, kind in kinds.items() if "index_" in name} == {onnx.TensorProto.FLOAT}


def test_float16_logits_are_close_to_float32(artifact: Path) -> None:
    rows, logits = [random_ids(100, 1)], []
    for dtype in ("float32", "float16"):
        engine = OnnxEngine(export(artifact, ExportOptions(dtype=dtype)), artifact, 1, CAPACITY)
        logits.append(engine.prefill(rows, 50))
    assert 0 < np.abs(logits[0] - logits[1]).max() < 0.05


def test_weights_of_the_same_dtype_stay_in_the_artifacts_own_files(artifact: Path) -> None:
    exported = export(artifact)
    for tensor in exported.model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            assert place["location"] == "model.safetensors"
    stored = load(artifact, device="cpu").model.nbytes()
    assert exported.external_bytes == stored
    rope, index = 2 * 1024 * 8 * 4, sum(t.numel() * 4 for t in eager.load_file(artifact / "indexer.safetensors").values())
    assert exported.copied_bytes == rope + index


def convert(made: Path, out: Path, **shape: Any) -> int:
    """Write `made` again as the converter does; bytes of its weights."""
    checkpoint, manifest = open_checkpoint(str(made), work=out.with_name("work")), Manifest.load(made / "rtpurbo.json")
    indexer, unlisted = eager.load_file(made / "indexer.safetensors"), dataclasses.replace(manifest, files={})
    write_artifact(out, checkpoint, unlisted, indexer=indexer, student={}, recipe_toml="", metrics={}, **shape)
    return checkpoint.size_bytes


def products(exported: Export) -> int:
    return sum("Linear" in node.op_type for node in exported.model.graph.node)


def test_the_experts_of_a_converted_model_are_used_where_they_lie(tmp_path: Path) -> None:
    _, groups, retrieval, keys = CASES["qwen3_moe"]
    made, out = tmp_path / "made", tmp_path / "converted"
    eager.save_artifact(made, eager.tiny_config("qwen3_moe", groups=groups), retrieval, keys=keys)
    stored = convert(made, out, max_shard_bytes=60_000)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    copied, placed = export(made), export(out)
    assert copied.copied_bytes - placed.copied_bytes == 3 * 4 * 3 * 32 * 48 * 4
    norms_of_q_and_k = 3 * 2 * 16 * 4
    assert placed.external_bytes == stored - norms_of_q_and_k
    assert_equals_runtime(out)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_projections_of_one_input_are_one_product_in_a_converted_model(tmp_path: Path, family: str) -> None:
    heads, groups, retrieval, keys = CASES[family]
    made, out = tmp_path / "made", tmp_path / "converted"
    eager.save_artifact(made, eager.tiny_config(family, heads=heads, groups=groups), retrieval, keys=keys)
    stored = convert(made, out)
    # q, k, v | o | gate, up | down of each layer, and lm_head; transformers writes gate and up next to each other too, but not q, k, v.
    assert (products(export(made)), products(export(out))) == (3 * 6 + 1, 3 * 4 + 1)
    assert export(out).external_bytes == stored
    assert_equals_runtime(out)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"hidden_act": "gelu"}, {}, r"hidden_act is 'gelu', wanted silu"),
        ({}, {"positions": 2000}, r"2000 positions exceed the model's max_position_embeddings 1024"),
        ({}, {"top_p": 1 / 3}, r"^top_p is 0.333\d+, wanted at most 9 decimals"),
        ({}, {"dtype": "int8"}, r"dtype is 'int8', wanted auto"),
        ({}, {"positions": 0}, r"positions is 0, wanted at least 1"),
    ],
)
def test_what_an_engine_cannot_hold_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    manifest = eager.save_artifact(tmp_path, eager.tiny_config("llama", layers=1), [[0]])
    edit_json(tmp_path / "config.json", **changes)
    eager.write_manifest(tmp_path, manifest)
    with pytest.raises(ValueError, match=message):
        export(tmp_path, ExportOptions(**options))


@pytest.mark.parametrize(("mass", "chunk"), [(0.6, CHUNK), (0.6, 64), (1.0, CHUNK)])
def test_a_prefill_that_selects_blocks_selects_as_the_runtime_does(tmp_path: Path, mass: float, chunk: int) -> None:
    config, retrieval = eager.tiny_config("qwen3", layers=2), [[0, 5], [4, 5, 6, 7]]
    logits = []
    for pattern in ({"prefill_pattern": "topp", "prefill_top_p": mass}, {}):
        eager.save_artifact(tmp_path, config, retrieval, prefill_block=16, **pattern)
        engine = OnnxEngine(export(tmp_path), tmp_path, 1, CAPACITY)
        logits.append(engine.prefill([random_ids(260)], chunk))
    # It is another model than dense prefill, unless everything is selected.
    assert (np.abs(logits[0] - logits[1]).max() > 10 * TOLERANCE) == (mass < 1)
    eager.save_artifact(tmp_path, config, retrieval, prefill_block=16, prefill_pattern="topp", prefill_top_p=mass)
    assert_equals_runtime(tmp_path, chunk=chunk)


@pytest.mark.parametrize("key", ["top_p", "prefill_top_p"])
def test_a_share_with_too_many_decimals_is_refused_with_its_file_and_key(tmp_path: Path, key: str) -> None:
    share = {"prefill_pattern": "topp", "prefill_block": 16, key: 1 / 3}
    eager.save_artifact(tmp_path, eager.tiny_config("llama", layers=1), [[0]], **share)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/rtpurbo\.json: {key} is 0\.333\d+, wanted at most 9 decimals for an engine$"):
        export(tmp_path)


def test_a_prefill_block_that_no_kernel_has_is_refused(tmp_path: Path) -> None:
    eager.save_artifact(tmp_path, eager.tiny_config("llama", layers=1), [[0]], prefill_pattern="topp", prefill_block=256)
    with pytest.raises(ValueError, match=r"rtpurbo.json: prefill_block is 256, wanted one of \[16, 32, 64, 128\] for an engine"):
        export(tmp_path)


def test_a_copy_that_does_not_fit_into_one_file_is_refused(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rtpurbo.plugins.trt.weights.MAX_COPIED_BYTES", 1000)
    with pytest.raises(ValueError, match="export in the artifact's own dtype, or convert the model again"):
        export(artifact, ExportOptions(dtype="float16"))
