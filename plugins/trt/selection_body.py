"""Histogram top-p in standard ONNX operators, integer for integer what kernels.block_selection.reference computes."""

# B batch  S cached tokens  J retrieval heads  R index dim  N blocks  L keys of a block
import numpy as np
from onnx import TensorProto, helper

from rtpurbo.kernels.block_selection.reference import BINS_PER_NAT, MASS_ONE, NUM_BINS
from rtpurbo.plugins.trt.graph import Graph


def select_blocks(g: Graph, rounded_q: str) -> tuple[str, str]:
    """ids int32 [B, J, N] (ascending, -1 beyond the count) and count int32 [B, J] from index_q, index_k and visible.

    rounded_q: index_q in bf16, which narrow keys are multiplied with.
    """
    max_BJN, sum_BJN = _block_scores(g, rounded_q)
    valid = g.op("Greater", sum_BJN, g.real(0.0))
    distance = g.op("Sub", g.reduce("Max", max_BJN, -1), max_BJN)
    mass = block_mass(g, distance, sum_BJN, valid)
    forced = _forced(g, valid)
    taken = bins_taken(g, distance, valid, mass, forced, "top_p_ppb")
    selected = g.op("And", valid, g.op("Or", forced, taken))
    size = g.size(selected, 2)
    block_N = g.count_up(size)
    ids = g.op("Where", selected, block_N, size)
    ids = g.ops("TopK", [ids, size], 2, {"axis": -1, "largest": 0, "sorted": 1})[0]
    ids = g.op("Where", g.op("Less", ids, size), ids, g.integer(-1))
    count = g.op("ReduceSum", g.int64(selected), g.integers(-1), attributes={"keepdims": 0})
    return g.cast(ids, TensorProto.INT32), g.cast(count, TensorProto.INT32)


def _block_scores(g: Graph, rounded_q: str) -> tuple[str, str]:
    """Maximum and sum of exponentials (relative to it) of each block's index logits, fp32 [B, J, N]; -inf and 0 without key."""
    narrow = g.op("Equal", g.attribute("narrow_keys", "int"), g.integer(1))
    q_BTJR = g.op("Where", narrow, g.float32(rounded_q), "index_q")
    q_BJ1R = g.axes(g.gather(q_BTJR, g.integer(0), 1), 2)
    k_BSJR = g.gather(g.float32("index_k"), g.attribute("key_sets", "ints"), 2)
    logits_BJS = g.op("Squeeze", g.op("MatMul", q_BJ1R, g.transpose(k_BSJR, 0, 2, 3, 1)), g.integers(2))
    logits_BJS = g.op("Mul", logits_BJS, g.attribute("scale", "float"))
    tokens, block = g.size("index_k", 1), g.attribute("block", "int")
    visible_B1S = g.op("Less", g.count_up(tokens), g.axes(g.int64("visible"), 1, 2))
    logits_BJS = g.op("Where", visible_B1S, logits_BJS, g.real(-np.inf))
    rest = g.op("Mod", g.op("Sub", g.integer(0), tokens), block)
    logits_BJS = g.op("Pad", logits_BJS, g.concat(0, g.integers(0, 0, 0, 0, 0), rest), g.real(-np.inf))
    logits_BJNL = g.reshape(logits_BJS, 0, 0, -1, g.axes(block, 0))
    max_BJN1 = g.reduce("Max", logits_BJNL, -1)
    reference = g.op("Where", g.op("IsInf", max_BJN1), g.real(0.0), max_BJN1)
    sum_BJN = g.op("ReduceSum", g.op("Exp", g.op("Sub", logits_BJNL, reference)), g.integers(-1), attributes={"keepdims": 0})
    return g.op("Squeeze", max_BJN1, g.integers(3)), sum_BJN


def block_mass(g: Graph, distance: str, sum_BJN: str, valid: str) -> str:
    """round(2^32 l_b exp(m_b - M)) as int64, in fp64; 0 for blocks without key."""
    relative = g.op("Exp", g.cast(g.op("Neg", distance), TensorProto.DOUBLE))
    mass = g.op("Mul", g.op("Mul", relative, g.cast(sum_BJN, TensorProto.DOUBLE)), g.constant(MASS_ONE, np.float64))
    return g.int64(g.op("Where", valid, g.op("Round", mass), g.constant(0.0, np.float64)))


def _forced(g: Graph, valid: str) -> str:
    """The sinks' blocks and the newest two."""
    sinks, block = g.attribute("sinks", "int"), g.attribute("block", "int")
    block_N = g.count_up(g.size(valid, 2))
    holds_sinks = g.op("Less", g.op("Mul", block_N, block), sinks)
    newest = g.not_less(block_N, g.op("Sub", g.reduce("Sum", g.int64(valid), -1), g.integer(2)))
    return g.op("And", valid, g.op("Or", holds_sinks, newest))


def bins_taken(g: Graph, distance: str, valid: str, mass: str, forced: str, share: str) -> str:
    """Blocks [B, J, N] whose whole bin is taken: the forced mass and all bins before it stay below a share of the total.

    share: the attribute that says it, in billionths.
    """
    bins = g.op("Min", g.op("Mul", distance, g.real(BINS_PER_NAT)), g.real(NUM_BINS - 1))
    bins = g.int64(g.op("Floor", g.op("Where", valid, bins, g.real(NUM_BINS - 1))))
    free = g.op("Where", forced, g.integer(0), mass)
    zero = helper.make_tensor("zero", TensorProto.INT64, [1], [0])
    shape = g.concat(0, g.size(mass, 0), g.size(mass, 1), g.integers(NUM_BINS))
    histogram = g.op("ConstantOfShape", shape, attributes={"value": zero})
    histogram = g.op("ScatterElements", histogram, bins, free, attributes={"axis": 2, "reduction": "add"})
    before = g.op("CumSum", histogram, g.integer(2), attributes={"exclusive": 1})
    before = g.op("Add", before, g.reduce("Sum", g.op("Where", forced, mass, g.integer(0)), -1))
    top_p = g.op("Div", g.cast(g.attribute(share, "int"), TensorProto.DOUBLE), g.constant(1e9, np.float64))
    needed = g.op("Mul", g.cast(g.reduce("Sum", mass, -1), TensorProto.DOUBLE), top_p)
    taken = g.cast(g.op("Less", before, g.int64(g.op("Ceil", needed))), TensorProto.INT32)
    return g.cast(g.op("GatherElements", taken, bins, attributes={"axis": 2}), TensorProto.BOOL)
