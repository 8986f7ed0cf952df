"""The caches of a batch as an engine wants them: one tensor per cache input, contiguous, beginning where TensorRT allows it."""

from math import prod

import torch

from rtpurbo.plugins.trt.folder import EngineInfo
from rtpurbo.runtime.cache import Cache, require_memory

# Rounded up to this, so that the part of every sequence in a cache by position begins at an address that TensorRT takes.
CAPACITY_STEP = 256
# TensorRT wants the memory of a binding to begin at a multiple of this many bytes.
ADDRESS_STEP = 256


class EngineCache(Cache):
    """Tensors by the name of the engine's input, zeros at first; and the inputs and outputs of a decode step, which keep their places."""

    def __init__(self, info: EngineInfo, batch: int, capacity: int, device: torch.device) -> None:
        """Raises ValueError when the memory is not there."""
        capacity = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
        shapes = {name: (batch, *(capacity if size is None else size for size in cache.shape)) for name, cache in info.caches.items()}
        self._capacity_axes = {name: cache.shape.index(None) if None in cache.shape else None for name, cache in info.caches.items()}
        dtypes = {name: getattr(torch, cache.dtype) for name, cache in info.caches.items()}
        wanted = sum(prod(shape) * dtypes[name].itemsize for name, shape in shapes.items())
        what = f"a cache for {batch} sequences of {capacity} tokens"
        require_memory(wanted, device, what)
        try:
            self.tensors = {name: torch.zeros(shape, dtype=dtypes[name], device=device) for name, shape in shapes.items()}
        except torch.OutOfMemoryError as error:
            raise ValueError(f"{what} needs {wanted / 2**30:.2f} GiB on {device}, which could not be allocated") from error
        self.batch, self.capacity, self.dense = batch, capacity, info.dense
        self.lengths_B = torch.zeros(batch, dtype=torch.int32, device=device)
        self.lengths = [0] * batch
        self.ids_B1 = torch.zeros(batch, 1, dtype=torch.int32, device=device)
        self.logits_BV = torch.zeros(batch, info.vocab_size, dtype=torch.float32, device=device)

    def nbytes(self) -> int:
        """Bytes of all caches."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def slot(self, slot: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """(caches of one sequence as a batch of 1, copies of those of them that begin where TensorRT does not allow it)."""
        only = {name: tensor[slot : slot + 1] for name, tensor in self.tensors.items()}
        return only, {name: tensor.clone() for name, tensor in only.items() if tensor.data_ptr() % ADDRESS_STEP}

    def clone(self, source: int, targets: list[int]) -> None:
        """Copy a slot's sequence into other slots, whatever these held."""
        for target in targets:
            for name, tensor in self.tensors.items():
                axis = self._capacity_axes[name]
                pair = [tensor[slot] if axis is None else tensor[slot].narrow(axis, 0, self.lengths[source]) for slot in (target, source)]
                pair[0].copy_(pair[1])
            self.lengths[target] = self.lengths[source]
            self.lengths_B[target] = self.lengths[source]
