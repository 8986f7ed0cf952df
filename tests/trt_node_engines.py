"""Engines of one custom node each: how the plugin tests build them (without a GPU) and run them (on one)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rtpurbo.plugins.trt.cubins import CubinTable, compile_cubins
from rtpurbo.plugins.trt.library import load_library
from rtpurbo.plugins.trt.nodes import CARRIER_DOMAIN, CARRIER_NAME, NODES, Port
from rtpurbo.plugins.trt.operators import port_shapes
from rtpurbo.plugins.trt.plugins import Session, registered

# Axes that are dynamic in these engines: smallest, typical and largest size.
DYNAMIC = {
    "B": (1, 2, 4), "T": (1, 128, 600), "S": (64, 4096, 8192), "P": (1, 1, 2), "M": (1, 128, 2400), "N": (1, 64, 128),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class NodeCase:
    """A node with its attributes, the sizes of its fixed axes and the engine's dtypes."""

    node: str
    attributes: dict[str, Any]
    sizes: dict[str, int]
    model: torch.dtype = torch.bfloat16
    index: torch.dtype = torch.bfloat16

    def dtype(self, port: Port) -> torch.dtype:
        return {"model": self.model, "index": self.index, "float32": torch.float32, "int32": torch.int32}[port.dtype]


def build(case: NodeCase, folder: Path, capabilities: tuple[int, ...]) -> Session:
    """Write engine.plan and cubins/ of a node behind its carrier into `folder`; the session shows what the builder asked."""
    from onnx import TensorProto, helper

    onnx_types = {
        torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16,
        torch.int32: TensorProto.INT32, torch.float8_e4m3fn: TensorProto.FLOAT8E4M3FN,
    }  # fmt: skip
    _, trt = load_library("tensorrt-rtx")
    node = NODES[case.node]

    def values(ports: tuple[Port, ...]) -> list[Any]:
        shapes = [[case.sizes.get(axis, axis) for axis in port.axes] for port in ports]
        return [helper.make_tensor_value_info(p.name, onnx_types[case.dtype(p)], s) for p, s in zip(ports, shapes, strict=True)]

    rule = f"rtpurbo::{case.node}{json.dumps(case.attributes)}"
    names = [[port.name for port in ports] for ports in (node.inputs, node.outputs)]
    carrier = helper.make_node(
        CARRIER_NAME, *names, domain=CARRIER_DOMAIN, name=case.node, q_num_heads=1, kv_num_heads=1, scale=1.0, update_rule=rule
    )
    graph = helper.make_graph([carrier], "one node", values(node.inputs), values(node.outputs))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CARRIER_DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session, log = Session(capabilities=capabilities), trt.Logger(trt.Logger.ERROR)
    with registered(trt, session):
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        assert parser.parse(model.SerializeToString()), ([parser.get_error(i).desc() for i in range(parser.num_errors)], session.failures)
        config = builder.create_builder_config()
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
        profile = builder.create_optimization_profile()
        for port in node.inputs:
            profile.set_shape(port.name, *([case.sizes.get(axis) or DYNAMIC[axis][i] for axis in port.axes] for i in range(3)))
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
    assert plan is not None, session.failures
    assert not session.failures, session.failures
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "engine.plan").write_bytes(bytes(plan))
    compile_cubins({capability: session.launches(capability) for capability in capabilities}, folder / "cubins")
    return session


class NodeEngine:
    """A built node on the GPU."""

    def __init__(self, case: NodeCase, folder: Path) -> None:
        _, self._trt = load_library("tensorrt-rtx")
        major, minor = torch.cuda.get_device_capability()
        self._case, self.session = case, Session(table=CubinTable(folder / "cubins", 10 * major + minor))
        self._log = self._trt.Logger(self._trt.Logger.ERROR)
        with registered(self._trt, self.session):
            self._runtime = self._trt.Runtime(self._log)
            self._engine = self._runtime.deserialize_cuda_engine((folder / "engine.plan").read_bytes())
            assert self._engine is not None, self.session.failures
            self._context = self._engine.create_execution_context()
        assert self._context is not None, self.session.failures
        self._stream = torch.cuda.Stream()

    def run(self, *inputs: torch.Tensor, graph: bool = False) -> list[torch.Tensor]:
        """Outputs, poisoned before; aliased ones are their input, changed in place. graph: run it as a captured CUDA graph."""
        node, context = NODES[self._case.node], self._context
        sizes: dict[str, int] = {}
        for port, x in zip(node.inputs, inputs, strict=True):
            sizes |= zip(port.axes, x.shape, strict=True)
            assert context.set_input_shape(port.name, tuple(x.shape)), (port.name, x.shape)
            context.set_tensor_address(port.name, x.data_ptr())
        shapes = port_shapes(node, self._case.attributes, sizes)[1]
        outputs = []
        for i, (port, shape) in enumerate(zip(node.outputs, shapes, strict=True)):
            source = node.aliased_input(i)
            poison = -1 if port.dtype == "int32" else float("nan")
            outputs.append(torch.full(shape, poison, device="cuda").to(self._case.dtype(port)) if source < 0 else inputs[source])
            context.set_tensor_address(port.name, outputs[i].data_ptr())
        torch.cuda.synchronize()
        if graph:
            # The first execution, outside the capture, makes tables and finds cubins; its effects on aliased inputs are undone.
            kept = [(inputs[source], inputs[source].clone()) for i in range(len(outputs)) if (source := node.aliased_input(i)) >= 0]
            self._execute()
            for x, before in kept:
                x.copy_(before)
            torch.cuda.synchronize()
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, stream=self._stream):
                self._execute(wait=False)
            captured.replay()
            torch.cuda.synchronize()
        else:
            self._execute()
        return outputs

    def _execute(self, *, wait: bool = True) -> None:
        done = self._context.execute_async_v3(self._stream.cuda_stream)
        assert done, self.session.failures
        if wait:
            self._stream.synchronize()
