"""The key/value cache: a ring for local KV groups, keys by position for retained ones, index keys beside them."""

# B batch  T chunk tokens  S cached tokens  W ring slots (sinks + window)  K kv heads  D head dim  I index-key sets  R index dim
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from rtpurbo.manifests.manifest import Manifest
from rtpurbo.runtime.layout import LayerLayout

FLOAT8_MAX = 448.0


@dataclass(kw_only=True)
class LayerCache:
    """One layer's tensors; None where the layer has no such group.

    ring_k_BWKD, ring_v_BWKD: local groups, W = sinks + window (see kernels.local_attention.ring_positions).
    k_BSKD, v_BSKD: retained groups by position, S = capacity. index_k_BSIR: index keys of the retrieval heads.
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
class Rows:
    """The valid rows of a right-padded chunk: row `row` of sequence `batch` has position `position` (three int64 vectors)."""

    batch: torch.Tensor
    row: torch.Tensor
    position: torch.Tensor


class Cache:
    """Keys and values of a batch of sequences, each with its own length.

    dense: every KV group is kept by position and there are no index keys (prompts below `dense_below`, exactness checks).
    lengths_B: int32 on the device, tokens written per sequence; `lengths` mirrors it on the host, so that nothing has to wait
    for the device. Raises ValueError when batch or capacity is below 1 or the memory is not there.
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
                LayerCache(**{name: torch.zeros(shape, dtype=kind, device=device) for name, (shape, kind) in layer.items()})
                for layer in shapes
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

    def rows(self, counts: list[int]) -> Rows:
        """The rows of a chunk whose first counts[b] tokens are valid, with the positions that they get."""
        batch = [b for b, count in enumerate(counts) for _ in range(count)]
        row = [t for count in counts for t in range(count)]
        position = [self.lengths[b] + t for b, t in zip(batch, row, strict=True)]
        batch_row_position = torch.tensor([batch, row, position], dtype=torch.int64).to(self.lengths_B.device)
        return Rows(batch=batch_row_position[0], row=batch_row_position[1], position=batch_row_position[2])

    def advance(self, counts: list[int]) -> None:
        """Count a chunk as written, after every layer has written it."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self.lengths_B += torch.tensor(counts, dtype=torch.int32).to(self.lengths_B.device)


def write_rows(cache_BSXY: torch.Tensor, chunk_BTXY: torch.Tensor, rows: Rows) -> None:
    """Write the chunk's valid rows at their positions, in place; values beyond the range of float8_e4m3fn saturate."""
    values = chunk_BTXY[rows.batch, rows.row]
    if cache_BSXY.dtype == torch.float8_e4m3fn:
        stored = values.float().clamp(-FLOAT8_MAX, FLOAT8_MAX).to(cache_BSXY.dtype)
        cache_BSXY.view(torch.uint8)[rows.batch, rows.position] = stored.view(torch.uint8)
    else:
        cache_BSXY[rows.batch, rows.position] = values.to(cache_BSXY.dtype)


def available_bytes(device: torch.device) -> int:
    """Free device memory, or the RAM that can be had without swapping (total RAM where the system does not say)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
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
