"""The key/value cache: a ring for local KV groups, keys by position for retained ones, index keys beside them."""

# B batch  T chunk tokens  S cached tokens  W ring slots (sinks + window)  K kv heads  D head dim  I index-key sets  R index dim
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from rtpurbo.manifests.manifest import Manifest
from rtpurbo.runtime.layout import LayerLayout


@dataclass(kw_only=True)
class LayerCache:
    """One layer's tensors; None where the layer has no such group.

    ring_k_BWKD, ring_v_BWKD: local groups, W = sinks + window (see kernels.local_attention.ring_positions).
    k_BSKD, v_BSKD: retained groups by position, S = capacity. index_k_BSIR: index keys of the retrieval heads, [B, I, S, R] in memory.
    """

    ring_k_BWKD: torch.Tensor | None = None
    ring_v_BWKD: torch.Tensor | None = None
    k_BSKD: torch.Tensor | None = None
    v_BSKD: torch.Tensor | None = None
    index_k_BSIR: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """The tensors that exist."""
        return [t for t in vars(self).values() if t is not None]


@dataclass(frozen=True, kw_only=True)
class CacheView:
    """The slots that one forward pass works on: views of a Cache's tensors, changed through it."""

    layers: tuple[LayerCache, ...]
    lengths_B: torch.Tensor
    dense: bool


class Cache:
    """Keys and values of a batch of sequences, each in a slot of its own with its own length.

    dense: every KV group is kept by position and there are no index keys (prompts below `dense_below`, exactness checks).
    lengths_B: int32 on the device, tokens written per sequence; `lengths` mirrors it on the host, so that nothing has to wait
    for the device. Every slot has room for `capacity` tokens from the start: nothing is copied when a sequence grows, and addresses
    stay the same for a captured graph. Raises ValueError when batch or capacity is below 1 or the memory is not there.
    """

    def __init__(
        self,
        manifest: Manifest,
        layouts: tuple[LayerLayout, ...],
        *,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        dense: bool = False,
    ) -> None:
        if batch < 1 or capacity < 1:
            raise ValueError(f"a cache of {batch} sequences of {capacity} tokens: both must be at least 1")
        self.batch, self.capacity, self.dense = batch, capacity, dense
        shapes = [_shapes(manifest, layout, batch, capacity, dtype, dense) for layout in layouts]
        wanted = sum(prod(shape) * kind.itemsize for layer in shapes for shape, kind in layer.values())
        what = f"a cache for {batch} sequences of {capacity} tokens"
        require_memory(wanted, device, what)
        try:
            # Zeros, not empty: attention masks by weight, and an unwritten NaN would survive a weight of zero.
            self.layers = tuple(
                LayerCache(**{name: _zeros(name, shape, kind, device) for name, (shape, kind) in layer.items()}) for layer in shapes
            )
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ValueError(f"{what} needs {wanted / 2**30:.2f} GiB on {device}, which could not be allocated") from error
        self.lengths_B = torch.zeros(batch, dtype=torch.int32, device=device)
        self.lengths = [0] * batch

    def nbytes(self) -> int:
        """Bytes of all key, value and index-key tensors."""
        return sum(t.nbytes for layer in self.layers for t in layer.tensors())

    def check_room(self, counts: list[int]) -> None:
        """ValueError if a sequence would grow past the capacity."""
        for b, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
            if length + count > self.capacity:
                raise ValueError(
                    f"sequence {b} has {length} tokens in the cache and gets {count} more, but the capacity is {self.capacity}"
                )

    def view(self, slot: int | None = None) -> CacheView:
        """All slots, or a single one as a batch of 1."""
        if slot is None:
            return CacheView(layers=self.layers, lengths_B=self.lengths_B, dense=self.dense)
        only = slice(slot, slot + 1)
        layers = tuple(LayerCache(**{name: t if t is None else t[only] for name, t in vars(layer).items()}) for layer in self.layers)
        return CacheView(layers=layers, lengths_B=self.lengths_B[only], dense=self.dense)

    def clear(self, slot: int) -> None:
        """Forget a slot's sequence, so that another can take its place; the others stay as they are."""
        self.lengths[slot] = 0
        self.lengths_B[slot] = 0

    def clone(self, source: int, targets: list[int]) -> None:
        """Copy a slot's sequence into other slots, whatever these held: the tokens there are, not the whole capacity."""
        length = self.lengths[source]
        for target in targets:
            for layer in self.layers:
                for name, tensor in vars(layer).items():
                    if tensor is not None:
                        rows = slice(None) if name.startswith("ring") else slice(0, length)
                        tensor[target, rows].copy_(tensor[source, rows])
            self.lengths[target] = length
            self.lengths_B[target] = length

    def advance(self, counts: list[int]) -> None:
        """Count tokens as written on the host; the device's lengths are advanced by the pass that writes them."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]


def available_bytes(device: torch.device) -> int:
    """Free device memory, or the RAM that can be had without swapping (total RAM where the system does not say)."""
    if device.type == "cuda":
        # What torch has reserved and does not use can be had as well.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def require_memory(wanted: int, device: torch.device, what: str) -> None:
    """ValueError if `wanted` bytes exceed what `device` has available."""
    available = available_bytes(device)
    if wanted > available:
        raise ValueError(f"{what} needs {wanted / 2**30:.2f} GiB on {device}, but {available / 2**30:.2f} GiB are available")


def _zeros(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if name != "index_k_BSIR":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Set by set in memory: scoring reads whole sets, and one after the other they stream faster (benchmarks/decode.md).
    B, S, I, R = shape  # noqa: E741
    return torch.zeros(B, I, S, R, dtype=dtype, device=device).transpose(1, 2)


def _shapes(
    manifest: Manifest, layout: LayerLayout, batch: int, capacity: int, dtype: torch.dtype, dense: bool
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    head_dim = manifest.model.head_dim
    retained = layout.num_groups if dense else layout.num_retained
    local = layout.num_groups - retained
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if local:
        ring = (batch, manifest.sinks + manifest.sliding_window, local, head_dim)
        shapes |= {"ring_k_BWKD": (ring, dtype), "ring_v_BWKD": (ring, dtype)}
    if retained:
        full = (batch, capacity, retained, head_dim)
        shapes |= {"k_BSKD": (full, dtype), "v_BSKD": (full, dtype)}
        if not dense and manifest.top_p < 1:
            index = (batch, capacity, len(layout.key_groups), manifest.indexer.dim)
            shapes["index_k_BSIR"] = (index, getattr(torch, manifest.indexer.key_dtype))
    return shapes
