"""Picking the next token: greedy, temperature, top-k and top-p, reproducible from a seed on every device."""

# B batch  V vocabulary
import hashlib
import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """temperature 0 is greedy; top_k 0 and top_p 1 do not restrict. Raises ValueError for values out of range."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}, wanted a number >= 0")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, wanted 0 (no limit) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, wanted 0 < top_p <= 1")


class Sampler:
    """Next tokens for a batch. Each sequence draws from its own generator, seeded by (seed, its index in the request list):
    its tokens do not depend on which other sequences run beside it.
    """

    def __init__(self, options: SamplingOptions, indices: list[int]) -> None:
        self.options = options
        self._generators = [torch.Generator().manual_seed(_mix(options.seed, i)) for i in indices]

    def pick(self, logits_BV: torch.Tensor, active: list[bool]) -> list[int]:
        """One token id per sequence, 0 for those that are not active."""
        if self.options.temperature == 0:
            tokens = logits_BV.argmax(dim=-1).tolist()
            return [token if on else 0 for token, on in zip(tokens, active, strict=True)]
        # Drawn on the CPU in fp64, so that seeds mean the same on every device.
        probabilities_BV = probabilities(logits_BV.cpu(), self.options)
        return [draw(p_V, generator) if on else 0 for p_V, generator, on in zip(probabilities_BV, self._generators, active, strict=True)]


def probabilities(logits_BV: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
    """softmax(logits / temperature) restricted to the top_k largest and then to the smallest set with mass >= top_p.

    fp64 [B, V], each row sums to 1; ties beyond top_k go to the lower token id. The most likely token always stays.
    """
    logits_BV, order_BV = torch.sort(logits_BV.double(), dim=-1, descending=True, stable=True)
    # Subtracting the maximum first keeps logits / temperature finite for tiny temperatures.
    scaled_BV = (logits_BV - logits_BV[:, :1]) / options.temperature
    if options.top_k:
        scaled_BV[:, options.top_k :] = float("-inf")
    sorted_BV = torch.softmax(scaled_BV, dim=-1)
    before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
    sorted_BV = sorted_BV.masked_fill(before_BV >= options.top_p, 0.0)
    sorted_BV /= sorted_BV.sum(dim=-1, keepdim=True)
    return torch.zeros_like(sorted_BV).scatter(-1, order_BV, sorted_BV)


def draw(probabilities_V: torch.Tensor, generator: torch.Generator) -> int:
    """A token id by inversion of the cumulative distribution, from one uniform number."""
    cumulative_V = probabilities_V.cumsum(dim=-1)
    uniform = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative_V[-1]
    token = int(torch.searchsorted(cumulative_V, uniform, right=True))
    # Rounding can put the uniform number at the very end of the sum; the last possible token is meant then.
    return min(token, int(probabilities_V.nonzero()[-1]))


def _mix(seed: int, index: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8], "big") >> 1
