"""Runs an exported ONNX model in ONNX Runtime by its function bodies: chunked prefill and decode of right-padded rows."""

from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto

from rtpurbo.plugins.trt.export import Export
from rtpurbo.plugins.trt.nodes import DECODE, PREFILL

NUMPY = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.INT32: np.int32}


class OnnxEngine:
    """A batch of sequences. Caches start as zeros and rows of padding hold a token that must not matter."""

    def __init__(self, export: Export, folder: Path, batch: int, capacity: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        self.session = onnxruntime.InferenceSession(export.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.export, self.lengths = export, np.zeros(batch, np.int32)
        known = {"batch": batch, "capacity": capacity}
        self.caches = {}
        for port in export.model.graph.input:
            if port.name in export.caches:
                shape = [known[d.dim_param] if d.dim_param else d.dim_value for d in port.type.tensor_type.shape.dim]
                self.caches[port.name] = np.zeros(shape, NUMPY[port.type.tensor_type.elem_type])
        self.phased = any(port.name == "phase" for port in export.model.graph.input)

    def step(self, rows: list[list[int]], phase: int) -> np.ndarray:
        """Append each row's tokens (possibly none); logits [B, V] after each row's last one."""
        width = max(map(len, rows))
        ids = np.array([row + [7] * (width - len(row)) for row in rows], np.int32)
        counts = np.array([len(row) for row in rows], np.int32)
        feeds = {"input_ids": ids, "lengths": self.lengths, "counts": counts, **self.caches}
        if self.phased:
            feeds["phase"] = np.zeros(phase, np.int32)
        names = list(self.export.caches.values())
        logits, *values = self.session.run(["logits", *names], feeds)
        self.caches = dict(zip(self.export.caches, values, strict=True))
        self.lengths = self.lengths + counts
        return logits

    def prefill(self, rows: list[list[int]], chunk: int) -> np.ndarray:
        """All rows in chunks; logits [B, V] after each row's last token."""
        last = [np.zeros(0, np.float32)] * len(rows)
        for begin in range(0, max(map(len, rows)), chunk):
            parts = [row[begin : begin + chunk] for row in rows]
            logits = self.step(parts, PREFILL)
            for b, row in enumerate(rows):
                if begin < len(row) <= begin + chunk:
                    last[b] = logits[b]
        return np.stack(last)

    def decode(self, tokens: list[int]) -> np.ndarray:
        """One more token for every row; logits [B, V]."""
        return self.step([[token] for token in tokens], DECODE)
