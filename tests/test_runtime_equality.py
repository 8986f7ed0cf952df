"""The runtime's logits against an independent whole-sequence implementation with explicit masks, for every family."""

import dataclasses
from pathlib import Path
from typing import Any

import eager_model as eager
import pytest
import torch
from transformers import AutoModelForCausalLM

from rtpurbo.manifests.manifest import Manifest
from rtpurbo.runtime.layout import layout_of
from rtpurbo.runtime.loader import load

TOLERANCE = 1e-4


def random_ids(count: int, seed: int = 1) -> list[int]:
    return torch.randint(eager.VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(
    runtime: Any, rows: list[list[int]], prompts: list[int], chunk: int, *, dense: bool = False, on_selection: Any = None
) -> tuple[list, Any]:
    """Left-padded prefill of each row's prompt, then its other tokens one by one; per row the logits of every token."""
    state = runtime.start(len(rows), max(map(len, rows)), dense=dense)
    state.on_selection = on_selection
    width = max(prompts)
    ids = torch.tensor([[9] * (width - p) + row[:p] for row, p in zip(rows, prompts, strict=True)])
    mask = torch.tensor([[0] * (width - p) + [1] * p for p in prompts])
    prefilled = runtime.prefill(state, ids, mask, chunk=chunk, all_logits=True)
    logits = [[prefilled[b, width - p :]] for b, p in enumerate(prompts)]
    for step in range(max(len(row) - p for row, p in zip(rows, prompts, strict=True))):
        active = [p + step < len(row) for row, p in zip(rows, prompts, strict=True)]
        tokens = [row[p + step] if on else 0 for row, p, on in zip(rows, prompts, active, strict=True)]
        decoded = runtime.decode(state, torch.tensor(tokens), active)
        for b, on in enumerate(active):
            if on:
                logits[b].append(decoded[b : b + 1])
    return [torch.cat(pieces) for pieces in logits], state


class Selections:
    """The blocks that the runtime selected: per row, (layer, head in the checkpoint's order, position) -> block ids."""

    def __init__(self, manifest: Manifest, rows: int) -> None:
        self._layouts = [layout_of(manifest, i) for i in range(len(manifest.layers))]
        self.rows: list[dict[tuple[int, int, int], set[int]]] = [{} for _ in range(rows)]

    def observe(self, layer: int, selected_BHN: torch.Tensor, visible_B: torch.Tensor) -> None:
        layout = self._layouts[layer]
        for row, selected_HN, visible in zip(self.rows, selected_BHN, visible_B.tolist(), strict=True):
            for place, selected_N in zip(layout.retrieval_heads, selected_HN, strict=True):
                # A row that has ended repeats its last length; what was seen there first counts.
                row.setdefault((layer, layout.head_order[place], visible - 1), set(selected_N.nonzero().flatten().tolist()))


def assert_equals_eager(
    folder: Path, manifest: Manifest, rows: list[list[int]], prompts: list[int], *, chunk: int, blocks: int = 16, device: str = "cpu"
) -> Any:
    """Compare every token's logits of every row, with a real selection of 5-50 % of at least `blocks` blocks."""
    selections = Selections(manifest, len(rows))
    got, state = run(load(folder, device=device), rows, prompts, chunk, on_selection=selections.observe)
    trace = eager.EagerTrace()
    for row, prompt, logits, other in zip(rows, prompts, got, selections.rows, strict=True):
        trace.other = other
        want = eager.eager_logits(folder, manifest, row, prompt, trace=trace)
        assert logits.shape == want.shape
        assert (logits.cpu() - want).abs().max() < TOLERANCE
    if manifest.num_retrieval_heads:
        assert max(stored for _, stored in trace.blocks) >= blocks
        assert 0.05 <= trace.kept_share <= 0.5
        assert trace.adopted <= max(2, 0.01 * len(trace.blocks))
    return state


# query heads, KV heads, retrieval heads of each layer, index keys
CASES = {
    "llama": (8, 2, [[0, 1, 2, 3, 5], [], [4, 5, 6, 7]], "head"),
    "mistral": (4, 4, [[1], [0, 2, 3], []], "head"),
    "qwen2": (6, 2, [[4], [0, 1, 2, 3, 4, 5], [2, 3]], "group"),
    "qwen3": (8, 1, [[], [7], [0, 1, 2, 3, 4, 5, 6, 7]], "group"),
    "qwen3_moe": (8, 2, [[6], [0, 4, 5], [1, 2, 3]], "head"),
}


@pytest.mark.parametrize("family", CASES)
def test_prefill_and_decode_equal_the_masked_model_of_every_family(tmp_path: Path, family: str) -> None:
    heads, groups, retrieval, keys = CASES[family]
    config = eager.tiny_config(family, heads=heads, groups=groups)
    manifest = eager.save_artifact(tmp_path, config, retrieval, keys=keys)
    if family == "qwen2":
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert all(getattr(model.model.layers[0].self_attn, f"{name}_proj").bias.abs().min() > 0 for name in "qkv")
    row = random_ids(340)
    # 270 prompt tokens in chunks of 37 and 70 decode steps: both phases wrap the ring of 32 at least twice.
    assert_equals_eager(tmp_path, manifest, [row], [270], chunk=37)


@pytest.mark.parametrize("keys", ["head", "group"])
def test_left_padded_rows_of_different_lengths_each_equal_their_own_model(tmp_path: Path, keys: str) -> None:
    config = eager.tiny_config("llama", groups=2, layers=2)
    manifest = eager.save_artifact(tmp_path, config, [[3, 4, 5, 6, 7], [0, 1, 2, 3]], keys=keys)
    rows = [random_ids(300, 1), random_ids(47, 2), random_ids(289, 3)]
    assert_equals_eager(tmp_path, manifest, rows, [272, 33, 271], chunk=53)


@pytest.mark.parametrize("prompt", [1, 15, 16, 17, 31, 32, 33, 35, 36, 37, 64])
def test_prompt_lengths_around_window_and_block_edges_are_exact(tmp_path: Path, prompt: int) -> None:
    config = eager.tiny_config("llama", layers=2, heads=4, groups=2)
    manifest = eager.save_artifact(tmp_path, config, [[2, 3], [1]])
    row = random_ids(prompt + 3)
    for chunk in (7, 1000):
        got, _ = run(load(tmp_path, device="cpu"), [row], [prompt], chunk)
        assert (got[0] - eager.eager_logits(tmp_path, manifest, row, prompt)).abs().max() < TOLERANCE


def test_blocks_of_64_tokens_are_exact(tmp_path: Path) -> None:
    config = eager.tiny_config("qwen3", layers=2, max_position_embeddings=2048)
    manifest = eager.save_artifact(tmp_path, config, [[0, 1], [4, 5, 6, 7]], decode_block=64, sliding_window=100, index_peak=24.0)
    assert_equals_eager(tmp_path, manifest, [random_ids(1100)], [1080], chunk=250)


@pytest.mark.parametrize(
    ("sinks", "window"), [(0, 32), (4, 1), (20, 5), (4, 1000)], ids=["no sinks", "window of 1", "sinks beyond a block", "long window"]
)
def test_unusual_sinks_and_windows_are_exact(tmp_path: Path, sinks: int, window: int) -> None:
    config = eager.tiny_config("qwen2", layers=2)
    manifest = eager.save_artifact(tmp_path, config, [[0, 5], [4, 5, 6, 7]], sinks=sinks, sliding_window=window)
    assert_equals_eager(tmp_path, manifest, [random_ids(290)], [265], chunk=41)


def test_tied_embeddings_are_exact(tmp_path: Path) -> None:
    config = eager.tiny_config("llama", layers=2, tie_word_embeddings=True)
    manifest = eager.save_artifact(tmp_path, config, [[0, 5], [4, 5, 6, 7]])
    assert_equals_eager(tmp_path, manifest, [random_ids(290)], [275], chunk=41)


ROPE = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
        "rope_theta": 10000.0,
    },
}


@pytest.mark.parametrize("scaling", ROPE)
def test_scaled_rope_is_exact(tmp_path: Path, scaling: str) -> None:
    config = eager.tiny_config("llama", layers=2, rope_parameters=ROPE[scaling])
    manifest = eager.save_artifact(tmp_path, config, [[0, 5], [4, 5, 6, 7]])
    assert_equals_eager(tmp_path, manifest, [random_ids(290)], [275], chunk=41)


@pytest.mark.parametrize("key_dtype", ["bfloat16", "float8_e4m3fn"])
def test_index_keys_are_stored_in_the_manifests_dtype_rounded_once(tmp_path: Path, key_dtype: str) -> None:
    config, caches = eager.tiny_config("llama", layers=2), {}
    for name in ("float32", key_dtype):
        eager.save_artifact(tmp_path / name, config, [[0, 5], [4, 5, 6, 7]], key_dtype=name)
        runtime = load(tmp_path / name, device="cpu")
        state = runtime.start(1, 290)
        runtime.prefill(state, torch.tensor([random_ids(289)]), chunk=41)
        assert runtime.decode(state, torch.tensor([3])).isfinite().all()
        caches[name] = [layer.index_k_BSIR for layer in state.cache.layers]
    for exact, stored in zip(caches["float32"], caches[key_dtype], strict=True):
        assert stored.dtype == getattr(torch, key_dtype)
        assert torch.equal(stored[:, :289].float(), exact[:, :289].to(stored.dtype).float())


@pytest.mark.parametrize("family", CASES)
def test_dense_mode_and_all_retrieval_equal_transformers_own_dense_logits(tmp_path: Path, family: str) -> None:
    heads, groups, retrieval, keys = CASES[family]
    eager.save_artifact(tmp_path, eager.tiny_config(family, heads=heads, groups=groups), retrieval, keys=keys)
    row = random_ids(130)
    for attention in ("eager", "sdpa"):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention, dtype=torch.float32)
        with torch.no_grad():
            want = plain(input_ids=torch.tensor([row]), use_cache=False).logits[0]
        everything = load(tmp_path, device="cpu", roles="all-retrieval", top_p=1.0)
        for runtime, dense in ((load(tmp_path, device="cpu"), True), (everything, False)):
            got, _ = run(runtime, [row], [100], 37, dense=dense)
            assert (got[0] - want).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_prefill_that_selects_everything_equals_dense_prefill(tmp_path: Path, family: str) -> None:
    config, row = eager.tiny_config(family, layers=2), random_ids(330)
    fields = {"prefill_pattern": "topp", "prefill_top_p": 1.0}
    manifest = eager.save_artifact(tmp_path, config, [[0, 5], [4, 5, 6, 7]], **fields)
    got, _ = run(load(tmp_path, device="cpu"), [row, row[:77]], [330, 77], 50)
    want = eager.eager_logits(tmp_path, manifest, row, 330)
    assert (got[0] - want).abs().max() < TOLERANCE
    assert (got[1] - want[:77]).abs().max() < TOLERANCE


def test_prefill_that_selects_blocks_does_not_depend_on_the_chunk(tmp_path: Path) -> None:
    config, row = eager.tiny_config("qwen3", layers=2), random_ids(700)
    logits = []
    for mass, chunk in ((1.0, 700), (0.6, 700), (0.6, 64), (0.6, 160)):
        eager.save_artifact(tmp_path / str(mass), config, [[0, 5], [4, 5, 6, 7]], prefill_pattern="topp", prefill_top_p=mass)
        got, _ = run(load(tmp_path / str(mass), device="cpu"), [row], [700], chunk)
        logits.append(got[0])
    dense, whole, *chunked = logits
    assert (whole - dense).abs().max() > 1e-2
    assert all((other - whole).abs().max() < TOLERANCE for other in chunked)


def test_all_local_equals_a_manifest_without_retrieval_heads(tmp_path: Path) -> None:
    manifest = eager.save_artifact(tmp_path, eager.tiny_config("qwen3", layers=2), [[0, 5], [4, 5, 6, 7]])
    layers = tuple(dataclasses.replace(layer, retrieval_heads=(), retained_groups=()) for layer in manifest.layers)
    row = random_ids(120)
    got, state = run(load(tmp_path, device="cpu", roles="all-local"), [row], [100], 37)
    want = eager.eager_logits(tmp_path, dataclasses.replace(manifest, layers=layers), row, 100)
    assert (got[0] - want).abs().max() < TOLERANCE
    assert all(layer.k_BSKD is None and layer.index_k_BSIR is None for layer in state.cache.layers)


def test_a_top_p_given_to_load_replaces_the_manifests(tmp_path: Path) -> None:
    manifest = eager.save_artifact(tmp_path, eager.tiny_config("llama", layers=2), [[0, 5], [4, 5, 6, 7]])
    row = random_ids(290)
    for top_p in (0.5, 1.0):
        got, _ = run(load(tmp_path, device="cpu", top_p=top_p), [row], [280], 100)
        want = eager.eager_logits(tmp_path, dataclasses.replace(manifest, top_p=top_p), row, 280)
        assert (got[0] - want).abs().max() < TOLERANCE


def test_a_local_group_never_holds_more_than_sinks_and_window(tmp_path: Path) -> None:
    manifest = eager.save_artifact(tmp_path, eager.tiny_config("llama", groups=4, layers=3), [[0, 1], [], [3, 6]])
    runtime = load(tmp_path, device="cpu")
    _, state = run(runtime, [random_ids(300)], [290], 64)
    slots = manifest.sinks + manifest.sliding_window
    for layer, retained in zip(state.cache.layers, (1, 0, 2), strict=True):
        assert layer.ring_k_BWKD.shape == layer.ring_v_BWKD.shape == (1, slots, 4 - retained, 16)
        assert (layer.k_BSKD is None) == (retained == 0)
        if retained:
            assert layer.k_BSKD.shape == layer.v_BSKD.shape == (1, 300, retained, 16)
    floats = 2 * 16 * (9 * slots + 3 * 300) + 300 * 4 * (2 + 2)
    assert state.cache.nbytes() == 4 * floats
    dense = runtime.start(1, 300, dense=True)
    assert dense.cache.nbytes() == 4 * 2 * 16 * 12 * 300
    assert all(layer.ring_k_BWKD is None and layer.index_k_BSIR is None for layer in dense.cache.layers)


def test_a_sequence_that_ended_does_not_affect_the_others(tmp_path: Path) -> None:
    eager.save_artifact(tmp_path, eager.tiny_config("qwen3_moe", layers=2), [[0, 5], [4, 5, 6, 7]])
    runtime = load(tmp_path, device="cpu")
    row = random_ids(100)
    alone, _ = run(runtime, [row], [60], 64)
    beside, _ = run(runtime, [random_ids(61, 5), row], [60, 60], 64)
    assert (beside[1] - alone[0]).abs().max() < TOLERANCE


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("family", CASES)
def test_a_gpu_in_fp32_equals_the_masked_model(tmp_path: Path, family: str) -> None:
    heads, groups, retrieval, keys = CASES[family]
    manifest = eager.save_artifact(tmp_path, eager.tiny_config(family, heads=heads, groups=groups), retrieval, keys=keys)
    assert_equals_eager(tmp_path, manifest, [random_ids(300), random_ids(290, 2)], [270, 281], chunk=37, device="cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_gpu_in_bfloat16_stays_near_the_masked_model(tmp_path: Path, head_dim: int) -> None:
    config = eager.tiny_config("qwen3", head_dim=head_dim, layers=2)
    changes = {"decode_block": 64, "sliding_window": 100, "key_dtype": "bfloat16", "index_dim": 16, "peak": 2.0}
    manifest = eager.save_artifact(tmp_path, config, [[0, 1, 5], [4, 5, 6, 7]], **changes)
    for top_p in (1.0, 0.999):
        row = random_ids(600)
        got, _ = run(load(tmp_path, device="cuda", dtype="bfloat16", top_p=top_p), [row], [560], 250)
        want = eager.eager_logits(tmp_path, dataclasses.replace(manifest, top_p=top_p), row, 560)
        error_T = (got[0].float().cpu() - want).norm(dim=-1) / want.norm(dim=-1)
        assert float(error_T.median()) < 0.05
        assert float(error_T.max()) < 0.5
