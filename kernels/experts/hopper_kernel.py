"""Hopper (sm_90) grouped products in Gluon: one warp loads by TMA, two warpgroups multiply 64 rows each against 256 columns."""

# Triton's kernel language is not typed Python: launches take options and constants that signatures do not name.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# T tokens  X experts a token  P pairs, as rows sorted by expert  E experts  C hidden width  F expert width
# In the kernels: M rows of a tile, N weight rows of a tile (in two boxes), K step of the inner axis
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from rtpurbo.kernels.experts.kernel import sum_choices
from rtpurbo.kernels.experts.sorting import sort_pairs
from rtpurbo.kernels.launch import Launch

# Renamed after triton 3.6.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

M, N, K, STAGES = 128, 256, 64, 4


def mix_experts(
    x_TC: torch.Tensor,
    ids_TX: torch.Tensor,
    weights_TX: torch.Tensor,
    gate_up_EGC: torch.Tensor,
    down_ECF: torch.Tensor,
    *,
    y_TC: torch.Tensor | None = None,
    programs: int | None = None,
    run: Callable[[Launch], None] = Launch.run,
) -> torch.Tensor:
    """See rtpurbo.kernels.experts.mix_experts; fp16 or bf16, C a multiple of 256 and F of 128. programs: one a multiprocessor."""
    E, C, F = down_ECF.shape
    P, X = ids_TX.numel(), ids_TX.shape[1]
    sorted_pairs = sort_pairs(ids_TX, E, tile_rows=M, early_launch=True, run=run)
    x_PC, h_PF, z_PC = (torch.empty(P, width, dtype=x_TC.dtype, device=x_TC.device) for width in (C, F, C))
    # Gathering rows in the product itself (asynchronous copies with a pointer a row) was slower up to 2048 tokens, 4 % faster at 8192.
    run(Launch(
        kernel=copy_rows, grid=(P,), arguments=(x_TC, sorted_pairs.pair_P, x_PC, x_TC.stride(0), C),
        constants={"X": X, "STEP": min(2048, triton.next_power_of_2(C))},
    ))  # fmt: skip
    programs = programs or torch.cuda.get_device_properties(x_TC.device).multi_processor_count
    tiles = sorted_pairs.tiles_N3
    for left, weight, out, gated in ((x_PC, gate_up_EGC, h_PF, True), (h_PF, down_ECF, z_PC, False)):
        columns = out.shape[1] // (N // 2 if gated else N)
        run(Launch(
            kernel=_grouped_product, grid=(min(programs, tiles.shape[0] * columns),),
            arguments=(
                _descriptor(left, M), _descriptor(weight.view(-1, left.shape[1]), N // 2), out, tiles, tiles.shape[0] * columns, columns,
                weight.shape[1], left.shape[1], out.shape[1],
            ),
            constants={"M": M, "N": N, "K": K, "STAGES": STAGES, "GATED": gated}, num_warps=4,
        ))  # fmt: skip
    return sum_choices(z_PC, weights_TX, sorted_pairs, early_launch=True, y_TC=y_TC, run=run)


def _descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    dtype = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[x.dtype]
    return TensorDescriptor.from_tensor(x, [rows, K], gl.NVMMASharedLayout.get_default_for([rows, K], dtype))


@triton.jit
def copy_rows(x_ptr, pair_ptr, out_ptr, stride_xt, C, X: tl.constexpr, STEP: tl.constexpr):
    """out[row] = x[token of the row's pair]."""
    row = tl.program_id(0).to(tl.int64)
    token = (tl.load(pair_ptr + row) // X).to(tl.int64)
    for start in range(0, C, STEP):
        col_c = start + tl.arange(0, STEP)
        tl.store(out_ptr + row * C + col_c, tl.load(x_ptr + token * stride_xt + col_c, mask=col_c < C), mask=col_c < C)


@gluon.jit
def _tile_of(tiles_ptr, unit, units, columns):
    """(expert, first row, end row) of a unit's tile; of the last unit's beyond the last. Read one unit ahead: it hides the latency."""
    tile_ptr = tiles_ptr + gl.minimum(unit, units - 1) // columns * 3
    return gl.load(tile_ptr), gl.load(tile_ptr + 1), gl.load(tile_ptr + 2)


@gluon.jit
def _weight_rows(expert, column, weight_rows, N: gl.constexpr, GATED: gl.constexpr):
    """First rows of a tile's two boxes: the same columns of gate and up, or two neighbours."""
    if GATED:
        first = expert * weight_rows + column * (N // 2)
        second = first + weight_rows // 2
    else:
        first = expert * weight_rows + column * N
        second = first + N // 2
    return first, second


@gluon.jit
def _load_partition(
    left_desc, weight_desc, tiles_ptr, left_smem, weight_smem, full, empty, units, columns, weight_rows, inner,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """The loading warp: for each unit of work the steps of its inner axis, as far ahead as there are stages."""
    n = 0
    expert, row, _ = _tile_of(tiles_ptr, gl.program_id(0), units, columns)
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        next_expert, next_row, _ = _tile_of(tiles_ptr, unit + gl.num_programs(0), units, columns)
        if expert >= 0:
            first, second = _weight_rows(expert, unit % columns, weight_rows, N, GATED)
            for start in range(0, inner, K):
                stage = n % STAGES
                mbarrier.wait(empty.index(stage), ((n // STAGES) & 1) ^ 1)
                barrier = full.index(stage)
                mbarrier.expect(barrier, left_desc.block_type.nbytes + 2 * weight_desc.block_type.nbytes)
                # Rows beyond the last pair arrive as zeros and count as bytes.
                async_load(left_desc, [row, start], barrier, left_smem.index(stage))
                async_load(weight_desc, [first, start], barrier, weight_smem.index(stage).slice(0, N // 2))
                async_load(weight_desc, [second, start], barrier, weight_smem.index(stage).slice(N // 2, N // 2))
                n += 1
        expert, row = next_expert, next_row


@gluon.jit
def _multiply_partition(
    out_ptr, tiles_ptr, left_smem, weight_smem, full, empty, units, columns, inner, out_columns,
    HALF: gl.constexpr, M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """One of the two warpgroups that multiply: rows HALF * 64 ... of every unit of work; without a row it only frees the stages."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    n = 0
    expert, tile_row, end_row = _tile_of(tiles_ptr, gl.program_id(0), units, columns)
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        next_expert, next_row, next_end = _tile_of(tiles_ptr, unit + gl.num_programs(0), units, columns)
        first_row = tile_row + HALF * (M // 2)
        if expert >= 0:
            if first_row < end_row:
                acc = gl.zeros([M // 2, N], gl.float32, LAYOUT)
                for start in range(0, inner, K):
                    stage = n % STAGES
                    mbarrier.wait(full.index(stage), (n // STAGES) & 1)
                    left = left_smem.index(stage).slice(HALF * (M // 2), M // 2)
                    weight = weight_smem.index(stage).permute([1, 0])
                    acc = warpgroup_mma(left, weight, acc, is_async=True)
                    acc = warpgroup_mma_wait(1, deps=[acc])
                    if start > 0:
                        mbarrier.arrive(empty.index((n - 1) % STAGES), count=1)
                    n += 1
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(empty.index((n - 1) % STAGES), count=1)
                pair = acc.reshape([M // 2, 2, N // 2]).permute([0, 2, 1])
                first, second = gl.split(pair)
                if GATED:
                    out = first / (1.0 + gl.exp(-first)) * second
                    _store_half(out_ptr, out, first_row, end_row, unit % columns * (N // 2), out_columns, M, N)
                else:
                    _store_half(out_ptr, first, first_row, end_row, unit % columns * N, out_columns, M, N)
                    _store_half(out_ptr, second, first_row, end_row, unit % columns * N + N // 2, out_columns, M, N)
            else:
                for _ in range(0, inner, K):
                    stage = n % STAGES
                    mbarrier.wait(full.index(stage), (n // STAGES) & 1)
                    mbarrier.arrive(empty.index(stage), count=1)
                    n += 1
        expert, tile_row, end_row = next_expert, next_row, next_end


@gluon.jit
def _store_half(out_ptr, tile, first_row, end_row, first_column, out_columns, M: gl.constexpr, N: gl.constexpr):
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N // 2, 16])
    tile = gl.convert_layout(tile.to(out_ptr.dtype.element_ty), LAYOUT)
    row = first_row + gl.arange(0, M // 2, gl.SliceLayout(1, LAYOUT))
    column = first_column + gl.arange(0, N // 2, gl.SliceLayout(0, LAYOUT))
    gl.store(out_ptr + row.to(gl.int64)[:, None] * out_columns + column[None, :], tile, mask=(row < end_row)[:, None])


@gluon.jit
def _grouped_product(
    left_desc,  # [P, inner] by row
    weight_desc,  # [E * weight_rows, inner]
    out_ptr,  # [P, out_columns] by row
    tiles_ptr,  # int32 [tiles, 3]
    units,
    columns,
    weight_rows,
    inner,
    out_columns,
    M: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    STAGES: gl.constexpr,
    GATED: gl.constexpr,
):
    """out = left weight_e^T, or silu(left gate_e^T) * (left up_e^T). Persistent: unit of work = (tile of rows, tile of columns)."""
    dtype: gl.constexpr = left_desc.dtype
    left_smem = gl.allocate_shared_memory(dtype, [STAGES, M, K], left_desc.layout)
    weight_smem = gl.allocate_shared_memory(dtype, [STAGES, N, K], weight_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)
    # The arguments stay literal tuples: a tuple held in a variable loses its constexprs.
    gl.warp_specialize(
        [
            (_multiply_partition, (
                out_ptr, tiles_ptr, left_smem, weight_smem, full, empty, units, columns, inner, out_columns,
                gl.constexpr(0), M, N, K, STAGES, GATED,
            )),
            (_multiply_partition, (
                out_ptr, tiles_ptr, left_smem, weight_smem, full, empty, units, columns, inner, out_columns,
                gl.constexpr(1), M, N, K, STAGES, GATED,
            )),
            (_load_partition, (
                left_desc, weight_desc, tiles_ptr, left_smem, weight_smem, full, empty, units, columns, weight_rows, inner,
                M, N, K, STAGES, GATED,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
