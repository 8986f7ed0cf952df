"""Experts for many tokens in Triton: grouped products over pairs sorted by expert, then a weighted sum in fixed order."""
# Triton's compiler, not Python's type rules, decides what the jitted functions mean:
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false

# T tokens  X experts a token  P pairs, as rows sorted by expert  E experts  C hidden width  F expert width
# In the kernels: M rows of a tile, N output columns of a tile, K step of the inner axis
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda
from triton.tools.tensor_descriptor import TensorDescriptor

from rtpurbo.kernels.experts.sorting import SortedPairs, sort_pairs
from rtpurbo.kernels.launch import Launch


@dataclass(frozen=True, kw_only=True)
class Product:
    """Columns of a tile (of each of gate and up in the first product), inner step, warps and stages."""

    columns: int
    step: int
    warps: int
    stages: int


@dataclass(frozen=True, kw_only=True)
class GroupedTiles:
    """Tiles of both products. swap: the weights are the left factor, which suits tiles of fewer than 64 rows.

    descriptors: weights come through tensor descriptors (the copy engine; compute capability 9.0), else through pointers.
    """

    rows: int
    swap: bool
    up: Product
    down: Product
    descriptors: bool = False


def tiles_for(pairs: int, num_experts: int, *, hopper: bool) -> GroupedTiles:
    """Tiles for so many rows an expert on average; the large ones need the shared memory of compute capability 9.0."""
    rows = pairs / num_experts
    if rows <= 12:
        product = Product(columns=64, step=128, warps=4, stages=4 if hopper else 2)
        return GroupedTiles(rows=16, swap=True, up=product, down=product)
    if rows <= 40:
        product = Product(columns=64, step=64, warps=4, stages=4 if hopper else 3)
        return GroupedTiles(rows=32, swap=True, up=product, down=product)
    if rows <= 160 or not hopper:
        up = Product(columns=64, step=64, warps=4, stages=4 if hopper else 3)
        return GroupedTiles(rows=64, swap=False, up=up, down=Product(columns=128, step=64, warps=4, stages=4 if hopper else 3))
    product = Product(columns=128, step=64, warps=8, stages=4)
    return GroupedTiles(rows=128, swap=False, up=product, down=Product(columns=256, step=64, warps=8, stages=4), descriptors=True)


def mix_experts(
    x_TC: torch.Tensor,
    ids_TX: torch.Tensor,
    weights_TX: torch.Tensor,
    gate_up_EGC: torch.Tensor,
    down_ECF: torch.Tensor,
    *,
    tiles: GroupedTiles,
    early_launch: bool = False,
    y_TC: torch.Tensor | None = None,
    run: Callable[[Launch], None] = Launch.run,
) -> torch.Tensor:
    """See rtpurbo.kernels.experts.mix_experts; early_launch overlaps each launch with the end of the one before it."""
    E, C, F = down_ECF.shape
    X = ids_TX.shape[1]
    P = ids_TX.numel()
    sorted_pairs = sort_pairs(ids_TX, E, tile_rows=tiles.rows, early_launch=early_launch, run=run)
    num_tiles = sorted_pairs.tiles_N3.shape[0]
    h_PF = torch.empty(P, F, dtype=x_TC.dtype, device=x_TC.device)
    shared = {"M": tiles.rows, "SWAP": tiles.swap, "DESCRIPTORS": tiles.descriptors, "EARLY_LAUNCH": early_launch}
    up = tiles.up
    up_weight = TensorDescriptor.from_tensor(gate_up_EGC.view(-1, C), [up.columns, up.step]) if tiles.descriptors else gate_up_EGC
    run(Launch(
        kernel=up_grouped, grid=(num_tiles * triton.cdiv(F, up.columns),),
        arguments=(x_TC, up_weight, h_PF, sorted_pairs.tiles_N3, sorted_pairs.pair_P, x_TC.stride(0), C, F),
        constants={"X": X, "N": up.columns, "K": up.step, "EVEN_N": F % up.columns == 0, "EVEN_K": C % up.step == 0, **shared},
        num_warps=up.warps, num_stages=up.stages, early_launch=early_launch,
    ))  # fmt: skip
    z_PC = torch.empty(P, C, dtype=x_TC.dtype, device=x_TC.device)
    down = tiles.down
    down_weight = TensorDescriptor.from_tensor(down_ECF.view(-1, F), [down.columns, down.step]) if tiles.descriptors else down_ECF
    run(Launch(
        kernel=down_grouped, grid=(num_tiles * triton.cdiv(C, down.columns),),
        arguments=(h_PF, down_weight, z_PC, sorted_pairs.tiles_N3, P, C, F),
        constants={"N": down.columns, "K": down.step, "EVEN_N": C % down.columns == 0, "EVEN_K": F % down.step == 0, **shared},
        num_warps=down.warps, num_stages=down.stages, early_launch=early_launch,
    ))  # fmt: skip
    return sum_choices(z_PC, weights_TX, sorted_pairs, early_launch=early_launch, y_TC=y_TC, run=run)


def sum_choices(
    z_PC: torch.Tensor,
    weights_TX: torch.Tensor,
    sorted_pairs: SortedPairs,
    *,
    early_launch: bool = False,
    y_TC: torch.Tensor | None = None,
    run: Callable[[Launch], None] = Launch.run,
) -> torch.Tensor:
    """y[t] = sum over choices x, in order, of weights[t, x] * z[row of pair (t, x)]."""
    (T, X), C = weights_TX.shape, z_PC.shape[1]
    y_TC = torch.empty(T, C, dtype=z_PC.dtype, device=z_PC.device) if y_TC is None else y_TC
    step = min(512, triton.next_power_of_2(C))
    run(Launch(
        kernel=sum_rows, grid=(triton.cdiv(C, step), T), arguments=(z_PC, weights_TX, sorted_pairs.row_P, y_TC, C),
        constants={"X": X, "STEP": step, "EARLY_LAUNCH": early_launch}, num_warps=2, early_launch=early_launch,
    ))  # fmt: skip
    return y_TC


@triton.jit
def multiply(acc, left_MK, right_NK, SWAP: tl.constexpr):
    """acc [M, N] += left right^T, or acc [N, M] += right left^T."""
    if SWAP:
        acc = tl.dot(right_NK, tl.trans(left_MK), acc, input_precision="ieee")
    else:
        acc = tl.dot(left_MK, tl.trans(right_NK), acc, input_precision="ieee")
    return acc


@triton.jit
def load_tile(ptr_RK, real_R, col_K, inner, EVEN_R: tl.constexpr, EVEN_K: tl.constexpr):
    """Rows that EVEN_R calls real are read without a mask."""
    if EVEN_R and EVEN_K:
        tile_RK = tl.load(ptr_RK)
    elif EVEN_K:
        tile_RK = tl.load(ptr_RK, mask=real_R[:, None], other=0.0)
    elif EVEN_R:
        tile_RK = tl.load(ptr_RK, mask=(col_K < inner)[None, :], other=0.0)
    else:
        tile_RK = tl.load(ptr_RK, mask=real_R[:, None] & (col_K < inner)[None, :], other=0.0)
    return tile_RK


@triton.jit
def up_grouped(
    x_ptr,  # [T, C], last axis contiguous
    weight,  # [E, 2F, C]: gate rows, then up rows; pointer or descriptor of [E * 2F, C]
    h_ptr,  # [P, F] by row
    tiles_ptr,  # int32 [tiles, 3]
    pair_ptr,  # int32 [P] by row
    stride_xt,
    C,
    F,
    X: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EARLY_LAUNCH: tl.constexpr,
):
    """h[row, f] = silu(gate_f . x) * (up_f . x) for M rows of one expert and N columns f."""
    if EARLY_LAUNCH:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    programs_a_tile = tl.cdiv(F, N)
    tile_ptr = tiles_ptr + tl.program_id(0) // programs_a_tile * 3
    expert = tl.load(tile_ptr)
    if expert >= 0:
        first_f = tl.program_id(0) % programs_a_tile * N
        row_M = tl.load(tile_ptr + 1) + tl.arange(0, M)
        real_M = row_M < tl.load(tile_ptr + 2)
        # Rows beyond the expert's last compute token 0's products and are not stored.
        token_M = tl.load(pair_ptr + row_M, mask=real_M, other=0) // X
        col_N = first_f + tl.arange(0, N)
        real_N = col_N < F
        x_MK = x_ptr + token_M.to(tl.int64)[:, None] * stride_xt + tl.arange(0, K)[None, :]
        if not DESCRIPTORS:
            gate_NK = weight + expert.to(tl.int64) * 2 * F * C + col_N[:, None] * C + tl.arange(0, K)[None, :]
        gate = tl.zeros([N, M] if SWAP else [M, N], tl.float32)
        up = tl.zeros([N, M] if SWAP else [M, N], tl.float32)
        for start in tl.range(0, C, K):
            col_K = start + tl.arange(0, K)
            left_MK = load_tile(x_MK + start, real_M, col_K, C, True, EVEN_K)
            if DESCRIPTORS:
                gate_w_NK = weight.load([expert * 2 * F + first_f, start])
                up_w_NK = weight.load([expert * 2 * F + F + first_f, start])
            else:
                gate_w_NK = load_tile(gate_NK + start, real_N, col_K, C, EVEN_N, EVEN_K)
                up_w_NK = load_tile(gate_NK + F * C + start, real_N, col_K, C, EVEN_N, EVEN_K)
            gate = multiply(gate, left_MK, gate_w_NK, SWAP)
            up = multiply(up, left_MK, up_w_NK, SWAP)
        h = gate / (1.0 + tl.exp(-gate)) * up
        if SWAP:
            h = tl.trans(h)
        place_MN = row_M.to(tl.int64)[:, None] * F + col_N[None, :]
        tl.store(h_ptr + place_MN, h.to(h_ptr.dtype.element_ty), mask=real_M[:, None] & real_N[None, :])


@triton.jit
def down_grouped(
    h_ptr,  # [P, F] by row
    weight,  # [E, C, F]; pointer or descriptor of [E * C, F]
    z_ptr,  # [P, C] by row
    tiles_ptr,  # int32 [tiles, 3]
    pairs,
    C,
    F,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EARLY_LAUNCH: tl.constexpr,
):
    """z[row, c] = down_c . h[row] for M rows of one expert and N columns c."""
    if EARLY_LAUNCH:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    programs_a_tile = tl.cdiv(C, N)
    tile_ptr = tiles_ptr + tl.program_id(0) // programs_a_tile * 3
    expert = tl.load(tile_ptr)
    if expert >= 0:
        first_c = tl.program_id(0) % programs_a_tile * N
        row_M = tl.load(tile_ptr + 1) + tl.arange(0, M)
        real_M = row_M < tl.load(tile_ptr + 2)
        col_N = first_c + tl.arange(0, N)
        real_N = col_N < C
        # Rows of the next expert are computed too and not stored; rows beyond the last pair are read as the last one.
        h_MK = h_ptr + tl.minimum(row_M, pairs - 1).to(tl.int64)[:, None] * F + tl.arange(0, K)[None, :]
        if not DESCRIPTORS:
            weight_NK = weight + expert.to(tl.int64) * C * F + col_N[:, None] * F + tl.arange(0, K)[None, :]
        acc = tl.zeros([N, M] if SWAP else [M, N], tl.float32)
        for start in tl.range(0, F, K):
            col_K = start + tl.arange(0, K)
            left_MK = load_tile(h_MK + start, real_M, col_K, F, True, EVEN_K)
            if DESCRIPTORS:
                w_NK = weight.load([expert * C + first_c, start])
            else:
                w_NK = load_tile(weight_NK + start, real_N, col_K, F, EVEN_N, EVEN_K)
            acc = multiply(acc, left_MK, w_NK, SWAP)
        if SWAP:
            acc = tl.trans(acc)
        place_MN = row_M.to(tl.int64)[:, None] * C + col_N[None, :]
        tl.store(z_ptr + place_MN, acc.to(z_ptr.dtype.element_ty), mask=real_M[:, None] & real_N[None, :])


@triton.jit
def sum_rows(
    z_ptr,  # [P, C] by row
    weights_ptr,  # [T, X]
    row_ptr,  # int32 [P] by pair
    y_ptr,  # [T, C]
    C,
    X: tl.constexpr,
    STEP: tl.constexpr,
    EARLY_LAUNCH: tl.constexpr,
):
    """y[t, c] = sum over choices, in order, of weight * z."""
    if EARLY_LAUNCH:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    token = tl.program_id(1)
    col_c = tl.program_id(0) * STEP + tl.arange(0, STEP)
    sum_c = tl.zeros([STEP], tl.float32)
    for choice in tl.static_range(X):
        row = tl.load(row_ptr + token * X + choice).to(tl.int64)
        weight = tl.load(weights_ptr + token * X + choice).to(tl.float32)
        sum_c += weight * tl.load(z_ptr + row * C + col_c, mask=col_c < C, other=0.0).to(tl.float32)
    tl.store(y_ptr + token.to(tl.int64) * C + col_c, sum_c.to(y_ptr.dtype.element_ty), mask=col_c < C)
