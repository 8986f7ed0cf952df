"""What the Hopper prefill kernel works on, and its loading warp: the tiles of a unit of work, in their order, by TMA."""

# Triton's kernel language is not typed Python: launches take options and constants that signatures do not name.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# B batch  H query heads  M query rows of a unit of work  N positions of a key tile
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from rtpurbo.kernels.local_attention.tiles import (
    CHUNK,
    RING_WINDOW,
    full_tile,
    index_in_round,
    listed_tile,
    masked_tile,
    plan_listed,
    plan_tiles,
    rounds_of,
    unit_of_work,
)

# Renamed after triton 3.6.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def plan_part(
    b, h, part, t0, length, count, ids_ptr, listed_ptr, B, H, tiles, parts, window, sinks, capacity,
    M: gl.constexpr, N: gl.constexpr, HAS_RING: gl.constexpr, BY_POSITION: gl.constexpr, LISTED: gl.constexpr, PARTED: gl.constexpr,
):  # fmt: skip
    """(first tile, first full tile, end, details): the part's tiles of a unit of work; none where it has no query or an empty list."""
    if LISTED:
        row = (b.to(gl.int64) * H + h) * tiles + t0 // M
        listed = gl.where(t0 < count, gl.load(listed_ptr + row), 0)
        ids_row = ids_ptr + row * capacity
        masked, full = plan_listed(ids_row, listed, length + t0, N, 1)
        total = listed
        details = (ids_row, listed, length + gl.minimum(t0 + M, count))
    else:
        origin = 0 if BY_POSITION else length
        masked, full, details = plan_tiles(t0, length, origin, count, window, sinks, M, N, HAS_RING)
        total = gl.where(t0 < count, masked + full, 0)
    if PARTED:
        return total * part // parts, masked, total * (part + 1) // parts, details
    else:
        return 0, masked, total, details


@gluon.jit
def _load_tile(source, row, b, kh, chunk_desc, ring_desc, sinks_desc, barrier, smem, HAS_RING: gl.constexpr):
    """Start the copy of N rows of one KV head; rows outside the tensor arrive as zeros and count as bytes."""
    mbarrier.expect(barrier, chunk_desc.block_type.nbytes)
    if HAS_RING:
        if source == CHUNK:
            async_load(chunk_desc, [b, kh, row, 0], barrier, smem)
        elif source == RING_WINDOW:
            async_load(ring_desc, [b, kh, row, 0], barrier, smem)
        else:
            async_load(sinks_desc, [b, kh, row, 0], barrier, smem)
    else:
        async_load(chunk_desc, [b, kh, row, 0], barrier, smem)


@gluon.jit
def _load_keys_and_values(n, source, row, b, kh, descs, buffers, STAGES: gl.constexpr, HAS_RING: gl.constexpr):
    k_desc, v_desc, ring_k_desc, ring_v_desc, sinks_k_desc, sinks_v_desc = descs
    k_smem, v_smem, k_full, k_empty, v_full, v_empty = buffers
    stage = n % STAGES
    phase = (n // STAGES) & 1
    mbarrier.wait(k_empty.index(stage), phase ^ 1)
    _load_tile(source, row, b, kh, k_desc, ring_k_desc, sinks_k_desc, k_full.index(stage), k_smem.index(stage), HAS_RING)
    mbarrier.wait(v_empty.index(stage), phase ^ 1)
    _load_tile(source, row, b, kh, v_desc, ring_v_desc, sinks_v_desc, v_full.index(stage), v_smem.index(stage), HAS_RING)


@gluon.jit
def load_partition(
    q_desc, k_desc, v_desc, ring_k_desc, ring_v_desc, sinks_k_desc, sinks_v_desc, lengths_ptr, counts_ptr, ids_ptr, listed_ptr,
    q_smem, q_full, q_empty, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
    B, H, GROUP, tiles, parts, window, sinks, capacity,
    M: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, HAS_RING: gl.constexpr, BY_POSITION: gl.constexpr,
    LISTED: gl.constexpr, PARTED: gl.constexpr,
):  # fmt: skip
    """The loading warp: q once a unit of work, then keys and values in the order of the plan."""
    descs = (k_desc, v_desc, ring_k_desc, ring_v_desc, sinks_k_desc, sinks_v_desc)
    buffers = (k_smem, v_smem, k_full, k_empty, v_full, v_empty)
    units = 0
    n = 0
    programs = gl.num_programs(0)
    for x in range(rounds_of(gl.program_id(0), programs, tiles * B * H * parts)):
        b, h, part, t0 = unit_of_work(index_in_round(x, gl.program_id(0), programs), tiles, B, H, parts, M)
        length = gl.load(lengths_ptr + b)
        count = gl.load(counts_ptr + b)
        kh = h // GROUP
        first, border, end, details = plan_part(
            b, h, part, t0, length, count, ids_ptr, listed_ptr, B, H, tiles, parts, window, sinks, capacity,
            M, N, HAS_RING, BY_POSITION, LISTED, PARTED,
        )  # fmt: skip
        if first < end:
            mbarrier.wait(q_empty, (units & 1) ^ 1)
            mbarrier.expect(q_full, 2 * q_desc.block_type.nbytes)
            async_load(q_desc, [b, kh, h % GROUP, t0, 0], q_full, q_smem.index(0))
            async_load(q_desc, [b, kh, h % GROUP, t0 + M // 2, 0], q_full, q_smem.index(1))
            units += 1
            if LISTED:
                ids_row, listed, newest = details
                row, low = listed_tile(first, ids_row, listed, newest, N, 1)
                for y in range(first, end):
                    # One id ahead: its way from memory takes a third of a tile's time.
                    following, low = listed_tile(gl.minimum(y + 1, listed - 1), ids_row, listed, newest, N, 1)
                    _load_keys_and_values(n, 0, row, b, kh, descs, buffers, STAGES, HAS_RING)
                    row = following
                    n += 1
            else:
                for y in range(first, gl.minimum(border, end)):
                    source, row, j0, low, width = masked_tile(y, details, window, sinks, N, HAS_RING)
                    _load_keys_and_values(n, source, row, b, kh, descs, buffers, STAGES, HAS_RING)
                    n += 1
                for y in range(gl.maximum(border, first) - border, end - border):
                    source, row = full_tile(y, details, window, N, HAS_RING)
                    _load_keys_and_values(n, source, row, b, kh, descs, buffers, STAGES, HAS_RING)
                    n += 1
