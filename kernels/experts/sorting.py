"""Stable counting sort of (token, expert) pairs by expert on the device, with the map from row tiles to experts."""
# Triton's compiler, not Python's type rules, decides what the jitted functions mean:
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false, reportIndexIssue=false

# P pairs (token * X + choice)  E experts  B blocks of pairs  N row tiles
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from rtpurbo.kernels.launch import Launch

PAIRS = 256  # pairs a program
SUB = 64  # pairs of a step: a one-hot tile of SUB x experts stays in registers


@dataclass(frozen=True, kw_only=True)
class SortedPairs:
    """Rows are pairs in the order of (expert, token, choice); no row is padding.

    pair_P: pair of each row. row_P: row of each pair. ends_E: int32, row after the last one of each expert.
    tiles_N3: (expert, first row, row after the expert's last) of each tile of `tile_rows` rows; expert -1 after the last tile.
    """

    pair_P: torch.Tensor
    row_P: torch.Tensor
    ends_E: torch.Tensor
    tiles_N3: torch.Tensor
    tile_rows: int


def sort_pairs(
    ids_TX: torch.Tensor, num_experts: int, *, tile_rows: int, early_launch: bool, run: Callable[[Launch], None] = Launch.run
) -> SortedPairs:
    """Sort the pairs of ids [T, X] (contiguous, 0 <= id < num_experts) without a host synchronisation, in one or two launches."""
    P, device = ids_TX.numel(), ids_TX.device
    blocks = triton.cdiv(P, PAIRS)
    tiles = P // tile_rows + min(num_experts, P)
    pair_P, row_P = (torch.empty(P, dtype=torch.int32, device=device) for _ in range(2))
    ends_E = torch.empty(num_experts, dtype=torch.int32, device=device)
    tiles_N3 = torch.empty(tiles, 3, dtype=torch.int32, device=device)
    columns = max(16, triton.next_power_of_2(num_experts))
    counts_BE = torch.empty(blocks, columns, dtype=torch.int32, device=device)
    sizes = {"PAIRS": PAIRS, "COLUMNS": columns, "SUB": SUB, "EARLY_LAUNCH": early_launch}
    if blocks > 1:
        run(Launch(kernel=count_pairs, grid=(blocks,), arguments=(ids_TX, counts_BE, P), constants=sizes, early_launch=early_launch))
    run(Launch(
        kernel=place_pairs, grid=(blocks,),
        arguments=(ids_TX, counts_BE, pair_P, row_P, ends_E, tiles_N3, P, num_experts, blocks, tiles),
        constants={**sizes, "ROWS": tile_rows, "ONE_BLOCK": blocks == 1}, num_warps=8, early_launch=early_launch,
    ))  # fmt: skip
    return SortedPairs(pair_P=pair_P, row_P=row_P, ends_E=ends_E, tiles_N3=tiles_N3, tile_rows=tile_rows)


@triton.jit
def chosen(ids_ptr, first, pairs, SUB: tl.constexpr, COLUMNS: tl.constexpr):
    """One-hot int32 [SUB, COLUMNS] of pairs first ... first + SUB - 1; zero rows beyond the last pair."""
    pair_p = first + tl.arange(0, SUB)
    id_p = tl.load(ids_ptr + pair_p, mask=pair_p < pairs, other=-1).to(tl.int32)
    return (id_p[:, None] == tl.arange(0, COLUMNS)[None, :]).to(tl.int32)


@triton.jit
def count_block(ids_ptr, block, pairs, PAIRS: tl.constexpr, COLUMNS: tl.constexpr, SUB: tl.constexpr):
    count_e = tl.zeros([COLUMNS], tl.int32)
    for first in range(block * PAIRS, tl.minimum(block * PAIRS + PAIRS, pairs), SUB):
        count_e += tl.sum(chosen(ids_ptr, first, pairs, SUB, COLUMNS), axis=0)
    return count_e


@triton.jit
def count_pairs(ids_ptr, counts_ptr, pairs, PAIRS: tl.constexpr, COLUMNS: tl.constexpr, SUB: tl.constexpr, EARLY_LAUNCH: tl.constexpr):
    if EARLY_LAUNCH:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    block = tl.program_id(0)
    tl.store(counts_ptr + block * COLUMNS + tl.arange(0, COLUMNS), count_block(ids_ptr, block, pairs, PAIRS, COLUMNS, SUB))


@triton.jit
def place_pairs(
    ids_ptr,  # int [P]
    counts_ptr,  # int32 [B, COLUMNS]; unused with one block
    pair_ptr,  # int32 [P]
    row_ptr,  # int32 [P]
    ends_ptr,  # int32 [E]
    tiles_ptr,  # int32 [N, 3]
    pairs,
    num_experts,
    blocks,
    num_tiles,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUB: tl.constexpr,
    ROWS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    EARLY_LAUNCH: tl.constexpr,
):
    """Each program adds up the counts of all blocks (cheaper than a launch for the scan), then places its own pairs."""
    if EARLY_LAUNCH:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    block = tl.program_id(0)
    column_e = tl.arange(0, COLUMNS)
    before_e = tl.zeros([COLUMNS], tl.int32)
    if ONE_BLOCK:
        total_e = count_block(ids_ptr, block, pairs, PAIRS, COLUMNS, SUB)
    else:
        total_e = tl.zeros([COLUMNS], tl.int32)
        for start in range(0, blocks, 32):
            block_b = start + tl.arange(0, 32)
            place_be = block_b[:, None] * COLUMNS + column_e[None, :]
            count_be = tl.load(counts_ptr + place_be, mask=(block_b < blocks)[:, None], other=0)
            total_e += tl.sum(count_be, axis=0)
            before_e += tl.sum(tl.where((block_b < block)[:, None], count_be, 0), axis=0)
    end_e = tl.cumsum(total_e, axis=0)
    first_e = end_e - total_e
    next_e = first_e + before_e
    for first in range(block * PAIRS, tl.minimum(block * PAIRS + PAIRS, pairs), SUB):
        chosen_pe = chosen(ids_ptr, first, pairs, SUB, COLUMNS)
        row_p = tl.sum(chosen_pe * (tl.cumsum(chosen_pe, axis=0) - 1 + next_e[None, :]), axis=1)
        pair_p = first + tl.arange(0, SUB)
        tl.store(row_ptr + pair_p, row_p, mask=pair_p < pairs)
        tl.store(pair_ptr + row_p, pair_p, mask=pair_p < pairs)
        next_e += tl.sum(chosen_pe, axis=0)
    if block == 0:
        tl.store(ends_ptr + column_e, end_e, mask=column_e < num_experts)
    tiles_e = (total_e + ROWS - 1) // ROWS
    last_tile_e = tl.cumsum(tiles_e, axis=0)
    for start in range(block * SUB, num_tiles, blocks * SUB):
        tile_n = start + tl.arange(0, SUB)
        # Columns beyond the last expert have no tile, so a tile after the last one belongs to no column.
        expert_n = tl.sum((last_tile_e[None, :] <= tile_n[:, None]).to(tl.int32), axis=1)
        mine_ne = (column_e[None, :] == expert_n[:, None]).to(tl.int32)
        skipped_n = tile_n - tl.sum(mine_ne * (last_tile_e - tiles_e)[None, :], axis=1)
        first_n = tl.sum(mine_ne * first_e[None, :], axis=1) + skipped_n * ROWS
        end_n = tl.sum(mine_ne * end_e[None, :], axis=1)
        written_n = tile_n < num_tiles
        tl.store(tiles_ptr + tile_n * 3, tl.where(expert_n < COLUMNS, expert_n, -1), mask=written_n)
        tl.store(tiles_ptr + tile_n * 3 + 1, first_n, mask=written_n)
        tl.store(tiles_ptr + tile_n * 3 + 2, end_n, mask=written_n)
