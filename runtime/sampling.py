"""Picking the next token on the device: greedy, temperature, top-k and top-p, reproducible from a seed on every device."""

# B batch  V vocabulary  N blocks of the vocabulary  P tokens of a block
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

# greedy: every row takes the largest logit. free: rows draw from the whole vocabulary. restricted: some rows have top_k or top_p.
Kind = Literal["greedy", "free", "restricted"]

# Divides the vocabularies of the supported families (151936, 49152, 128256), so that no padded copy is made.
_BLOCK = 128


def _signed(unsigned: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return unsigned - (1 << 64) if unsigned >= 1 << 63 else unsigned


_STEP, _MIX_1, _MIX_2 = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


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


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Options of every row as tensors; `sample` reads them on the device, so that a captured graph serves new values.

    temperature_B fp32, top_k_B int32, top_p_B fp32. kind: the work that `sample` does, fixed when a graph is captured. A row's token
    is the same under every kind that covers its options, so rows with different options can share a batch.
    """

    temperature_B: torch.Tensor
    top_k_B: torch.Tensor
    top_p_B: torch.Tensor
    kind: Kind

    @staticmethod
    def of(rows: Sequence[SamplingOptions], device: torch.device) -> "DeviceOptions":
        """The options of a batch, with the least kind that covers them."""
        # What does not fit int32 or fp32 is cut: a top_k beyond every vocabulary, a temperature that makes all tokens equal.
        # fp32 rounds tiny values to 0: as a temperature that is greedy, as a top_p it still keeps one token.
        top_k = [min(row.top_k, (1 << 31) - 1) for row in rows]
        return DeviceOptions(
            temperature_B=torch.tensor([min(row.temperature, 3e38) for row in rows], dtype=torch.float32).to(device),
            top_k_B=torch.tensor(top_k, dtype=torch.int32).to(device),
            top_p_B=torch.tensor([row.top_p for row in rows], dtype=torch.float32).to(device),
            kind=kind_of(rows),
        )

    def copy_(self, other: "DeviceOptions") -> None:
        """Take another batch's values in place, for a graph that was captured with these tensors."""
        assert _KINDS.index(other.kind) <= _KINDS.index(self.kind), f"a graph for {self.kind} sampling cannot serve {other.kind}"
        self.temperature_B.copy_(other.temperature_B)
        self.top_k_B.copy_(other.top_k_B)
        self.top_p_B.copy_(other.top_p_B)


_KINDS: tuple[Kind, ...] = ("greedy", "free", "restricted")


def kind_of(rows: Sequence[SamplingOptions]) -> Kind:
    """The least work that serves all rows."""
    drawn = [row for row in rows if row.temperature > 0]
    if any(row.top_k > 0 or row.top_p < 1 for row in drawn):
        return "restricted"
    return "free" if drawn else "greedy"


def sequence_seeds(seed: int, indices: Sequence[int], device: torch.device) -> torch.Tensor:
    """seed_B int64: one number for each sequence from the request's seed and its index in the request list, by SHA-256."""
    digests = [hashlib.sha256(f"{seed}:{index}".encode()).digest() for index in indices]
    return torch.tensor([int.from_bytes(digest[:8], "big", signed=True) for digest in digests], dtype=torch.int64).to(device)


def sample(logits_BV: torch.Tensor, options: DeviceOptions, seed_B: torch.Tensor, step_B: torch.Tensor) -> torch.Tensor:
    """Next token ids, int64 [B], by device code alone: no host synchronisation, capturable in a CUDA graph.

    A row with temperature 0 takes its largest logit, the lowest id among equal ones. Any other row draws one token by inversion:
    the lowest id whose cumulative weight in id order exceeds uniform(seed, step) * total, with the weights of `kept_weights`.
    seed_B, step_B int64: the draw is a function of them, of the row's logits and of its options, whatever runs beside it.

    The weights are integers, so sums do not depend on their order: a row's token is the same from run to run and for every batch.
    Between devices exp may differ in its last bit, which moves a border between two tokens by about 2^-44 of the total.
    Rows of NaN, +inf or only -inf give an unspecified id of the vocabulary. Source: ours.
    """
    greedy_B = logits_BV.argmax(dim=-1)  # torch: the first among equal ones
    if options.kind == "greedy":
        return greedy_B
    weights_BV = kept_weights(logits_BV, options)
    total_B = weights_BV.sum(dim=-1)
    # total has up to 62 bits and fp64 has 53: rounding could reach the total itself.
    below_B = (uniform(seed_B, step_B) * total_B.double()).long().minimum(total_B - 1)
    return torch.where(options.temperature_B > 0, _first_reaching(weights_BV, below_B + 1), greedy_B)


def kept_weights(logits_BV: torch.Tensor, options: DeviceOptions) -> torch.Tensor:
    """int64 [B, V], in proportion to softmax(logits / temperature), 0 outside the top_k largest and then outside top_p.

    weight = floor(exp((logit - largest) / temperature) * 2^b) with b = min(52, 62 - bits of V), so that no sum overflows; the tokens
    that this rounds to 0 together hold less than V * 2^-b of the most likely one's probability. top_p keeps the shortest run of tokens,
    most likely first, lower ids first among equals, that holds at least top_p of the weight; the most likely token always stays.
    Rows with temperature 0 are computed with temperature 1. Vocabularies are sorted only where options.kind is "restricted".
    """
    # Adding 0 turns -0 into +0: sorting must see them as equal on every device.
    logits_BV = logits_BV.float() + 0.0
    weights_BV = _weights(logits_BV, options.temperature_B)
    if options.kind != "restricted":
        return weights_BV
    vocabulary = logits_BV.shape[-1]
    ids_V = torch.arange(vocabulary, device=logits_BV.device)
    sorted_BV, order_BV = torch.sort(logits_BV, dim=-1, descending=True, stable=True)
    limit_B = torch.where(options.top_k_B > 0, options.top_k_B, vocabulary)
    ranked_BV = weights_BV.gather(1, order_BV).masked_fill(ids_V >= limit_B[:, None], 0)
    total_B = ranked_BV.sum(dim=-1)
    share_B = (options.top_p_B.double() * total_B.double()).ceil().long().clamp(min=1).minimum(total_B)
    wanted_B = torch.where(options.top_p_B < 1, share_B, total_B)
    last_B1 = _first_reaching(ranked_BV, wanted_B)[:, None]
    # Back to id order without a scatter: the kept tokens are those that sort not after the last one.
    edge_B1, edge_id_B1 = sorted_BV.gather(1, last_B1), order_BV.gather(1, last_B1)
    kept_BV = (logits_BV > edge_B1) | ((logits_BV == edge_B1) & (ids_V <= edge_id_B1))
    return weights_BV.masked_fill(~kept_BV, 0)


def uniform(seed_B: torch.Tensor, step_B: torch.Tensor) -> torch.Tensor:
    """fp64 [B] in [0, 1), a multiple of 2^-53: output number `step` of the generator SplitMix64 started at `seed`.

    Integer arithmetic modulo 2^64, equal on every device. Source: Steele, Lea, Flood, "Fast splittable pseudorandom number
    generators", OOPSLA 2014.
    """
    state_B = seed_B + (step_B + 1) * _STEP
    state_B = (state_B ^ _shifted(state_B, 30)) * _MIX_1
    state_B = (state_B ^ _shifted(state_B, 27)) * _MIX_2
    state_B = state_B ^ _shifted(state_B, 31)
    return _shifted(state_B, 11).double() * 2.0**-53


class Sampler:
    """The sampling state of one batch: options, seeds and step counters on the device. `pick` may be captured in a CUDA graph.

    A sequence's seed comes from the options' seed and its index in the request list (`sequence_seeds`).
    """

    def __init__(self, options: SamplingOptions, indices: Sequence[int], device: torch.device) -> None:
        self.options = DeviceOptions.of([options] * len(indices), device)
        self.seed_B = sequence_seeds(options.seed, indices, device)
        self.step_B = torch.zeros_like(self.seed_B)

    def pick(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """Token ids int64 [B], on the device; counts one step."""
        ids_B = sample(logits_BV, self.options, self.seed_B, self.step_B)
        self.step_B += 1
        return ids_B


def _weights(logits_BV: torch.Tensor, temperature_B: torch.Tensor) -> torch.Tensor:
    bits = min(52, 62 - logits_BV.shape[-1].bit_length())
    divisor_B = torch.where(temperature_B > 0, temperature_B, 1.0).double()
    # Subtracting the maximum first keeps logits / temperature finite for tiny temperatures.
    logits_BV = logits_BV.double()
    scaled_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / divisor_B[:, None]
    return (scaled_BV.exp() * 2.0**bits).long()


def _first_reaching(weights_BV: torch.Tensor, wanted_B: torch.Tensor) -> torch.Tensor:
    """int64 [B]: the first index up to which the weights sum to at least `wanted`; the last index where none does.

    Sums of blocks are scanned first, then one block: a scan of a whole row would run in one program a row.
    """
    batch, vocabulary = weights_BV.shape
    if padding := -vocabulary % _BLOCK:
        weights_BV = torch.nn.functional.pad(weights_BV, (0, padding))
    blocks_BNP = weights_BV.view(batch, -1, _BLOCK)
    sums_BN = blocks_BNP.sum(dim=-1)
    ends_BN = sums_BN.cumsum(dim=-1)
    block_B1 = torch.searchsorted(ends_BN, wanted_B[:, None]).clamp(max=ends_BN.shape[1] - 1)
    before_B1 = (ends_BN - sums_BN).gather(1, block_B1)
    inside_BP = blocks_BNP.gather(1, block_B1[:, :, None].expand(-1, -1, _BLOCK))[:, 0].cumsum(dim=-1)
    place_B1 = torch.searchsorted(inside_BP, wanted_B[:, None] - before_B1)
    return (block_B1 * _BLOCK + place_B1)[:, 0].clamp(min=0, max=vocabulary - 1)


def _shifted(state_B: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift; torch's shifts copies of the sign in."""
    return (state_B >> bits) & ((1 << (64 - bits)) - 1)
