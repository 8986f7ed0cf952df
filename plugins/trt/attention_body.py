"""What the attention nodes compute: norms, RoPE and index vectors in standard operators, then the bodies of the nodes for each role."""

# B batch  T chunk tokens  O heads of the fused projections  H query heads  D head dim  U D / 2  J retrieval heads  R index dim
from onnx import AttributeProto, helper

from rtpurbo.plugins.trt.graph import Graph
from rtpurbo.plugins.trt.nodes import DOMAIN, NODES, Node

_KINDS = {"int": AttributeProto.INT, "ints": AttributeProto.INTS, "float": AttributeProto.FLOAT}


def parts_of(name: str) -> list[str]:
    """The nodes whose bodies an attention node's body calls."""
    ports = {port.name for port in NODES[name].inputs}
    retained = ["Append", "SelectBlocks", _attends(NODES[name])] if "index_q" in ports else ["AppendKV", "AttendCausal"]
    return [*(retained if "k_cache" in ports else []), *(["AttendLocal"] if "ring_k" in ports else [])]


def _attends(node: Node) -> str:
    """The node by which a layer's retained groups attend to what they select."""
    return "AttendPooled" if "prefill_ppb" in node.attributes else "AttendRetained"


def attention(g: Graph, node: Node) -> tuple[str, ...]:
    """Outputs of an attention node, in the order of its ports."""
    ports = {port.name for port in node.inputs}
    dim = g.op("Mul", g.size("cos", 1), g.integers(2))
    batch = g.size("lengths", 0)
    rows = g.op("Div", g.size("qkv", 0), batch)
    x_BTOD = g.gather(g.reshape("qkv", batch, rows, -1, dim), g.attribute("order", "ints"), 2)
    heads, total = g.axes(g.attribute("heads", "int"), 0), g.size(x_BTOD, 2)
    groups = g.op("Div", g.op("Sub", total, heads), g.integers(2))
    values = g.op("Add", heads, groups)
    qk, v = g.float32(_heads(g, x_BTOD, g.integers(0), values)), _heads(g, x_BTOD, values, total)
    if "norms" in ports:
        qk = _normed(g, qk, heads, groups)
    turned = _rotated(g, qk, rows)
    retained = g.size("k_cache", 2) if "k_cache" in ports else g.integers(0)
    kept = g.op("Mul", retained, g.op("Div", heads, groups))
    outs, caches = [], []
    if "k_cache" in ports:
        kv = [_heads(g, turned, heads, g.op("Add", heads, retained)), _heads(g, v, g.integers(0), retained)]
        out, written = _retained(g, _heads(g, turned, g.integers(0), kept), kv, qk, heads, _attends(node) if "index_q" in ports else None)
        outs.append(out)
        caches += written
    if "ring_k" in ports:
        kv = [_heads(g, turned, g.op("Add", heads, retained), values), _heads(g, v, retained, groups)]
        inputs = [_heads(g, turned, kept, heads), *kv, "ring_k", "ring_v", "lengths", "counts"]
        out, *written = _call(g, "AttendLocal", inputs)
        outs.append(out)
        caches += written
    return g.reshape(g.concat(2, *outs), -1, g.op("Mul", heads, dim)), *caches


def _heads(g: Graph, x_BTHD: str, start: str, stop: str) -> str:
    return g.op("Slice", x_BTHD, start, stop, g.integers(2))


def _normed(g: Graph, qk: str, heads: str, groups: str) -> str:
    """qk / sqrt(mean of its squares + eps) * norms[0] for query heads, norms[1] for key heads."""
    mean = g.op("ReduceMean", g.op("Mul", qk, qk), g.integers(-1), attributes={"keepdims": 1})
    scaled = g.op("Div", qk, g.op("Sqrt", g.op("Add", mean, g.attribute("eps", "float"))))
    dim = g.size("norms", 1)
    rows = [g.op("Expand", g.gather("norms", g.integers(row), 0), g.concat(0, count, dim)) for row, count in enumerate((heads, groups))]
    return g.op("Mul", scaled, g.concat(0, *rows))


def _rotated(g: Graph, qk: str, rows: str) -> str:
    """Pairs (x_i, x_(i + D/2)) turned by the position's angle, rounded once."""
    position_BT = g.op("Add", g.axes(g.int64("lengths"), 1), g.count_up(rows))
    # Rows of padding may lie beyond the table.
    position_BT = g.op("Min", position_BT, g.op("Sub", g.size("cos", 0), g.integers(1)))
    cos, sin = (g.axes(g.float32(g.gather(table, position_BT, 0)), 2) for table in ("cos", "sin"))
    a, b = g.ops("Split", [qk], 2, {"axis": 3, "num_outputs": 2})
    first = g.op("Sub", g.op("Mul", a, cos), g.op("Mul", b, sin))
    second = g.op("Add", g.op("Mul", b, cos), g.op("Mul", a, sin))
    return g.op("CastLike", g.concat(3, first, second), "qkv")


def _retained(g: Graph, q: str, kv: list[str], qk: str, heads: str, attends: str | None) -> tuple[str, list[str]]:
    """Append and attend (attends: to what is selected, by that node): (out, new caches in the order of the ports)."""
    if attends is None:
        caches = _call(g, "AppendKV", ["k_cache", "v_cache", *kv, "lengths", "counts"])
        return _call(g, "AttendCausal", [q, *caches, "lengths", "counts", "visible"])[0], caches
    index_q = _indexed(g, qk, g.attribute("retrieval_heads", "ints"), "index_q")
    index_k = _indexed(g, qk, g.op("Add", g.attribute("key_groups", "ints"), heads), "index_k")
    # Set by set in the cache, token by token in the bodies. The conversion comes first: it is a standard operator that takes 8-bit floats.
    rows = [*kv, g.op("CastLike", index_k, "index_cache")]
    inputs = ["k_cache", "v_cache", g.transpose("index_cache", 0, 2, 1, 3), *rows, "lengths", "counts"]
    *caches, index_cache = _call(g, "Append", inputs)
    chosen = _call(g, "SelectBlocks", [index_q, index_cache, "visible", "phase"], scale="index_scale")
    inputs = [q, *caches, "lengths", "counts", "visible", *chosen, "phase"]
    inputs += [index_q, index_cache] if attends == "AttendPooled" else []
    return _call(g, attends, inputs)[0], [*caches, g.transpose(index_cache, 0, 2, 1, 3)]


def _indexed(g: Graph, qk: str, heads: str, weight_JRD: str) -> str:
    """Index vectors [B, T, J, R] in fp32 of these heads."""
    x_BJTD = g.transpose(g.gather(qk, heads, 2), 0, 2, 1, 3)
    return g.transpose(g.op("MatMul", x_BJTD, g.transpose(weight_JRD, 0, 2, 1)), 0, 2, 1, 3)


def _call(g: Graph, name: str, inputs: list[str], **renamed: str) -> list[str]:
    """A node of our domain whose attributes are this function's own, some under another name."""
    stem = g.name(name)
    outputs = [f"{stem}.{port.name}" for port in NODES[name].outputs]
    made = helper.make_node(name, inputs, outputs, name=stem, domain=DOMAIN)
    for attribute, kind in NODES[name].attributes.items():
        made.attribute.append(AttributeProto(name=attribute, type=_KINDS[kind], ref_attr_name=renamed.get(attribute, attribute)))
    g.nodes.append(made)
    return outputs
