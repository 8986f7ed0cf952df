"""ONNX models of one custom node, for checks of function bodies and of plugins alone."""

from collections.abc import Mapping
from typing import Any

import onnx
from onnx import TensorProto, helper

from rtpurbo.plugins.trt.bodies import function_of
from rtpurbo.plugins.trt.graph import IR_VERSION, OPSET
from rtpurbo.plugins.trt.nodes import DOMAIN, NODES, VERSION

# Axes that change from call to call; all others are fixed when an engine is built.
DYNAMIC = {"B": "batch", "T": "chunk", "S": "capacity", "P": "phase", "M": "rows", "N": "blocks"}


def node_model(
    name: str,
    attributes: Mapping[str, Any],
    sizes: Mapping[str, Mapping[str, int]],
    *,
    dtype: int = TensorProto.FLOAT,
    index_dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A model that is the node alone, with the ports' names as inputs and outputs.

    sizes: port -> axis letter -> size, for the axes that are not dynamic; the entry "" holds those that all ports share.
    """
    node = NODES[name]
    kinds = {"model": dtype, "index": index_dtype, "float32": TensorProto.FLOAT, "int32": TensorProto.INT32}

    def value(port: Any) -> onnx.ValueInfoProto:
        known = {**DYNAMIC, **sizes[""], **sizes.get(port.name, {})}
        return helper.make_tensor_value_info(port.name, kinds[port.dtype], [known[axis] for axis in port.axes])

    inputs, outputs = [value(port) for port in node.inputs], [value(port) for port in node.outputs]
    made = helper.make_node(
        name,
        [port.name for port in node.inputs],
        [port.name for port in node.outputs],
        name=name,
        domain=DOMAIN,
        plugin_namespace=DOMAIN,
        plugin_version=str(VERSION),
        **attributes,
    )
    return helper.make_model(
        helper.make_graph([made], name, inputs, outputs),
        functions=[function_of(name)],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=IR_VERSION,
    )
