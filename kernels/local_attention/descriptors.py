"""Tensor descriptors with which Hopper's copy engine (TMA) loads tiles of queries, keys and values."""

# Triton's kernel language is not typed Python.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
import functools

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """TMA descriptor over [B, heads ..., rows, D] (x: [B, rows, heads ..., D]) with tiles of `rows` rows of one head."""
    x = x.movedim(1, -2)
    block = [1] * (x.dim() - 2) + [rows, x.shape[-1]]
    return TensorDescriptor(x, x.shape, x.stride(), block, _shared_layout(x.dtype, len(block), rows, x.shape[-1]))


@functools.cache
def _shared_layout(dtype: torch.dtype, rank: int, rows: int, D: int) -> gl.NVMMASharedLayout:
    """Layout in shared memory, computed once for each kind of tile."""
    block = [1] * (rank - 2) + [rows, D]
    return gl.NVMMASharedLayout.get_default_for(block, {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[dtype])
