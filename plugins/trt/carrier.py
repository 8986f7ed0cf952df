"""The same ONNX model for tensorrt-rtx 1.6.1, whose parser takes plugins only behind one node of its own.

That parser hands `com.microsoft::LinearAttention` to the creator registered as ("LinearAttention", "1", ""), with any number of inputs
and outputs and the string attribute update_rule unchanged. So every node `rtpurbo::Name` becomes such a node with
update_rule = 'rtpurbo::Name{"attribute":value,...}', and one creator dispatches on it.
"""

import json

import onnx
from onnx import helper

from rtpurbo.plugins.trt.nodes import CARRIER_DOMAIN, CARRIER_NAME, DOMAIN, NODES

# The parser wants these; nobody reads them.
_FILLER = {"q_num_heads": 1, "kv_num_heads": 1, "scale": 1.0}


def to_carrier(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every node of the domain `rtpurbo` renamed; inputs, outputs, weights and all other nodes stay as they are.

    The function bodies are left out: ONNX Runtime cannot run the result.
    """
    renamed = onnx.ModelProto()
    renamed.CopyFrom(model)
    del renamed.functions[:]
    for node in renamed.graph.node:
        if node.domain == DOMAIN:
            carrier = {**_FILLER, "update_rule": update_rule(node)}
            node.domain, node.op_type = CARRIER_DOMAIN, CARRIER_NAME
            del node.attribute[:]
            node.attribute.extend(helper.make_attribute(name, value) for name, value in carrier.items())
    opsets = [opset for opset in renamed.opset_import if opset.domain != DOMAIN]
    del renamed.opset_import[:]
    renamed.opset_import.extend([*opsets, helper.make_opsetid(CARRIER_DOMAIN, 1)])
    return renamed


def update_rule(node: onnx.NodeProto) -> str:
    """'rtpurbo::Name{...}' of a node: its attributes as JSON, without the two that only name the plugin."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name in NODES[node.op_type].attributes}
    return f"{DOMAIN}::{node.op_type}{json.dumps(attributes, sort_keys=True, separators=(',', ':'))}"
