"""Runs an exported model by its function bodies in ONNX Runtime on a CPU: slow, and independent of the kernels and of PyTorch."""

# B batch  V vocabulary
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from rtpurbo.plugins.trt.export import Export
from rtpurbo.plugins.trt.nodes import DECODE, PREFILL

# The width of a cache's numbers; its zeros are zero bytes in every dtype.
_STORAGE: dict[int, Any] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.BFLOAT16: np.uint16,
    TensorProto.FLOAT8E4M3FN: np.uint8,
}
# What rows of padding hold; it must not matter.
_PADDING = 7


class OnnxEngine:
    """A batch of sequences of at most `capacity` tokens, with its caches on the host.

    export: a float32 or float16 export of the artifact in `folder`; index keys may be narrower. Raises ValueError for other dtypes of
    caches: on a CPU, ONNX Runtime stores narrower numbers but computes nothing in them.
    """

    def __init__(self, export: Export, folder: Path, batch: int, capacity: int, threads: int = 1) -> None:
        import onnxruntime

        known, self.caches = {"batch": batch, "capacity": capacity}, {}
        for port in export.model.graph.input:
            if port.name in export.caches:
                tensor = port.type.tensor_type
                wide = tensor.elem_type in (TensorProto.FLOAT, TensorProto.FLOAT16)
                if not wide and not port.name.endswith("index_cache"):
                    raise ValueError(
                        f"{port.name} is {helper.tensor_dtype_to_string(int(tensor.elem_type))}, wanted TensorProto.FLOAT or FLOAT16"
                    )
                zeros = np.zeros([known[d.dim_param] if d.dim_param else d.dim_value for d in tensor.shape.dim], _STORAGE[tensor.elem_type])
                self.caches[port.name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(zeros, tensor.elem_type)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        self._session = onnxruntime.InferenceSession(export.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._export, self.lengths = export, np.zeros(batch, np.int32)
        self.phased = any(port.name == "phase" for port in export.model.graph.input)

    def step(self, rows: Sequence[Sequence[int]], phase: int) -> np.ndarray:
        """Append each row's tokens (possibly none) in the pattern of nodes.PREFILL or DECODE; logits [B, V] after each row's last."""
        width = max(map(len, rows))
        ids = np.array([[*row, *[_PADDING] * (width - len(row))] for row in rows], np.int32)
        counts = np.array([len(row) for row in rows], np.int32)
        feeds = {"input_ids": ids, "lengths": self.lengths, "counts": counts}
        if self.phased:
            feeds["phase"] = np.zeros(phase, np.int32)
        values = {name: self._value(array) for name, array in feeds.items()} | self.caches
        logits, *new = self._session.run_with_ort_values(["logits", *self._export.caches.values()], values)
        self.caches = dict(zip(self._export.caches, new, strict=True))
        self.lengths = self.lengths + counts
        return logits.numpy()

    def prefill(self, rows: Sequence[Sequence[int]], chunk: int) -> np.ndarray:
        """All rows, `chunk` tokens at a time; logits [B, V] after each row's last token."""
        last = [np.zeros(0, np.float32)] * len(rows)
        for begin in range(0, max(map(len, rows)), chunk):
            logits = self.step([row[begin : begin + chunk] for row in rows], PREFILL)
            for b, row in enumerate(rows):
                if begin < len(row) <= begin + chunk:
                    last[b] = logits[b]
        return np.stack(last)

    def decode(self, tokens: Sequence[int]) -> np.ndarray:
        """One more token for every row; logits [B, V]."""
        return self.step([[token] for token in tokens], DECODE)
