"""write_cache: a chunk's keys, values and index keys into their caches, by position or into a ring, in one launch."""

# B batch  T chunk tokens  S slots of a cache  X, Y any further axes of a token's row
from collections.abc import Sequence

import torch

from rtpurbo.kernels.cache_write import reference

__all__ = ["write_cache"]

MAX_CACHES = 3


def write_cache(
    caches: Sequence[torch.Tensor],
    chunks: Sequence[torch.Tensor],
    *,
    lengths_B: torch.Tensor,
    counts_B: torch.Tensor,
    window: int | None = None,
    sinks: int = 0,
    impl: str = "auto",
) -> None:
    """Copy row t < counts[b] of every chunk to its slot of the cache, in place.

    Row t of sequence b has position p = lengths[b] + t. By position its slot is p. In a ring (window given) it is p for p < sinks
    and sinks + (p - sinks) mod window otherwise, and of the rows of one slot only the newest is written.

    Args:
        caches: 1 to 3 contiguous tensors [B, S, X, Y].
        chunks: for each of them the chunk [B, T, X, Y], contiguous, of the same dtype; a row is a multiple of 4 bytes.
        lengths_B, counts_B: int32, tokens cached before and valid rows of the chunk, read on the device.
        window, sinks: of the ring, whose S is sinks + window; without a window the caller keeps lengths + counts within S.
        impl: "auto" (Triton on a GPU, else the reference), "triton" or "reference".

    Raises ValueError for tensors that do not fit. Source: docs/method.md, Attention (ring); one launch: ours.
    """
    if not 1 <= len(caches) <= MAX_CACHES or len(chunks) != len(caches):
        raise ValueError(f"write_cache: {len(caches)} caches and {len(chunks)} chunks, wanted 1 to {MAX_CACHES} of both")
    B, T = chunks[0].shape[:2]
    for cache, chunk in zip(caches, chunks, strict=True):
        fits = cache.ndim == 4 and chunk.shape == (B, T, *cache.shape[2:]) and cache.shape[0] == B and cache.dtype == chunk.dtype
        if not fits or not (cache.is_contiguous() and chunk.is_contiguous()):
            raise ValueError(
                f"write_cache: a chunk {tuple(chunk.shape)} {chunk.dtype} does not fit a cache {tuple(cache.shape)} {cache.dtype}"
            )
        if cache.shape[2:].numel() * cache.element_size() % 4:
            raise ValueError(f"write_cache: a row of {tuple(cache.shape[2:])} {cache.dtype} is not a multiple of 4 bytes")
        if window is not None and (window < 1 or sinks < 0 or cache.shape[1] != sinks + window):
            raise ValueError(f"write_cache: a ring of {cache.shape[1]} slots, wanted {sinks} sinks and a window of {window}")
    for name, x in (("lengths", lengths_B), ("counts", counts_B)):
        if x.shape != (B,) or x.dtype != torch.int32:
            raise ValueError(f"write_cache: {name} {tuple(x.shape)} {x.dtype}, wanted int32 {(B,)}")
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"write_cache: impl {impl!r} is not one of auto, triton, reference")
    if impl == "triton" or (impl == "auto" and chunks[0].is_cuda):
        from rtpurbo.kernels.cache_write import kernel

        kernel.describe(caches, chunks, lengths_B, counts_B, window, sinks).run()
    else:
        reference.write_cache(caches, chunks, lengths_B, counts_B, window, sinks)
