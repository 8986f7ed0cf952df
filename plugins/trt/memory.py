"""Device memory that TensorRT owns, seen as torch tensors."""

from typing import Any

import torch


class _Bytes:
    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "data": (address, False), "shape": (size,), "typestr": "|u1", "strides": None, "version": 3,
        }  # fmt: skip


def tensor_at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor over memory at `address`; it does not own the memory."""
    size = torch.Size(shape).numel() * dtype.itemsize
    device = torch.device("cuda", torch.cuda.current_device())
    if size == 0:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.as_tensor(_Bytes(address, size), device=device).view(dtype).view(shape)
