"""Workspace and work division of the fused decode selection: made once for a layer shape, used by every step."""

# B batch  H retrieval query heads  I index-key sets  G heads of a set (padded)  N blocks  C chunks  P parts  b bins
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rtpurbo.kernels.division import group_heads, max_waiting, next_power_of_2, num_processors_of

NUM_BINS = 256
MAX_PARTS = 8
MAX_CHUNKS = 1024


@dataclass(frozen=True, kw_only=True)
class SelectionPlan:
    """Static facts and scratch memory of `score_and_select`; calls that share one must not overlap in time."""

    key_set_H: tuple[int, ...]
    num_sets: int
    batch: int
    capacity_blocks: int
    block_size: int
    chunks: int
    parts: int
    max_selectors: int
    tile_blocks: int
    select_tile: int
    stages: int
    num_warps: int
    heads_IG: torch.Tensor
    block_max_BHN: torch.Tensor
    block_sum_BHN: torch.Tensor
    chunk_max_BHC: torch.Tensor
    bin_mass_BHPb: torch.Tensor
    bin_count_BHPb: torch.Tensor
    forced_BHP2: torch.Tensor
    counters: torch.Tensor


def plan_selection(
    key_set_H: Sequence[int],
    *,
    num_sets: int,
    batch: int,
    capacity: int,
    device: torch.device | str,
    block_size: int = 64,
    tile_blocks: int = 4,
    select_tile: int = 2048,
    programs_per_processor: int = 4,
    stages: int = 3,
    num_warps: int = 8,
) -> SelectionPlan:
    """Divide the work of `score_and_select` and allocate its scratch memory.

    Args:
        key_set_H: for each retrieval head the set of index keys it reads, 0 <= set < num_sets; every set has a reader.
        num_sets: I, index-key sets in the cache.
        batch, capacity: largest batch and tokens of a sequence (the grid is sized for them).
        device: where the keys live.
        block_size: keys a block.
        tile_blocks, select_tile, programs_per_processor, stages, num_warps: work division, see benchmarks/decode.md.

    Raises ValueError for a set without reader or out of range.
    """
    device = torch.device(device)
    if sorted(set(key_set_H)) != list(range(num_sets)):
        raise ValueError(f"plan_selection: key_set {list(key_set_H)} must name every set of 0 ... {num_sets - 1}")
    num_processors = num_processors_of(device)
    H, N = len(key_set_H), max(1, -(-capacity // block_size))
    groups = batch * num_sets
    chunks = min(MAX_CHUNKS, -(-N // tile_blocks), max(1, num_processors * programs_per_processor // groups))
    parts = next_power_of_2(min(MAX_PARTS, -(-N // select_tile)))
    heads_IG = group_heads(key_set_H, num_sets, device)
    shape = {
        "block_max_BHN": ((batch, H, N), torch.float32),
        "block_sum_BHN": ((batch, H, N), torch.float32),
        "chunk_max_BHC": ((batch, H, chunks), torch.float32),
        "bin_mass_BHPb": ((batch, H, parts, NUM_BINS), torch.int64),
        "bin_count_BHPb": ((batch, H, parts, NUM_BINS), torch.int32),
        "forced_BHP2": ((batch, H, parts, 2), torch.int64),
    }
    return SelectionPlan(
        key_set_H=tuple(key_set_H),
        num_sets=num_sets,
        batch=batch,
        capacity_blocks=N,
        block_size=block_size,
        chunks=chunks,
        parts=parts,
        # The interpreter runs one program after the other: there the last one must not wait for a later one.
        max_selectors=max_waiting(groups, num_processors) if device.type == "cuda" else 1,
        tile_blocks=tile_blocks,
        select_tile=select_tile,
        stages=stages,
        num_warps=num_warps,
        heads_IG=heads_IG,
        counters=torch.zeros(batch, num_sets, 2 + heads_IG.shape[1], dtype=torch.int32, device=device),
        **{name: torch.empty(size, dtype=dtype, device=device) for name, (size, dtype) in shape.items()},
    )
