"""The carrier form for tensorrt-rtx 1.6.1 is the exported model with its custom nodes renamed, and nothing else."""

from pathlib import Path

import eager_model as eager
import onnx
import pytest
from onnx import helper

from rtpurbo.plugins.trt.carrier import to_carrier, update_rule
from rtpurbo.plugins.trt.export import export
from rtpurbo.plugins.trt.nodes import CARRIER_DOMAIN, CARRIER_NAME, DOMAIN, parse_rule


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    folder: Path = tmp_path_factory.mktemp("artifact")
    eager.save_artifact(folder, eager.tiny_config("qwen3_moe", layers=2), [[0, 5], [4, 5, 6, 7]])
    return export(folder).model


def test_only_the_custom_nodes_change_and_each_keeps_its_inputs_and_outputs(model: onnx.ModelProto) -> None:
    carrier = to_carrier(model)
    assert len(carrier.graph.node) == len(model.graph.node)
    renamed = 0
    for ours, theirs in zip(model.graph.node, carrier.graph.node, strict=True):
        assert (ours.input, ours.output, ours.name) == (theirs.input, theirs.output, theirs.name)
        if ours.domain == DOMAIN:
            renamed += 1
            assert (theirs.domain, theirs.op_type) == (CARRIER_DOMAIN, CARRIER_NAME)
        else:
            assert ours == theirs
    # Of each layer: products for q, k, v, o and the router, attention, routing and experts; lm_head.
    assert renamed == 2 * (5 + 1 + 1 + 1) + 1
    assert list(carrier.graph.input) == list(model.graph.input)
    assert list(carrier.graph.output) == list(model.graph.output)
    assert list(carrier.graph.initializer) == list(model.graph.initializer)
    assert not carrier.functions
    assert {opset.domain for opset in carrier.opset_import} == {"", CARRIER_DOMAIN}
    assert carrier.metadata_props == model.metadata_props


def test_the_rule_gives_back_the_nodes_name_and_attributes(model: onnx.ModelProto) -> None:
    seen = set()
    for node in model.graph.node:
        if node.domain == DOMAIN:
            name, attributes = parse_rule(update_rule(node))
            wanted = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            assert wanted.pop("plugin_namespace") == b"rtpurbo"
            assert wanted.pop("plugin_version") == b"1"
            assert (name, attributes) == (node.op_type, wanted)
            seen.add(name)
    # One layer keeps both of its groups, the other one of them.
    attention = {"AttentionNormSelected", "AttentionNormSelectedLocal"}
    assert seen == {"Linear", "FirstNormLinear", "NormLinear", *attention, "Route", "Experts"}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("delta", "update_rule is 'delta', wanted rtpurbo::Name"),
        ("rtpurbo::Nothing{}", "wanted rtpurbo::Name"),
        ('rtpurbo::AttendLocal{"window":4}', r"attributes \['window'\], wanted \['scale', 'sinks', 'window'\]"),
    ],
)
def test_a_rule_of_another_kind_is_refused(rule: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_rule(rule)
