"""From where FlashAttention-4 was measured faster than the own Hopper kernel on the same mask: data with its device, for impl "auto"."""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """Tokens of a prompt in one chunk from which FlashAttention-4 wins; None: nowhere. In chunks at an offset it nowhere did."""

    device: str
    versions: str
    source: str
    window: int | None
    dense: int | None


# Dense: 33.0 against 34.1 ms at 128K and 132.3 against 135.9 ms at 256K, but 1.90 against 1.92 ms at 32K, which is no reason to switch.
# Window + sinks: 5.92 against 5.69 ms at 32K, 27.8 ... 34.6 against 26.9 ... 29.0 ms at 128K.
CROSSOVERS = (
    Crossover(
        device="NVIDIA H200",
        versions="torch 2.11.0+cu130, triton 3.6.0, flash-attn-4 4.0.0b36",
        source="benchmarks/prefill.md",
        window=None,
        dense=131072,
    ),
)


def prefers_fa4(device: torch.device, mask: Literal["window", "dense"], rows: int, keys: int) -> bool:
    """Whether "auto" should take FlashAttention-4, where it can run, for this mask on this GPU."""
    name = torch.cuda.get_device_name(device)
    known = next((c for c in CROSSOVERS if c.device == name), None)
    threshold = None if known is None else getattr(known, mask)
    return threshold is not None and rows == keys and rows >= threshold
