"""Eager definition of write_cache: one row after the other."""

from collections.abc import Sequence

import torch


def write_cache(
    caches: Sequence[torch.Tensor],
    chunks: Sequence[torch.Tensor],
    lengths_B: torch.Tensor,
    counts_B: torch.Tensor,
    window: int | None,
    sinks: int,
) -> None:
    """See `kernels.cache_write.write_cache`; later rows of a slot replace earlier ones."""
    for cache, chunk in zip(caches, chunks, strict=True):
        for b, (length, count) in enumerate(zip(lengths_B.tolist(), counts_B.tolist(), strict=True)):
            for t in range(count):
                position = length + t
                slot = position if window is None or position < sinks else sinks + (position - sinks) % window
                cache[b, slot] = chunk[b, t]
