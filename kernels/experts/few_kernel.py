"""Experts for a few tokens in Triton: matrix-vector products that stream each pair's weights once, without sorting."""
# Triton's compiler, not Python's type rules, decides what the jitted functions mean:
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false, reportIndexIssue=false

# T tokens  X experts a token  P pairs (token * X + choice)  E experts  C hidden width  F expert width
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from rtpurbo.kernels.launch import Launch


@dataclass(frozen=True, kw_only=True)
class FewTiles:
    """Rows of W a program owns, columns of a step and warps, for both products.

    Small programs in numbers: several sit on a multiprocessor at once, and their loads are all in flight together.
    """

    up_rows: int = 2
    up_step: int = 1024
    up_warps: int = 2
    down_rows: int = 4
    down_step: int = 128
    down_warps: int = 4


def mix_experts(
    x_TC: torch.Tensor,
    ids_TX: torch.Tensor,
    weights_TX: torch.Tensor,
    gate_up_EGC: torch.Tensor,
    down_ECF: torch.Tensor,
    *,
    tiles: FewTiles | None = None,
    early_launch: bool = False,
    y_TC: torch.Tensor | None = None,
    run: Callable[[Launch], None] = Launch.run,
) -> torch.Tensor:
    """See rtpurbo.kernels.experts.mix_experts; early_launch overlaps each launch with the end of the one before it."""
    T, C = x_TC.shape
    X, F = ids_TX.shape[1], down_ECF.shape[2]
    tiles = FewTiles() if tiles is None else tiles
    h_PF = torch.empty(T * X, F, dtype=x_TC.dtype, device=x_TC.device)
    y_TC = torch.empty(T, C, dtype=x_TC.dtype, device=x_TC.device) if y_TC is None else y_TC
    up_step = min(tiles.up_step, triton.next_power_of_2(C))
    run(Launch(
        kernel=up_few, grid=(triton.cdiv(F, tiles.up_rows), T * X),
        arguments=(x_TC, ids_TX, gate_up_EGC, h_PF, x_TC.stride(0), F),
        constants={
            "C": C, "X": X, "ROWS": tiles.up_rows, "STEP": up_step, "EVEN": F % tiles.up_rows == 0 and C % up_step == 0,
            "EARLY_LAUNCH": early_launch,
        },
        num_warps=tiles.up_warps, early_launch=early_launch,
    ))  # fmt: skip
    down_step = min(tiles.down_step, triton.next_power_of_2(F))
    run(Launch(
        kernel=down_few, grid=(triton.cdiv(C, tiles.down_rows), T),
        arguments=(h_PF, ids_TX, weights_TX, down_ECF, y_TC, C),
        constants={
            "F": F, "X": X, "X_PADDED": triton.next_power_of_2(X), "ROWS": tiles.down_rows, "STEP": down_step,
            "EVEN": C % tiles.down_rows == 0 and F % down_step == 0 and triton.next_power_of_2(X) == X,
            "EARLY_LAUNCH": early_launch,
        },
        num_warps=tiles.down_warps, early_launch=early_launch,
    ))  # fmt: skip
    return y_TC


@triton.jit
def up_few(
    x_ptr,  # [T, C], last axis contiguous
    ids_ptr,  # int [T, X]
    weight_ptr,  # [E, 2F, C]: gate rows, then up rows
    h_ptr,  # [P, F]
    stride_xt,
    F,
    C: tl.constexpr,
    X: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    EVEN: tl.constexpr,
    EARLY_LAUNCH: tl.constexpr,
):
    """h[pair, f] = silu(gate_f . x) * (up_f . x) for ROWS rows f of the pair's expert."""
    if EARLY_LAUNCH:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    pair = tl.program_id(1)
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    row_f = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x_row = x_ptr + (pair // X).to(tl.int64) * stride_xt
    gate_base = weight_ptr + expert * 2 * F * C
    up_base = gate_base + F * C
    gate_fc = tl.zeros([ROWS, STEP], tl.float32)
    up_fc = tl.zeros([ROWS, STEP], tl.float32)
    for start in tl.static_range(0, C, STEP):
        col_c = start + tl.arange(0, STEP)
        place_fc = row_f[:, None] * C + col_c[None, :]
        if EVEN:
            x_c = tl.load(x_row + col_c).to(tl.float32)
            gate_w_fc = tl.load(gate_base + place_fc)
            up_w_fc = tl.load(up_base + place_fc)
        else:
            mask_fc = (row_f < F)[:, None] & (col_c < C)[None, :]
            x_c = tl.load(x_row + col_c, mask=col_c < C, other=0.0).to(tl.float32)
            gate_w_fc = tl.load(gate_base + place_fc, mask=mask_fc, other=0.0)
            up_w_fc = tl.load(up_base + place_fc, mask=mask_fc, other=0.0)
        gate_fc += gate_w_fc.to(tl.float32) * x_c[None, :]
        up_fc += up_w_fc.to(tl.float32) * x_c[None, :]
    gate_f = tl.sum(gate_fc, axis=1)
    h_f = gate_f / (1.0 + tl.exp(-gate_f)) * tl.sum(up_fc, axis=1)
    tl.store(h_ptr + pair.to(tl.int64) * F + row_f, h_f.to(h_ptr.dtype.element_ty), mask=row_f < F)


@triton.jit
def down_tile(base_X11, row_r, col_f, C, F: tl.constexpr, real_X11, EVEN: tl.constexpr):
    place_1rf = (row_r[:, None] * F + col_f[None, :])[None, :, :]
    if EVEN:
        weight_Xrf = tl.load(base_X11 + place_1rf)
    else:
        mask_1rf = ((row_r < C)[:, None] & (col_f < F)[None, :])[None, :, :]
        weight_Xrf = tl.load(base_X11 + place_1rf, mask=mask_1rf & real_X11, other=0.0)
    return weight_Xrf


@triton.jit
def down_few(
    h_ptr,  # [P, F]
    ids_ptr,  # int [T, X]
    weights_ptr,  # [T, X]
    weight_ptr,  # [E, C, F]
    y_ptr,  # [T, C]
    C,
    F: tl.constexpr,
    X: tl.constexpr,
    X_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    EVEN: tl.constexpr,
    EARLY_LAUNCH: tl.constexpr,
):
    """y[t, c] = sum over the token's experts of w * (down_c . h) for ROWS columns c: one program owns them, so the order is fixed."""
    token = tl.program_id(1)
    choice_X = tl.arange(0, X_PADDED)
    real_X = choice_X < X
    # The ids are older than the launch before this one, which waited for them; only h must be waited for.
    expert_X = tl.load(ids_ptr + token * X + choice_X, mask=real_X, other=0).to(tl.int64)
    routing_X = tl.load(weights_ptr + token * X + choice_X, mask=real_X, other=0.0).to(tl.float32)
    row_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    base_X11 = weight_ptr + (expert_X * C * F)[:, None, None]
    real_X11 = real_X[:, None, None]
    h_base_X1 = h_ptr + ((token * X + choice_X).to(tl.int64) * F)[:, None]
    weight_Xrf = down_tile(base_X11, row_r, tl.arange(0, STEP), C, F, real_X11, EVEN)
    if EARLY_LAUNCH:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    sum_Xrf = tl.zeros([X_PADDED, ROWS, STEP], tl.float32)
    for start in tl.static_range(0, F, STEP):
        col_f = start + tl.arange(0, STEP)
        h_Xf = tl.load(h_base_X1 + col_f[None, :], mask=real_X[:, None] & (col_f < F)[None, :], other=0.0).to(tl.float32)
        h_Xf = h_Xf * routing_X[:, None]
        if start > 0:
            weight_Xrf = down_tile(base_X11, row_r, col_f, C, F, real_X11, EVEN)
        sum_Xrf += weight_Xrf.to(tl.float32) * h_Xf[:, None, :]
    y_r = tl.sum(tl.sum(sum_Xrf, axis=2), axis=0)
    tl.store(y_ptr + token.to(tl.int64) * C + row_r, y_r.to(y_ptr.dtype.element_ty), mask=row_r < C)
