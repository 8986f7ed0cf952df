"""What each node of the domain `rtpurbo` computes, as ONNX functions: correct everywhere, fast nowhere."""

# Legend and meaning of the nodes: plugins.trt.nodes.
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
from onnx import FunctionProto, TensorProto, helper

from rtpurbo.plugins.trt.attention_body import attention, parts_of
from rtpurbo.plugins.trt.graph import OPSET, Graph
from rtpurbo.plugins.trt.nodes import DECODE, DOMAIN, NODES, VERSION
from rtpurbo.plugins.trt.pooled_body import selected_keys
from rtpurbo.plugins.trt.selection_body import select_blocks


def function_of(name: str) -> FunctionProto:
    """The function body of a node."""
    node = NODES[name]
    graph = Graph()
    results = attention(graph, node) if name.startswith("Attention") else _BODIES[name](graph)
    for port, result in zip(node.outputs, results, strict=True):
        graph.nodes.append(helper.make_node("Identity", [result], [port.name]))
    return helper.make_function(
        DOMAIN,
        name,
        [port.name for port in node.inputs],
        [port.name for port in node.outputs],
        graph.nodes,
        [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        [*node.attributes, "plugin_namespace", "plugin_version"],
    )


def functions(names: Iterable[str]) -> list[FunctionProto]:
    """The bodies of these nodes and of those that they call, each once."""
    used = set(names)
    used |= {part for name in used if name.startswith("Attention") for part in parts_of(name)}
    return [function_of(name) for name in NODES if name in used]


def _linear(g: Graph, *, bias: bool = False, x: str = "x") -> tuple[str, ...]:
    return (g.op("Gemm", x, "weight", *(["bias"] if bias else []), attributes={"transB": 1}),)


def _norm_linear(g: Graph, *, bias: bool = False) -> tuple[str, ...]:
    total = g.op("Add", "x", "residual")
    y, normed = _first_norm_linear(g, bias=bias, x=total)
    return y, total, normed


def _first_norm_linear(g: Graph, *, bias: bool = False, x: str = "x") -> tuple[str, ...]:
    wide = g.float32(x)
    mean = g.op("ReduceMean", g.op("Mul", wide, wide), g.integers(-1), attributes={"keepdims": 1})
    scaled = g.op("Div", wide, g.op("Sqrt", g.op("Add", mean, g.attribute("eps", "float"))))
    normed = g.op("CastLike", g.op("Mul", scaled, g.float32("norm")), "x")
    return *_linear(g, bias=bias, x=normed), normed


def _gated_silu(g: Graph) -> tuple[str, ...]:
    gate, up = g.ops("Split", [g.float32("gate_up")], 2, {"axis": 1, "num_outputs": 2})
    return (g.op("CastLike", g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up), "gate_up"),)


def _attend_local(g: Graph) -> tuple[str, ...]:
    length_B1 = g.axes(g.int64("lengths"), 1)
    query_BT, valid_BT = _chunk(g, "q")
    window, sinks = g.attribute("window", "int"), g.attribute("sinks", "int")
    ring_BW = _ring_positions(g, length_B1, window, sinks)
    key_BS = g.concat(1, ring_BW, g.op("Where", valid_BT, query_BT, g.integer(-1)))
    visible_BTS = _window_mask(g, query_BT, key_BS, window, sinks)
    out = _attend(g, "q", g.concat(1, "ring_k", "k"), g.concat(1, "ring_v", "v"), g.axes(visible_BTS, 1, 2))
    # Of a chunk that wraps the ring only the newest `window` tokens (and the sinks) are kept, so no slot is written twice.
    oldest_B1 = g.op("Sub", g.op("Add", length_B1, g.axes(g.int64("counts"), 1)), window)
    kept_BT = g.op("Or", g.op("Less", query_BT, sinks), g.not_less(query_BT, oldest_B1))
    slot_BT = g.op("Add", sinks, g.op("Mod", g.op("Sub", query_BT, sinks), window))
    slot_BT = g.op("Where", g.op("Less", query_BT, sinks), query_BT, slot_BT)
    rings = _write(g, g.op("And", valid_BT, kept_BT), slot_BT, {"ring_k": "k", "ring_v": "v"})
    return out, *rings


def _append(g: Graph) -> tuple[str, ...]:
    query_BT, valid_BT = _chunk(g, "k")
    # ONNX gathers and scatters nothing in 8-bit floats; through float32 every dtype comes back as it was.
    index = {g.float32("index_cache"): g.float32("index_k")}
    *caches, index_cache = _write(g, valid_BT, query_BT, {"k_cache": "k", "v_cache": "v", **index})
    return *caches, g.op("CastLike", index_cache, "index_cache")


def _append_kv(g: Graph) -> tuple[str, ...]:
    query_BT, valid_BT = _chunk(g, "k")
    return _write(g, valid_BT, query_BT, {"k_cache": "k", "v_cache": "v"})


def _attend_causal(g: Graph) -> tuple[str, ...]:
    query_BT, _ = _chunk(g, "q")
    return (_attend_by_role(g, _causal(g, query_BT), query_BT),)


def _attend_retained(g: Graph, *, pooled: bool = False) -> tuple[str, ...]:
    query_BT, _ = _chunk(g, "q")
    causal_B11TS = _causal(g, query_BT)
    decode, prefill = Graph("decode_"), Graph("prefill_")
    selected_BKG1S = _selected(decode)
    if pooled:
        mask_BJTS = prefill.float32(selected_keys(prefill))
        mask_BKGTS = prefill.cast(prefill.gather(mask_BJTS, _row_of_head(prefill, prefill.size("ids", 1)), 1), TensorProto.BOOL)
        everything = prefill.op("And", mask_BKGTS, causal_B11TS)
    else:
        everything = prefill.op("Identity", causal_B11TS)
    branches = {
        "then_branch": helper.make_graph(decode.nodes, "decode", [], [helper.make_empty_tensor_value_info(selected_BKG1S)]),
        "else_branch": helper.make_graph(prefill.nodes, "prefill", [], [helper.make_empty_tensor_value_info(everything)]),
    }
    retrieval_BKGTS = g.op("If", is_decode(g), attributes=branches)
    return (_attend_by_role(g, retrieval_BKGTS, query_BT),)


def _select_blocks(g: Graph) -> tuple[str, ...]:
    decode, prefill = Graph("decode_"), Graph("prefill_")
    # Outside of the branch that converts it back: ONNX Runtime drops a rounding with a conversion back right behind it.
    selected = select_blocks(decode, g.cast("index_q", TensorProto.BFLOAT16))
    shape = prefill.concat(0, prefill.size("index_q", 0), prefill.size("index_q", 2))
    nothing = helper.make_tensor("nothing", TensorProto.INT32, [1], [0])
    zeros = [
        prefill.op("ConstantOfShape", prefill.concat(0, shape, _num_blocks(prefill)), attributes={"value": nothing}),
        prefill.op("ConstantOfShape", shape, attributes={"value": nothing}),
    ]
    branches = {
        "then_branch": helper.make_graph(decode.nodes, "decode", [], [helper.make_empty_tensor_value_info(n) for n in selected]),
        "else_branch": helper.make_graph(prefill.nodes, "prefill", [], [helper.make_empty_tensor_value_info(n) for n in zeros]),
    }
    return tuple(g.ops("If", [is_decode(g)], 2, branches))


def _route(g: Graph) -> tuple[str, ...]:
    """Chosen by logit and not by probability, which may round two logits to one; TopK takes the lowest id among equals."""
    logits = g.float32("logits")
    ids = g.ops("TopK", [logits, g.axes(g.attribute("num_chosen", "int"), 0)], 2, {"axis": 1})[1]
    weights = g.op("GatherElements", g.op("Softmax", logits, attributes={"axis": 1}), ids, attributes={"axis": 1})
    normalize = g.op("Equal", g.attribute("normalize", "int"), g.integer(1))
    total = g.op("Where", normalize, g.reduce("Sum", weights, 1), g.real(1.0))
    return g.cast(ids, TensorProto.INT32), g.op("CastLike", g.op("Div", weights, total), "logits")


def _experts(g: Graph) -> tuple[str, ...]:
    """Every expert for every row, then the weighted sum."""
    h_EMG = g.op("MatMul", g.axes("x", 0), g.transpose("gate_up", 0, 2, 1))
    gate_EMF, up_EMF = g.ops("Split", [h_EMG], 2, {"axis": 2, "num_outputs": 2})
    act_EMF = g.op("Mul", g.op("Mul", gate_EMF, g.op("Sigmoid", gate_EMF)), up_EMF)
    y_EMC = g.float32(g.op("MatMul", act_EMF, g.transpose("down", 0, 2, 1)))
    shape = g.concat(0, g.size("x", 0), g.size("gate_up", 0))
    none_ME = g.op("ConstantOfShape", shape)
    weight_ME = g.op("ScatterElements", none_ME, g.int64("ids"), g.float32("weights"), attributes={"axis": 1, "reduction": "add"})
    weight_EM1 = g.axes(g.transpose(weight_ME, 1, 0), 2)
    y_MC = g.op("ReduceSum", g.op("Mul", y_EMC, weight_EM1), g.integers(0), attributes={"keepdims": 0})
    return (g.op("CastLike", y_MC, "x"),)


_BODIES: dict[str, Callable[[Graph], tuple[str, ...]]] = {
    "Linear": _linear,
    "LinearBias": partial(_linear, bias=True),
    "NormLinear": _norm_linear,
    "NormLinearBias": partial(_norm_linear, bias=True),
    "FirstNormLinear": _first_norm_linear,
    "FirstNormLinearBias": partial(_first_norm_linear, bias=True),
    "AttendLocal": _attend_local,
    "Append": _append,
    "AppendKV": _append_kv,
    "SelectBlocks": _select_blocks,
    "AttendRetained": _attend_retained,
    "AttendPooled": partial(_attend_retained, pooled=True),
    "AttendCausal": _attend_causal,
    "GatedSilu": _gated_silu,
    "Route": _route,
    "Experts": _experts,
}


def is_decode(g: Graph) -> str:
    """Whether the phase input says decode, a bool scalar."""
    return g.op("Equal", g.op("Squeeze", g.size("phase", 0), g.integers(0)), g.integer(DECODE))


def _chunk(g: Graph, rows: str) -> tuple[str, str]:
    """Position of every row of the chunk, int64 [B, T], and whether it is valid."""
    offset_T = g.count_up(g.size(rows, 1))
    position_BT = g.op("Add", g.axes(g.int64("lengths"), 1), offset_T)
    return position_BT, g.op("Less", offset_T, g.axes(g.int64("counts"), 1))


def _ring_positions(g: Graph, length_B1: str, window: str, sinks: str) -> str:
    """Position of the key in every ring slot, -1 where it is empty: kernels.local_attention.ring_positions."""
    slot_W = g.count_up(g.size("ring_k", 1))
    newest_B1 = g.op("Sub", g.op("Sub", length_B1, g.integer(1)), sinks)
    age_BW = g.op("Mod", g.op("Sub", newest_B1, g.op("Sub", slot_W, sinks)), window)
    ring_BW = g.op("Add", g.op("Sub", newest_B1, age_BW), sinks)
    is_sink_W = g.op("Less", slot_W, sinks)
    filled_BW = g.choose(is_sink_W, g.op("Less", slot_W, length_B1), g.not_less(ring_BW, sinks))
    return g.op("Where", filled_BW, g.op("Where", is_sink_W, slot_W, ring_BW), g.integer(-1))


def _window_mask(g: Graph, query_BT: str, key_BS: str, window: str, sinks: str) -> str:
    """Bool [B, T, S]: 0 <= j <= i and (i - j < window or j < sinks)."""
    i_BT1, j_B1S = g.axes(query_BT, 2), g.axes(key_BS, 1)
    near = g.op("Less", g.op("Sub", i_BT1, j_B1S), window)
    past = g.op("And", g.not_less(i_BT1, j_B1S), g.not_less(j_B1S, g.integer(0)))
    return g.op("And", past, g.op("Or", near, g.op("Less", j_B1S, sinks)))


def _causal(g: Graph, query_BT: str) -> str:
    """Bool [B, 1, 1, T, S] over the retained cache."""
    return g.axes(g.not_less(g.axes(query_BT, 2), g.count_up(g.size("k_cache", 1))), 1, 2)


def _selected(g: Graph) -> str:
    """Bool [B, K, G, 1, S]: visible positions in the blocks that each head of the retained groups selected (decode)."""
    block_N = g.count_up(g.size("ids", 2))
    listed_BJN = g.op("Less", block_N, g.axes(g.int64("count"), 2))
    # Places beyond the count may hold anything: they go to a block of their own behind the last.
    place_BJN = g.op("Where", listed_BJN, g.int64("ids"), g.size("ids", 2))
    wide = g.concat(0, g.size("ids", 0), g.size("ids", 1), g.op("Add", g.size("ids", 2), g.integers(1)))
    zero = helper.make_tensor("zero", TensorProto.INT32, [1], [0])
    mask_BJN = g.op("ConstantOfShape", wide, attributes={"value": zero})
    one_BJN = g.op("Expand", g.constant(1, np.int32), g.op("Shape", "ids"))
    mask_BJN = g.op("ScatterElements", mask_BJN, place_BJN, one_BJN, attributes={"axis": 2})
    position_S = g.count_up(g.size("k_cache", 1))
    mask_BJS = g.gather(mask_BJN, g.op("Div", position_S, g.attribute("block", "int")), 2)
    mask_BKGS = g.cast(g.gather(mask_BJS, _row_of_head(g, g.size("ids", 1)), 1), TensorProto.BOOL)
    stored_BS = g.op("Less", position_S, g.axes(g.int64("visible"), 1))
    return g.axes(g.op("And", mask_BKGS, g.axes(stored_BS, 1, 2)), 3)


def _row_of_head(g: Graph, rows: str) -> str:
    """Row of the masks of retrieval heads for each head of the retained groups [K, G]; heads that do not retrieve get some row, which
    _attend_by_role does not use."""
    first_K = g.op("CumSum", g.attribute("retrieval_counts", "ints"), g.integer(0), attributes={"exclusive": 1})
    row_KG = g.op("Add", g.axes(first_K, 1), _head_in_group(g))
    return g.op("Min", row_KG, g.op("Sub", rows, g.integers(1)))


def _head_in_group(g: Graph) -> str:
    """0 ... G-1 for the query heads of a retained group."""
    groups = g.op("Shape", g.attribute("retrieval_counts", "ints"))
    return g.count_up(g.op("Div", g.size("q", 2), groups))


def _attend_by_role(g: Graph, retrieval_BKGTS: str, query_BT: str) -> str:
    """Attention of the retained groups: retrieval heads by their own mask, the others within window + sinks."""
    counts_K = g.attribute("retrieval_counts", "ints")
    retrieves_KG11 = g.axes(g.op("Less", _head_in_group(g), g.axes(counts_K, 1)), 2, 3)
    key_1S = g.axes(g.count_up(g.size("k_cache", 1)), 0)
    local_BTS = _window_mask(g, query_BT, key_1S, g.attribute("window", "int"), g.attribute("sinks", "int"))
    visible = g.choose(retrieves_KG11, retrieval_BKGTS, g.axes(local_BTS, 1, 2))
    return _attend(g, "q", "k_cache", "v_cache", visible)


def _attend(g: Graph, q_BTHD: str, k_BSKD: str, v_BSKD: str, visible_BKGTS: str) -> str:
    """softmax(scale * q k^T) v over the visible keys in fp32, 0 for rows that see none; [B, T, H, D] in q's dtype."""
    batch, rows, groups, dim = g.size(q_BTHD, 0), g.size(q_BTHD, 1), g.size(k_BSKD, 2), g.size(q_BTHD, 3)
    q_BTKGD = g.reshape(g.float32(q_BTHD), batch, rows, groups, -1, dim)
    q_BKGTD = g.transpose(q_BTKGD, 0, 2, 3, 1, 4)
    k_BK1DS = g.axes(g.transpose(g.float32(k_BSKD), 0, 2, 3, 1), 2)
    v_BK1SD = g.axes(g.transpose(g.float32(v_BSKD), 0, 2, 1, 3), 2)
    logits = g.op("Mul", g.op("MatMul", q_BKGTD, k_BK1DS), g.attribute("scale", "float"))
    logits = g.op("Where", visible_BKGTS, logits, g.real(-np.inf))
    # A finite floor, so that a row without visible key gives exp(-inf) = 0 and not NaN.
    weights = g.op("Exp", g.op("Sub", logits, g.op("Max", g.reduce("Max", logits, -1), g.real(-1e38))))
    total = g.op("Max", g.reduce("Sum", weights, -1), g.real(1e-38))
    out_BKGTD = g.op("Div", g.op("MatMul", weights, v_BK1SD), total)
    out_BTHD = g.reshape(g.transpose(out_BKGTD, 0, 3, 1, 2, 4), batch, rows, -1, dim)
    return g.op("CastLike", out_BTHD, q_BTHD)


def _write(g: Graph, written_BT: str, place_BT: str, rows_of: dict[str, str]) -> tuple[str, ...]:
    """Each cache with the marked rows of its chunk at their places."""
    source_M2 = g.transpose(g.op("NonZero", written_BT), 1, 0)
    place_M1 = g.axes(g.op("GatherND", place_BT, source_M2), 1)
    target_M2 = g.concat(1, g.gather(source_M2, g.integers(0), 1), place_M1)
    return tuple(g.op("ScatterND", cache, target_M2, g.op("GatherND", rows, source_M2)) for cache, rows in rows_of.items())


def _num_blocks(g: Graph) -> str:
    """ceil(S / block) of the index keys, a vector of one element."""
    block = g.attribute("block", "int")
    return g.op("Div", g.op("Sub", g.op("Add", g.size("index_k", 1), block), g.integer(1)), block)
