"""Workspace and work division of the fused decode selection: made once for a layer shape, used by every step."""

# B batch  H retrieval query heads  I index-key sets  J groups of sets  G heads of a group (padded)  N blocks  C chunks
# P parts  b bins
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from rtpurbo.kernels.block_selection.cuda import CudaSelectionPlan, plan_cuda_selection, suits_cuda
from rtpurbo.kernels.division import group_heads, max_waiting, next_power_of_2, num_processors_of, pipeline_bytes_of

NUM_BINS = 256
# Of a part's histogram in memory: the bins, one word for the forced blocks, the rest of its line.
HISTOGRAM_WORDS = NUM_BINS + 16
MAX_PARTS = 16
# Exact sums hold so many blocks: 19-bit limbs of one tile in 32 bits (each key of a block adds up to 2^32); a part's count in 13 bits.
MAX_TILE, MAX_TILE_KEYS, MAX_PART = 2048, 1 << 17, 4096
MAX_CHUNKS = 1024
MIN_COLUMNS = 8
MAX_TOKENS = 1 << 21


@dataclass(frozen=True, kw_only=True)
class SelectionPlan:
    """Static facts and scratch memory of `score_and_select`; calls that share one must not overlap in time."""

    key_set_H: tuple[int, ...]
    num_sets: int
    batch: int
    capacity_blocks: int
    block_size: int
    chunks: int
    max_parts: int
    max_selectors: int
    tile_blocks: int
    select_tile: int
    part_blocks: int
    stages: int
    pipeline_bytes: int
    held_tiles: int | None
    num_warps: int
    early_launch: bool
    sets_in_group: int
    heads_JG: torch.Tensor
    set_slot_JG: torch.Tensor
    first_set_J: torch.Tensor
    block_max_BHN: torch.Tensor
    block_sum_BHN: torch.Tensor
    chunk_max_BHC: torch.Tensor
    histogram_BHPb: torch.Tensor
    counters: torch.Tensor
    mask_BHW: torch.Tensor | None
    cuda: CudaSelectionPlan | None


def group_sets(key_set_H: Sequence[int], num_sets: int, sets_a_group: int) -> list[int]:
    """First set of every group, and num_sets: consecutive sets, at most sets_a_group, whose heads fit eight columns."""
    readers = [list(key_set_H).count(key_set) for key_set in range(num_sets)]
    first_J, heads = [0], 0
    for key_set, count in enumerate(readers):
        if heads and (heads + count > MIN_COLUMNS or key_set - first_J[-1] == sets_a_group):
            first_J.append(key_set)
            heads = 0
        heads += count
    return [*first_J, num_sets]


def divide_heads(key_set_H: Sequence[int], num_sets: int, sets_a_group: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Heads of every group [J, G], which of the group's sets each of them reads [J, G], first set of every group."""
    first_J = group_sets(key_set_H, num_sets, sets_a_group)
    group_H = [sum(first <= key_set for first in first_J) - 1 for key_set in key_set_H]
    heads_JG = group_heads(group_H, len(first_J) - 1, at_least=MIN_COLUMNS)
    set_H = torch.tensor([key_set - first_J[group] for key_set, group in zip(key_set_H, group_H, strict=True)])
    return heads_JG, torch.where(heads_JG >= 0, set_H[heads_JG.clamp(min=0)], -1), first_J


def largest_tile(blocks: int, block_size: int) -> int:
    """Blocks of a tile in which a whole head of that many blocks is selected, if it fits."""
    return max(256, min(MAX_TILE, MAX_TILE_KEYS // block_size, next_power_of_2(blocks)))


def parts_for(blocks: int, part_blocks: int, max_parts: int = MAX_PARTS) -> int:
    """Into how many parts a selection among that many blocks is cut at most, as a power of two."""
    return next_power_of_2(min(max_parts, -(-blocks // part_blocks)))


def scores_of_blocks(batch: int, heads: int, blocks: int, device: torch.device | str) -> torch.Tensor:
    """Scratch fp32 [batch, heads, blocks] that is read four numbers at a time, up to three beyond its end."""
    rows = batch * heads * blocks
    return torch.empty(rows + 4, dtype=torch.float32, device=device)[:rows].view(batch, heads, blocks)


def check_capacity(name: str, capacity: int, block_size: int, select_tile: int) -> None:
    """ValueError where the fixed-point sums of the selection could overflow."""
    tile = min(MAX_TILE, MAX_TILE_KEYS // block_size)
    if capacity > MAX_TOKENS or capacity > MAX_PARTS * MAX_PART * block_size or select_tile > tile or block_size > 128:
        raise ValueError(
            f"{name}: capacity {capacity} tokens in blocks of {block_size}, tiles of {select_tile}; the fixed-point sums hold "
            f"{MAX_TOKENS} tokens, {MAX_PARTS * MAX_PART} blocks of up to 128, tiles of {tile}"
        )


def plan_selection(
    key_set_H: Sequence[int],
    *,
    num_sets: int,
    batch: int,
    capacity: int,
    device: torch.device | str,
    block_size: int = 64,
    sets_a_group: int = 6,
    tile_blocks: int = 8,
    select_tile: int | None = None,
    part_blocks: int = 2048,
    programs_per_processor: int = 1,
    stages: int | None = None,
    num_warps: int = 8,
    early_launch: bool = False,
    pipeline_bytes: int | None = None,
    masks: bool = False,
    held_tiles: int | None = None,
    cuda: bool | None = None,
) -> SelectionPlan:
    """Divide the work of `score_and_select` and allocate its scratch memory.

    Args:
        key_set_H: for each retrieval head the set of index keys it reads, 0 <= set < num_sets; every set has a reader.
        num_sets: I, index-key sets in the cache.
        batch, capacity: largest batch and tokens of a sequence (the grid is sized for them).
        device: where the keys live.
        block_size: keys a block.
        sets_a_group, tile_blocks, select_tile, part_blocks, programs_per_processor, stages, num_warps: work division, benchmarks/decode.md.
        early_launch: let the launch overlap the end of the launch before it (programmatic dependent launch).
        pipeline_bytes: shared memory for keys on their way, of a program; what the device has.
        held_tiles: tiles of keys in shared memory beside those on their way; what the installed Triton needs.
        cuda: plan for the launch in CUDA C++ too, where the GPU and the shape allow it; None: where it was measured to be faster.
        masks: `score_and_select` fills `plan.mask_BHW` too, int32 [B, H, N / 32]: one bit a block, for `attend_grouped`.

    Raises ValueError for a set without reader or out of range, and beyond 2^21 tokens.
    """
    device = torch.device(device)
    N = max(1, -(-capacity // block_size))
    select_tile = select_tile or largest_tile(N, block_size)
    if sorted(set(key_set_H)) != list(range(num_sets)):
        raise ValueError(f"plan_selection: key_set {list(key_set_H)} must name every set of 0 ... {num_sets - 1}")
    check_capacity("plan_selection", capacity, block_size, select_tile)
    if masks and min(select_tile, part_blocks) < 32:
        raise ValueError(f"plan_selection: masks need tiles and parts of 32 blocks or more, found {select_tile} and {part_blocks}")
    num_processors = num_processors_of(device)
    H = len(key_set_H)
    heads_JG, set_slot_JG, first_J = divide_heads(key_set_H, num_sets, sets_a_group)
    groups = batch * (len(first_J) - 1)
    sets_in_group = max(after - first for first, after in pairwise(first_J))
    programs = num_processors * programs_per_processor
    # The launch takes fewer where wide elements fill shared memory.
    pipeline_bytes = pipeline_bytes or pipeline_bytes_of(device)
    stages = stages or max(2, min(5, 1 + pipeline_bytes // (sets_in_group * tile_blocks * block_size * 32)))
    chunks = min(MAX_CHUNKS, -(-N // tile_blocks), max(1, programs * sets_in_group // (batch * num_sets)))
    # What does not fit a tile has at least two parts.
    part_blocks = min(part_blocks, select_tile)
    max_parts = parts_for(N, part_blocks)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if cuda is None:
        cuda = suits_cuda(capability, batch)
    shape = {
        "chunk_max_BHC": ((batch, H, chunks), torch.float32),
        "histogram_BHPb": ((batch, H, max_parts, HISTOGRAM_WORDS), torch.int64),
    }
    return SelectionPlan(
        key_set_H=tuple(key_set_H),
        num_sets=num_sets,
        batch=batch,
        capacity_blocks=N,
        block_size=block_size,
        chunks=chunks,
        max_parts=max_parts,
        # The interpreter runs one program after the other: there the last one must not wait for a later one.
        max_selectors=max_waiting(groups, num_processors) if device.type == "cuda" else 1,
        tile_blocks=tile_blocks,
        select_tile=select_tile,
        part_blocks=part_blocks,
        stages=stages,
        pipeline_bytes=pipeline_bytes,
        held_tiles=held_tiles,
        num_warps=num_warps,
        early_launch=early_launch,
        sets_in_group=sets_in_group,
        heads_JG=heads_JG.to(device=device, dtype=torch.int32),
        set_slot_JG=set_slot_JG.to(device=device, dtype=torch.int32),
        first_set_J=torch.tensor(first_J, dtype=torch.int32, device=device),
        counters=torch.zeros(batch, len(first_J) - 1, 2 + heads_JG.shape[1], dtype=torch.int32, device=device),
        cuda=plan_cuda_selection(key_set_H, batch=batch, capacity=capacity, device=device, block_size=block_size)
        if cuda and capability >= (9, 0) and not masks
        else None,
        mask_BHW=torch.zeros(batch, H, -(-N // 32), dtype=torch.int32, device=device) if masks else None,
        block_max_BHN=scores_of_blocks(batch, H, N, device),
        block_sum_BHN=scores_of_blocks(batch, H, N, device),
        **{name: torch.empty(size, dtype=dtype, device=device) for name, (size, dtype) in shape.items()},
    )
