"""Writes ONNX nodes one after the other: names, constants and the operators that export and function bodies use most."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

OPSET, IR_VERSION = 21, 10


class Graph:
    """A growing list of nodes; every method appends nodes and returns the name of the tensor they make."""

    def __init__(self, prefix: str = "") -> None:
        self.nodes: list[NodeProto] = []
        self._prefix = prefix
        self._constants: dict[Any, str] = {}

    def name(self, stem: str) -> str:
        """A tensor name that is not taken in this graph."""
        return f"{self._prefix}{stem.lower()}_{len(self.nodes)}"

    def op(self, kind: str, *inputs: str, attributes: Mapping[str, Any] | None = None) -> str:
        """One standard operator with one output."""
        return self.ops(kind, inputs, 1, attributes)[0]

    def ops(self, kind: str, inputs: Sequence[str], outputs: int, attributes: Mapping[str, Any] | None = None) -> list[str]:
        """One standard operator with several outputs."""
        stem = self.name(kind)
        names = [stem] if outputs == 1 else [f"{stem}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=stem, **(attributes or {})))
        return names

    def constant(self, value: Any, dtype: Any) -> str:
        """A constant scalar or array, one node per value."""
        array = np.asarray(value, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.op("Constant", attributes={"value": numpy_helper.from_array(array)})
        return self._constants[key]

    def integer(self, value: int) -> str:
        """An int64 scalar."""
        return self.constant(value, np.int64)

    def integers(self, *values: int) -> str:
        """An int64 vector."""
        return self.constant(values, np.int64)

    def real(self, value: float) -> str:
        """A float32 scalar."""
        return self.constant(value, np.float32)

    def attribute(self, name: str, kind: str) -> str:
        """The value of the function's own attribute: kind is int, ints (int64) or float (float32)."""
        key = ("attribute", name)
        if key not in self._constants:
            node = helper.make_node("Constant", [], [self.name("Constant")])
            field = {"int": "value_int", "ints": "value_ints", "float": "value_float"}[kind]
            types = {"int": AttributeProto.INT, "ints": AttributeProto.INTS, "float": AttributeProto.FLOAT}
            node.attribute.append(AttributeProto(name=field, type=types[kind], ref_attr_name=name))
            self.nodes.append(node)
            self._constants[key] = node.output[0]
        return self._constants[key]

    def cast(self, x: str, dtype: int) -> str:
        """x as a TensorProto dtype."""
        return self.op("Cast", x, attributes={"to": dtype})

    def int64(self, x: str) -> str:
        """x as int64."""
        return self.cast(x, TensorProto.INT64)

    def float32(self, x: str) -> str:
        """x as float32."""
        return self.cast(x, TensorProto.FLOAT)

    def size(self, x: str, axis: int) -> str:
        """The size of an axis of x, an int64 vector of one element."""
        return self.op("Shape", x, attributes={"start": axis, "end": axis + 1})

    def count_up(self, size: str) -> str:
        """0 ... size-1, for a `size` from `size()`."""
        return self.op("Range", self.integer(0), self.op("Squeeze", size, self.integers(0)), self.integer(1))

    def axes(self, x: str, *axes: int) -> str:
        """x with new axes of size 1 at these places of the result."""
        return self.op("Unsqueeze", x, self.integers(*axes))

    def reshape(self, x: str, *sizes: int | str) -> str:
        """x in another shape; sizes are numbers (0 copies, -1 infers) or one-element vectors."""
        if all(isinstance(size, int) for size in sizes):
            return self.op("Reshape", x, self.integers(*(int(size) for size in sizes)))
        parts = [self.integers(size) if isinstance(size, int) else size for size in sizes]
        return self.op("Reshape", x, self.op("Concat", *parts, attributes={"axis": 0}))

    def transpose(self, x: str, *order: int) -> str:
        """x with its axes in another order."""
        return self.op("Transpose", x, attributes={"perm": list(order)})

    def gather(self, x: str, index: str, axis: int) -> str:
        """Entries `index` along an axis."""
        return self.op("Gather", x, index, attributes={"axis": axis})

    def concat(self, axis: int, *parts: str) -> str:
        """The parts one after the other along an axis; a single part as it is."""
        if len(parts) == 1:
            return parts[0]
        return self.op("Concat", *parts, attributes={"axis": axis})

    def choose(self, condition: str, a: str, b: str) -> str:
        """Where for bool a and b, which ONNX Runtime's Where lacks."""
        return self.op("Or", self.op("And", condition, a), self.op("And", self.op("Not", condition), b))

    def not_less(self, a: str, b: str) -> str:
        """a >= b."""
        return self.op("GreaterOrEqual", a, b)

    def reduce(self, kind: str, x: str, axis: int) -> str:
        """ReduceSum or ReduceMax along an axis, which stays with size 1."""
        return self.op(f"Reduce{kind}", x, self.integers(axis), attributes={"keepdims": 1})
