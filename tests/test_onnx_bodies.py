"""Each custom node alone: its function body in ONNX Runtime against the kernels' eager definitions, with garbage where nothing is read."""

# B batch  T chunk tokens  S cached tokens  W ring slots  H query heads  K kv heads  D head dim  I index-key sets  R index dim  N blocks
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx_node import node_model

from rtpurbo.kernels.block_scores.reference import block_scores
from rtpurbo.kernels.block_selection.reference import mask_to_ids, select_blocks
from rtpurbo.kernels.experts.reference import mix_experts
from rtpurbo.kernels.local_attention.reference import attend_local, masked_attention
from rtpurbo.kernels.router.reference import route_tokens
from rtpurbo.plugins.trt.nodes import DECODE, NODES, PREFILL

# Large and finite, as the nodes' contract says of unwritten places: any use of it shows.
GARBAGE = 1e4
# lengths and counts: empty cache, odd numbers, an idle row, a full cache.
LENGTHS, COUNTS = [0, 37, 64, 90], [9, 5, 0, 1]
B, T, D, CAPACITY = 4, 9, 8, 99


def run(model: onnx.ModelProto, feeds: Mapping[str, Any]) -> list[torch.Tensor]:
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    arrays = {name: value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value, np.int32) for name, value in feeds.items()}
    return [torch.from_numpy(output) for output in session.run(None, arrays)]


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def normal(random: torch.Generator, *shape: int, std: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=random) * std


def valid_rows(counts: list[int], rows: int) -> torch.Tensor:
    return torch.arange(rows) < torch.tensor(counts)[:, None]


def ring_slot(position: int, window: int, sinks: int) -> int:
    return position if position < sinks else sinks + (position - sinks) % window


@pytest.mark.parametrize(("window", "sinks"), [(5, 2), (16, 0), (200, 4)], ids=["wraps within a chunk", "no sinks", "never wraps"])
def test_attend_local_sees_ring_and_chunk_and_then_writes_the_ring(random: torch.Generator, window: int, sinks: int) -> None:
    heads, groups, scale = 6, 2, 0.7
    q, k, v = (normal(random, B, T, n, D, std=2.0) for n in (heads, groups, groups))
    old_k, old_v = (normal(random, B, CAPACITY, groups, D, std=2.0) for _ in range(2))
    rings = [torch.full((B, sinks + window, groups, D), GARBAGE) for _ in range(2)]
    for b, length in enumerate(LENGTHS):
        for position in range(length):
            for ring, old in zip(rings, (old_k, old_v), strict=True):
                ring[b, ring_slot(position, window, sinks)] = old[b, position]
    invalid = ~valid_rows(COUNTS, T)[..., None, None]
    k, v = k.masked_fill(invalid, GARBAGE), v.masked_fill(invalid, GARBAGE)
    attributes = {"window": window, "sinks": sinks, "scale": scale}
    model = node_model("AttendLocal", attributes, {"": {"W": sinks + window, "H": heads, "K": groups, "D": D}})
    feeds = {"q": q, "k": k, "v": v, "ring_k": rings[0], "ring_v": rings[1], "lengths": LENGTHS, "counts": COUNTS}
    out, *new = run(model, feeds)
    lengths_B, counts_B = torch.tensor(LENGTHS), torch.tensor(COUNTS)
    want, _ = attend_local(q, k, v, lengths_B, counts_B, *rings, window, sinks, scale)
    valid = valid_rows(COUNTS, T)
    torch.testing.assert_close(out[valid], want[valid], atol=2e-5, rtol=1e-5)
    for b, (length, count) in enumerate(zip(LENGTHS, COUNTS, strict=True)):
        for ring, rows in zip(rings, (k, v), strict=True):
            for t in range(count):
                ring[b, ring_slot(length + t, window, sinks)] = rows[b, t]
    assert torch.equal(new[0], rings[0])
    assert torch.equal(new[1], rings[1])


@pytest.mark.parametrize("name", ["Append", "AppendKV"])
def test_append_writes_valid_rows_at_their_positions_and_nothing_else(random: torch.Generator, name: str) -> None:
    groups, sets, dim = 3, 2, 4
    caches = [normal(random, B, CAPACITY, groups, D) for _ in range(2)] + [normal(random, B, CAPACITY, sets, dim)]
    rows = [normal(random, B, T, groups, D) for _ in range(2)] + [normal(random, B, T, sets, dim)]
    ports = [port.name for port in NODES[name].inputs]
    pairs = len(NODES[name].outputs)
    model = node_model(name, {}, {"": {"K": groups, "D": D, "I": sets, "R": dim}})
    new = run(model, dict(zip(ports, (*caches[:pairs], *rows[:pairs], LENGTHS, COUNTS), strict=True)))
    for b, (length, count) in enumerate(zip(LENGTHS, COUNTS, strict=True)):
        for cache, chunk in zip(caches, rows, strict=True):
            cache[b, length : length + count] = chunk[b, :count]
    assert all(torch.equal(found, wanted) for found, wanted in zip(new, caches[:pairs], strict=True))


def selection_inputs(random: torch.Generator, capacity: int, visible: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Peaked index queries [B, 1, J, R] and keys [B, S, I, R]: each query follows a few of its keys; garbage beyond `visible`."""
    key_sets, dim = [0, 0, 1, 2], 8
    k_BSIR = normal(random, len(visible), capacity, 3, dim)
    q_B1JR = torch.zeros(len(visible), 1, len(key_sets), dim)
    for b, tokens in enumerate(visible):
        for j, key_set in enumerate(key_sets):
            q_B1JR[b, 0, j] = 6.0 * k_BSIR[b, int(torch.randint(tokens, (1,), generator=random)), key_set]
        k_BSIR[b, tokens:] = GARBAGE
    return q_B1JR, k_BSIR, torch.tensor(key_sets)


SELECTION = {"narrow_keys": 0, "block": 16, "sinks": 20, "top_p_ppb": 900_000_000, "scale": 0.5}


@pytest.mark.parametrize("capacity", [480, 481, 495, 700])
def test_select_blocks_is_the_normative_selection(random: torch.Generator, capacity: int) -> None:
    visible = [480, 1, 17, 333]
    q_B1JR, k_BSIR, key_set_J = selection_inputs(random, capacity, visible)
    model = node_model("SelectBlocks", {**SELECTION, "key_sets": key_set_J.tolist()}, {"": {"J": 4, "I": 3, "R": 8}})
    ids, count = run(model, {"index_q": q_B1JR, "index_k": k_BSIR, "visible": visible, "phase": np.zeros(DECODE)})
    scores = block_scores(q_B1JR, k_BSIR, key_set_J, torch.tensor(visible)[:, None], SELECTION["scale"], 16)
    want = select_blocks(*scores, 0.9, SELECTION["sinks"], 16)[:, :, 0]
    want_ids, want_count = mask_to_ids(want)
    assert torch.equal(count, want_count)
    assert torch.equal(ids, want_ids)
    share = want_count[0] / 30
    assert 0.05 <= float(share.mean()) <= 0.5


def test_select_blocks_selects_nothing_in_prefill(random: torch.Generator) -> None:
    _, k_BSIR, key_set_J = selection_inputs(random, 100, [100, 50])
    model = node_model("SelectBlocks", {**SELECTION, "key_sets": key_set_J.tolist()}, {"": {"J": 4, "I": 3, "R": 8}})
    q_BTJR = normal(random, 2, 13, 4, 8)
    ids, count = run(model, {"index_q": q_BTJR, "index_k": k_BSIR, "visible": [100, 50], "phase": np.zeros(PREFILL)})
    assert ids.shape == (2, 4, 7)
    assert torch.equal(count, torch.zeros(2, 4, dtype=torch.int32))


ROLES, GROUP_SIZE = (3, 1), 3
WINDOW = {"window": 10, "sinks": 3, "scale": 0.6}


def retained_inputs(random: torch.Generator, rows: int, lengths: list[int], counts: list[int]) -> dict[str, Any]:
    """Queries, and caches with the chunk already appended and garbage behind it."""
    batch, groups = len(lengths), len(ROLES)
    visible = [length + count for length, count in zip(lengths, counts, strict=True)]
    caches = [normal(random, batch, CAPACITY, groups, D, std=2.0) for _ in range(2)]
    for b, tokens in enumerate(visible):
        for cache in caches:
            cache[b, tokens:] = GARBAGE
    q = normal(random, batch, rows, groups * GROUP_SIZE, D, std=2.0)
    return {"q": q, "k_cache": caches[0], "v_cache": caches[1], "lengths": lengths, "counts": counts, "visible": visible}


def retained_want(feeds: dict[str, Any], selected_BHN: torch.Tensor | None = None, block: int = 1) -> torch.Tensor:
    """One mask over positions per head: selected or causal for retrieval heads, window + sinks for the others."""
    q = feeds["q"]
    i_BT1 = (torch.tensor(feeds["lengths"])[:, None] + torch.arange(q.shape[1]))[..., None]
    j_S = torch.arange(CAPACITY)
    causal_BTS = j_S <= i_BT1
    local_BTS = causal_BTS & ((i_BT1 - j_S < WINDOW["window"]) | (j_S < WINDOW["sinks"]))
    masks, row = [], 0
    for count in ROLES:
        for head in range(GROUP_SIZE):
            mask_BTS = causal_BTS if head < count else local_BTS
            if head < count and selected_BHN is not None:
                mask_BTS = causal_BTS & selected_BHN[:, row, j_S // block][:, None]
            masks.append(mask_BTS)
            row += head < count
    visible_BHTS = torch.stack(masks, dim=1)
    return masked_attention(q, feeds["k_cache"], feeds["v_cache"], visible_BHTS, WINDOW["scale"], GROUP_SIZE)[0]


RETAINED_SIZES = {"": {"H": len(ROLES) * GROUP_SIZE, "K": len(ROLES), "D": D, "J": sum(ROLES)}}


def test_attend_causal_and_the_prefill_of_attend_retained_are_causal_by_role(random: torch.Generator) -> None:
    feeds = retained_inputs(random, T, LENGTHS, COUNTS)
    want, valid = retained_want(feeds), valid_rows(COUNTS, T)
    (out,) = run(node_model("AttendCausal", {**WINDOW, "retrieval_counts": ROLES}, RETAINED_SIZES), feeds)
    torch.testing.assert_close(out[valid], want[valid], atol=2e-5, rtol=1e-5)
    model = node_model("AttendRetained", {**WINDOW, "retrieval_counts": ROLES, "block": 16}, RETAINED_SIZES)
    nothing = {"ids": np.full((B, sum(ROLES), 7), 3), "count": np.zeros((B, sum(ROLES))), "phase": np.zeros(PREFILL)}
    (out,) = run(model, {**feeds, **nothing})
    torch.testing.assert_close(out[valid], want[valid], atol=2e-5, rtol=1e-5)


def test_attend_retained_decodes_over_the_listed_blocks_and_ignores_ids_beyond_the_count(random: torch.Generator) -> None:
    lengths, counts = [98, 37, 0, 63], [1, 1, 1, 0]
    feeds = retained_inputs(random, 1, lengths, counts)
    selected_BJN = torch.rand(B, sum(ROLES), 7, generator=random) < 0.4
    selected_BJN[..., 0] = True
    ids, count = mask_to_ids(selected_BJN)
    # -1 would index the last block: what lies beyond the count must not be read.
    ids = torch.where(ids < 0, torch.tensor(6, dtype=torch.int32), ids)
    model = node_model("AttendRetained", {**WINDOW, "retrieval_counts": ROLES, "block": 16}, RETAINED_SIZES)
    (out,) = run(model, {**feeds, "ids": ids, "count": count, "phase": np.zeros(DECODE)})
    want = retained_want(feeds, selected_BJN, 16)
    torch.testing.assert_close(out[:3], want[:3], atol=2e-5, rtol=1e-5)
    assert (out[:3] - retained_want(feeds)[:3]).abs().max() > 1e-2


@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("rows", [1, 13])
def test_route_takes_the_best_experts_and_the_lowest_id_among_equals(random: torch.Generator, rows: int, normalize: int) -> None:
    logits = torch.randint(-3, 3, (rows, 11), generator=random).float()
    ids, weights = run(node_model("Route", {"num_chosen": 4, "normalize": normalize}, {"": {"E": 11, "X": 4}}), {"logits": logits})
    want_ids, want_weights = route_tokens(logits, 4, bool(normalize))
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights, want_weights)


@pytest.mark.parametrize("rows", [1, 13])
def test_experts_mix_their_outputs_by_weight(random: torch.Generator, rows: int) -> None:
    experts, hidden, width, chosen = 5, 12, 7, 2
    x = normal(random, rows, hidden)
    ids = torch.stack([torch.randperm(experts, generator=random)[:chosen] for _ in range(rows)]).int()
    weights = torch.rand(rows, chosen, generator=random)
    gate_up, down = normal(random, experts, 2 * width, hidden), normal(random, experts, hidden, width)
    model = node_model("Experts", {}, {"": {"C": hidden, "X": chosen, "E": experts, "G": 2 * width, "F": width}})
    (y,) = run(model, {"x": x, "ids": ids, "weights": weights, "gate_up": gate_up, "down": down})
    torch.testing.assert_close(y, mix_experts(x, ids, weights, gate_up, down), atol=1e-4, rtol=1e-5)
