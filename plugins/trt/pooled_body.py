"""Prefill that selects blocks, in standard ONNX operators: what kernels.prefill_selection.reference computes."""

# B batch  T chunk tokens  S cached tokens  J retrieval heads  I index-key sets  R index dim  Q query blocks  N key blocks  b block
import numpy as np

from rtpurbo.plugins.trt.graph import Graph
from rtpurbo.plugins.trt.selection_body import bins_taken, block_mass


def selected_keys(g: Graph) -> str:
    """Bool [B, J, T, S]: keys whose block the row's block of queries selects, for rows of the chunk that are valid."""
    block = g.attribute("prefill_block", "int")
    filled_B = g.op("Add", g.int64("lengths"), g.int64("counts"))
    q_BQJR = _pooled(g, "index_q", g.int64("counts"), block)
    k_BNJR = g.gather(_pooled(g, g.float32("index_k"), filled_B, block), g.attribute("key_sets", "ints"), 2)
    logits_BJQN = g.op("MatMul", g.transpose(q_BQJR, 0, 2, 1, 3), g.transpose(k_BNJR, 0, 2, 3, 1))
    logits_BJQN = g.op("Mul", logits_BJQN, g.attribute("index_scale", "float"))
    candidate, forced = _candidates(g, g.size(q_BQJR, 1), g.size(k_BNJR, 1), filled_B, block)
    # The histogram's operators know three axes.
    shape = g.op("Shape", logits_BJQN)
    rows = [g.size(logits_BJQN, 0), -1, g.size(logits_BJQN, 3)]
    candidate, forced = (g.reshape(g.op("Expand", mask, shape), *rows) for mask in (candidate, forced))
    logits = g.op("Where", candidate, g.reshape(logits_BJQN, *rows), g.real(-np.inf))
    distance = g.op("Sub", g.reduce("Max", logits, -1), logits)
    mass = block_mass(g, distance, g.float32(candidate), candidate)
    everything = g.not_less(g.attribute("prefill_ppb", "int"), g.integer(10**9))
    taken = g.op("Or", bins_taken(g, distance, candidate, mass, forced, "prefill_ppb"), everything)
    selected = g.op("And", candidate, g.op("Or", forced, taken))
    # ONNX Runtime gathers no booleans along an axis on every release: as numbers.
    selected_BJQN = g.reshape(g.float32(selected), shape)
    row_T = g.op("Div", g.count_up(g.size("q", 1)), block)
    position_S = g.op("Div", g.count_up(g.size("index_k", 1)), block)
    return g.op("Greater", g.gather(g.gather(selected_BJQN, row_T, 2), position_S, 3), g.real(0.5))


def _pooled(g: Graph, x_BTHR: str, filled_B: str, block: str) -> str:
    """Mean of the rows below filled_B of every block, fp32 [B, blocks, H, R]; 0 where there is none."""
    rows = g.size(x_BTHR, 1)
    filled_BT = g.op("Less", g.count_up(rows), g.axes(filled_B, 1))
    # Rows that hold nothing may hold anything finite: weighted with zero, as they are part of no mean.
    weight_BT11 = g.axes(g.float32(filled_BT), 2, 3)
    x_BTHR = g.op("Mul", x_BTHR, weight_BT11)
    rest = g.op("Mod", g.op("Sub", g.integers(0), rows), g.axes(block, 0))
    pads = g.concat(0, g.integers(0, 0, 0, 0, 0), rest, g.integers(0, 0))
    sums = []
    for x in (x_BTHR, weight_BT11):
        padded = g.op("Pad", x, pads, g.real(0.0))
        split = g.reshape(padded, 0, -1, g.axes(block, 0), g.size(x, 2), g.size(x, 3))
        sums.append(g.op("ReduceSum", split, g.integers(2), attributes={"keepdims": 0}))
    return g.op("Div", sums[0], g.op("Max", sums[1], g.real(1.0)))


def _candidates(g: Graph, queries: str, keys: str, filled_B: str, block: str) -> tuple[str, str]:
    """Bool [B, 1, Q, N]: blocks that start at or before the newest query of the row's block, and those that are always in."""
    length_B1 = g.axes(g.int64("lengths"), 1)
    start_BQ = g.op("Add", g.op("Mul", g.count_up(queries), block), length_B1)
    end_BQ = g.op("Min", g.op("Add", start_BQ, block), g.axes(filled_B, 1))
    last_BQ = g.op("Sub", end_BQ, g.integer(1))
    # Blocks beyond the chunk lie before position 0 at worst: floor and truncation differ there, and no row of them is read.
    newest, first = (g.axes(g.op("Div", x, block), 1, 3) for x in (last_BQ, start_BQ))
    block_N = g.count_up(keys)
    inside = g.axes(g.op("Less", start_BQ, end_BQ), 1, 3)
    candidate = g.op("And", g.not_less(newest, block_N), inside)
    sinks = g.op("Less", g.op("Mul", block_N, block), g.attribute("sinks", "int"))
    near = g.not_less(block_N, g.op("Sub", first, g.integer(1)))
    return candidate, g.op("And", candidate, g.op("Or", sinks, near))
