"""Where FlashAttention-4 was measured faster than the own Hopper kernel on the same mask: data with its device, for impl "auto"."""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """FlashAttention-4 wins from so many keys on, at chunks of at least MIN_ROWS queries; None: nowhere measured."""

    device: str
    versions: str
    source: str
    window: int | None
    dense: int | None


MIN_ROWS = 4096
CROSSOVERS = (
    Crossover(
        device="NVIDIA H200",
        versions="torch 2.11.0+cu130, triton 3.6.0, flash-attn-4 4.0.0b36",
        source="benchmarks/prefill_h200.csv",
        window=None,
        dense=None,
    ),
)


def prefers_fa4(device: torch.device, mask: Literal["window", "dense"], rows: int, keys: int) -> bool:
    """Whether "auto" should take FlashAttention-4, where it can run, for this mask on this GPU."""
    name = torch.cuda.get_device_name(device)
    known = next((c for c in CROSSOVERS if c.device == name), None)
    threshold = None if known is None else getattr(known, mask)
    return threshold is not None and rows >= MIN_ROWS and keys >= threshold
