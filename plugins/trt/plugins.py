"""The custom nodes as IPluginV3: shapes and workspace at build, the kernels' cubins on the engine's stream at run time."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from rtpurbo.kernels.driver import PreparedLaunch
from rtpurbo.kernels.launch import Launch
from rtpurbo.plugins.trt.cubins import CAPABILITIES, CubinTable
from rtpurbo.plugins.trt.memory import tensor_at
from rtpurbo.plugins.trt.nodes import CARRIER_NAME, DOMAIN, NODES, SIZED_BY, VERSION, Node, parse_rule
from rtpurbo.plugins.trt.operators import OPERATORS, Scratch, launches, port_shapes, probes
from rtpurbo.plugins.trt.products import Product
from rtpurbo.plugins.trt.site import Site, Work

# A prepared execution holds addresses; more sets of them than this mean that addresses change all the time.
MAX_PREPARED = 64
# What a plugin stores of itself, and the carrier node's own attribute.
RULE = "update_rule"


@dataclass(kw_only=True)
class Session:
    """What the plugins of one build or one engine share.

    table: the engine's cubins; None while building. capabilities: the GPUs it is built for. seen: of every node at build (name,
    attributes, largest size of each axis, dtypes of the inputs, of the outputs). failures: exceptions from inside TensorRT's calls,
    which can only say that something failed.
    """

    table: CubinTable | None = None
    capabilities: tuple[int, ...] = CAPABILITIES
    seen: dict[str, tuple[str, dict[str, Any], dict[str, int], list[torch.dtype], list[torch.dtype]]] = field(default_factory=dict)
    failures: list[BaseException] = field(default_factory=list)

    def launches(self, capability: int) -> Iterator[Launch]:
        """Every kind of launch that an execution of the seen nodes can make on a GPU of this capability."""
        for name, attributes, largest, inputs, outputs in self.seen.values():
            for sizes in probes(NODES[name], largest):
                shapes = port_shapes(NODES[name], attributes, sizes)
                ports = [list(zip(found, dtypes, strict=True)) for found, dtypes in zip(shapes, (inputs, outputs), strict=True)]
                works = launches(name, attributes, ports[0], ports[1], capability)[0]
                yield from (work for work in works if isinstance(work, Launch))


@contextmanager
def registered(trt: Any, session: Session) -> Iterator[None]:
    """While entered, plugins that TensorRT makes belong to the session: for parsing, building, loading and making contexts."""
    creators = _creators(trt)
    before = [creator.session for creator in creators]
    for creator in creators:
        creator.session = session
    try:
        yield
    finally:
        for creator, session_before in zip(creators, before, strict=True):
            creator.session = session_before


@cache
def _creators(trt: Any) -> list[Any]:
    """Creators of all nodes in TensorRT's registry, which is one for the process and keeps pointers to them: they stay for good."""
    registry, kind = trt.get_plugin_registry(), _creator_class(trt)
    creators = [kind(trt, None), *(kind(trt, node) for node in NODES.values())]
    for creator in creators:
        registry.register_creator(creator, creator.plugin_namespace)
    return creators


def _creator_class(trt: Any) -> type:
    class Creator(trt.IPluginCreatorV3One):
        """Makes plugins of one node of our domain, or of every node behind the carrier's name (node None)."""

        def __init__(self, trt: Any, node: Node | None) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.session: Session | None = None
            self._node = node
            self.name = CARRIER_NAME if node is None else node.name
            self.plugin_namespace, self.plugin_version = ("", "1") if node is None else (DOMAIN, str(VERSION))
            empty = np.array([])
            kinds = {"int": trt.PluginFieldType.INT32, "ints": trt.PluginFieldType.INT32, "float": trt.PluginFieldType.FLOAT32}
            fields = [trt.PluginField(RULE, empty, trt.PluginFieldType.CHAR)]
            fields += [trt.PluginField(name, empty, kinds[kind]) for name, kind in (node.attributes if node else {}).items()]
            self.field_names = trt.PluginFieldCollection(fields)

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            """From the node's attributes at build, from the stored rule at run time."""
            session = self.session
            assert session is not None, "a plugin is made outside of `registered`"
            try:
                found = {entry.name: np.array(entry.data) for entry in fields}
                if RULE in found and found[RULE].size:
                    rule = bytes(found[RULE].astype(np.int8).tobytes()).rstrip(b"\0").decode()
                else:
                    assert self._node is not None
                    rule = _rule(self._node, found)
                return _plugin_class(trt)(name, rule, session, self._node is None)
            except Exception as error:
                session.failures.append(error)
                return None

    return Creator


def _rule(node: Node, fields: dict[str, np.ndarray]) -> str:
    import json

    read = {"int": lambda x: int(x.reshape(-1)[0]), "float": lambda x: float(x.reshape(-1)[0]), "ints": lambda x: x.reshape(-1).tolist()}
    attributes = {name: read[kind](fields[name]) for name, kind in node.attributes.items()}
    return f"{DOMAIN}::{node.name}{json.dumps(attributes)}"


class NodePlugin:
    """The library-independent part of a plugin: what TensorRT asks of a node, from plugins.trt.operators."""

    def __init__(self, layer: str, rule: str, session: Session) -> None:
        name, self.attributes = parse_rule(rule)
        self.layer, self.rule, self.session = layer, rule, session
        self.node, self.operator = NODES[name], OPERATORS[name]
        self.plans: dict[Any, Any] = {}
        self.prepared: dict[Any, list[PreparedLaunch | Product]] = {}

    def note(self, shapes: Sequence[tuple[int, ...]], inputs: list[torch.dtype], outputs: list[torch.dtype]) -> dict[str, int]:
        """Remember what the builder plans for; returns the largest size of each axis."""
        largest = {
            axis: size for port, shape in zip(self.node.inputs, shapes, strict=True) for axis, size in zip(port.axes, shape, strict=True)
        }
        if "T" not in largest and {"B", "M"} <= largest.keys():
            largest["T"] = largest["M"] // largest["B"]
        key = f"{self.rule} {largest} {inputs}"
        self.session.seen[key] = (self.node.name, self.attributes, largest, inputs, outputs)
        return largest

    def scratch(self, shapes: Sequence[tuple[int, ...]], inputs: list[torch.dtype], outputs: list[torch.dtype]) -> int:
        """Workspace in bytes that is enough for every execution up to these shapes."""
        largest, most = self.note(shapes, inputs, outputs), 0
        for sizes in probes(self.node, largest):
            found = port_shapes(self.node, self.attributes, sizes)
            ports = [list(zip(shape, dtypes, strict=True)) for shape, dtypes in zip(found, (inputs, outputs), strict=True)]
            for capability in self.session.capabilities:
                most = max(most, launches(self.node.name, self.attributes, ports[0], ports[1], capability)[1])
        return most

    def plan(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        """Tables and counters for these shapes, made once; the only memory of its own that a plugin has."""
        if shapes not in self.plans:
            self.plans[shapes] = self.operator.plan(self.attributes, shapes, self._site([]))
            # Their contents are copied on torch's stream; the engine has its own.
            torch.cuda.current_stream().synchronize()
        return self.plans[shapes]

    def _site(self, found: list[Work]) -> Site:
        device = torch.device("cuda", torch.cuda.current_device())
        assert self.session.table is not None
        return Site(device=device, capability=self.session.table.capability, run=found.append)

    def prepare(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor], workspace: int) -> list[PreparedLaunch | Product]:
        """The launches of one execution with these tensors and the workspace at an address, bound to the engine's cubins."""
        assert self.session.table is not None
        found: list[Work] = []
        plan = self.plan(tuple(tuple(x.shape) for x in inputs))
        with Scratch(workspace):
            self.operator.launch(self.attributes, plan, inputs, outputs, self._site(found))
        return [work if isinstance(work, Product) else self.session.table.prepare(work) for work in found]


@cache
def _plugin_class(trt: Any) -> type:
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime)
    dtypes = {
        trt.DataType.FLOAT: torch.float32, trt.DataType.HALF: torch.float16, trt.DataType.BF16: torch.bfloat16,
        trt.DataType.FP8: torch.float8_e4m3fn, trt.DataType.INT32: torch.int32,
    }  # fmt: skip
    fixed = {"float32": trt.DataType.FLOAT, "int32": trt.DataType.INT32}

    class Plugin(*bases):
        """TensorRT's interface around a NodePlugin."""

        def __init__(self, layer: str, rule: str, session: Session, carried: bool) -> None:
            for base in bases:
                base.__init__(self)
            # The library deletes its side of a plugin itself; Python must not free it once more, not at exit either.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
            self.part = NodePlugin(layer, rule, session)
            self.carried = carried
            self.plugin_name = CARRIER_NAME if carried else self.part.node.name
            self.plugin_namespace, self.plugin_version = ("", "1") if carried else (DOMAIN, str(VERSION))
            self.num_outputs = len(self.part.node.outputs)
            self.workspace_bytes = 0

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.part.layer, self.part.rule, self.part.session, self.carried)

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            # A field is a pointer into the array, which must live until TensorRT has copied it.
            self._stored = np.frombuffer(self.part.rule.encode(), np.int8).copy()
            self._fields = trt.PluginFieldCollection([trt.PluginField(RULE, self._stored, trt.PluginFieldType.CHAR)])
            return self._fields

        def get_aliased_input(self, output: int) -> int:
            return self.part.node.aliased_input(output)

        def get_output_data_types(self, types: Any) -> Any:
            by_kind = {port.dtype: found for port, found in zip(self.part.node.inputs, types, strict=True)}
            return [fixed.get(port.dtype) or by_kind[port.dtype] for port in self.part.node.outputs]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> Any:
            node = self.part.node
            axes = {axis: dims[i] for port, dims in zip(node.inputs, inputs, strict=True) for i, axis in enumerate(port.axes)}
            if "block" in self.part.attributes:
                block = builder.constant(self.part.attributes["block"])
                axes["N"] = builder.operation(trt.DimensionOperation.CEIL_DIV, axes["S"], block)
            for attribute, axis in SIZED_BY.items():
                if attribute in self.part.attributes:
                    axes[axis] = builder.constant(self.part.attributes[attribute])
            if "F" not in axes and "G" in axes:
                axes["F"] = builder.operation(trt.DimensionOperation.FLOOR_DIV, axes["G"], builder.constant(2))
            if any("A" in port.axes for port in node.outputs):
                axes["A"] = builder.operation(trt.DimensionOperation.PROD, axes["H"], axes["D"])
            return [trt.DimsExprs([axes[axis] for axis in port.axes]) for port in node.outputs]

        def supports_format_combination(self, position: int, described: Any, num_inputs: int) -> bool:
            ports = (*self.part.node.inputs, *self.part.node.outputs)
            kind = ports[position].dtype
            first = next(i for i, port in enumerate(ports) if port.dtype == kind)
            found = described[position].desc
            return found.format == trt.TensorFormat.LINEAR and found.type == fixed.get(kind, described[first].desc.type)

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            pass

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            if self.part.session.table is not None:
                self._guarded(lambda: self.part.plan(tuple(tuple(entry.dims) for entry in inputs)), None)

        def set_tactic(self, tactic: int) -> None:
            pass

        def get_valid_tactics(self) -> list[int]:
            return []

        def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
            shapes = [tuple(entry.max) for entry in inputs]
            kinds = [[dtypes[entry.desc.type] for entry in entries] for entries in (inputs, outputs)]
            return self._guarded(lambda: self.part.scratch(shapes, kinds[0], kinds[1]), 0)

        def enqueue(self, input_desc: Any, output_desc: Any, inputs: Any, outputs: Any, workspace: Any, stream: int) -> int:
            return self._guarded(lambda: self._run(input_desc, output_desc, inputs, outputs, workspace, stream), 1)

        def _run(self, input_desc: Any, output_desc: Any, inputs: Any, outputs: Any, workspace: Any, stream: int) -> int:
            shapes = tuple(tuple(entry.dims) for entry in input_desc)
            key = (shapes, tuple(inputs), tuple(outputs), workspace)
            prepared = self.part.prepared.get(key)
            if prepared is None:
                views = [
                    [tensor_at(int(address), tuple(x.dims), dtypes[x.type]) for address, x in zip(addresses, described, strict=True)]
                    for addresses, described in ((inputs, input_desc), (outputs, output_desc))
                ]
                if len(self.part.prepared) >= MAX_PREPARED:
                    self.part.prepared.clear()
                prepared = self.part.prepare(views[0], views[1], int(workspace or 0))
                self.part.prepared[key] = prepared
            for launch in prepared:
                launch.run(stream)
            return 0

        def _guarded(self, call: Any, otherwise: Any) -> Any:
            try:
                return call()
            except Exception as error:
                self.part.session.failures.append(error)
                return otherwise

    return Plugin
