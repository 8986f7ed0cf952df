"""Hopper (sm_90) prefill attention in Gluon: one warp loads by TMA, two warpgroups take turns at wgmma and softmax; plans in tiles.py."""

# Triton's kernel language is not typed Python: launches take options and constants that signatures do not name.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# B batch  T chunk tokens  W ring slots (sinks + window)  K kv heads  G query heads per kv head  D head dim  H = K * G
# Q query blocks  N listed key blocks
# A persistent program works on M = 128 query rows of one head at a time, 64 a warpgroup, against key tiles of N = 128 positions.
# Within a warpgroup the product q k^T of the next tile is issued before the softmax of the one that p v still multiplies.
import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from rtpurbo.kernels.launch import Launch
from rtpurbo.kernels.local_attention.descriptors import descriptor
from rtpurbo.kernels.local_attention.hopper_loading import load_partition, plan_part
from rtpurbo.kernels.local_attention.merge import merge_parts, parts_for
from rtpurbo.kernels.local_attention.tiles import (
    LN_2,
    LOG2_E,
    UNBOUNDED,
    index_in_round,
    listed_tile,
    masked_tile,
    oldest_visible,
    rounds_of,
    unit_of_work,
)

BLOCK_QUERIES = 128
BLOCK_KEYS = 128


@gluon.jit
def _masked_tile(x, details, window, sinks, N: gl.constexpr, HAS_RING: gl.constexpr, LISTED: gl.constexpr):
    """(first position, lowest position of the run, width of its window) of a masked tile."""
    if LISTED:
        ids_row, listed, newest = details
        j0, low = listed_tile(x, ids_row, listed, newest, N, 1)
        return j0, low, UNBOUNDED
    else:
        source, row, j0, low, width = masked_tile(x, details, window, sinks, N, HAS_RING)
        return j0, low, width


@gluon.jit
def _hide(s, i, j0, low, width, N: gl.constexpr, S_LAYOUT: gl.constexpr):
    """-inf where the tile that starts at position j0 is out of sight."""
    c = gl.arange(0, N, gl.SliceLayout(0, S_LAYOUT))[None, :]
    s = gl.where(c >= (oldest_visible(i, low, width) - j0)[:, None], s, float("-inf"))
    return gl.where(c <= (i - j0)[:, None], s, float("-inf"))


@gluon.jit
def _softmax(s, m, total, scale_log2, MASKED: gl.constexpr):
    """Online softmax in base 2: weights, new maximum, new sum, and the factor for what was summed before."""
    m_new = gl.maximum(m, gl.max(s, 1) * scale_log2)
    # A row that has seen no key yet keeps a maximum of -inf: subtract 0 there, not -inf.
    shift = gl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    alpha = gl.exp2(m - shift)
    p = gl.exp2(s * scale_log2 - shift[:, None])
    return p, m_new, total * alpha + gl.sum(p, 1), alpha


@gluon.jit
def _step(
    n, turn, i, j0, low, width, scale_log2, p, m, total, acc, q, buffers, my_turn, other_turn,
    MASKED: gl.constexpr, D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, S_LAYOUT: gl.constexpr,
    O_LAYOUT: gl.constexpr, PING_PONG: gl.constexpr,
):  # fmt: skip
    """q k^T of tile n and p v of tile n - 1 in flight together, then the softmax of tile n."""
    k_smem, v_smem, k_full, k_empty, v_full, v_empty = buffers
    stage = n % STAGES
    last = (n - 1) % STAGES
    mbarrier.wait(k_full.index(stage), (n // STAGES) & 1)
    if PING_PONG:
        mbarrier.wait(my_turn, turn & 1)
    nothing = gl.zeros([64, N], gl.float32, S_LAYOUT)
    k = k_smem.index(stage).reshape([N, D])
    s = warpgroup_mma(q, k.permute([1, 0]), nothing, use_acc=False, is_async=True)
    p = gl.convert_layout(p.to(k_smem.dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
    acc = warpgroup_mma(p, v_smem.index(last).reshape([N, D]), acc, is_async=True)
    if PING_PONG:
        mbarrier.arrive(other_turn, count=1)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_empty.index(stage), count=1)
    if MASKED:
        s = _hide(s, i, j0, low, width, N, S_LAYOUT)
    p_new, m, total, alpha = _softmax(s, m, total, scale_log2, MASKED)
    # These values of tile n are wanted only in the next step, but this wait and p_new's way through the next one keep the compiler
    # from moving the softmax behind the end of p v, where it would overlap nothing.
    mbarrier.wait(v_full.index(stage), (n // STAGES) & 1)
    acc, p, p_new = warpgroup_mma_wait(0, deps=[acc, p, p_new])
    mbarrier.arrive(v_empty.index(last), count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]
    return p_new, m, total, acc


@gluon.jit
def _attend_partition(
    out_ptr, lse_ptr, stride_op, stride_ob, stride_ot, stride_ok, stride_og, lengths_ptr, counts_ptr, ids_ptr, listed_ptr,
    q_smem, q_full, q_empty, k_smem, v_smem, k_full, k_empty, v_full, v_empty, my_turn, other_turn,
    B, H, GROUP, T, tiles, parts, window, sinks, scale_log2, capacity,
    HALF: gl.constexpr, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    HAS_RING: gl.constexpr, BY_POSITION: gl.constexpr, LISTED: gl.constexpr, PARTED: gl.constexpr, HAS_LSE: gl.constexpr,
    PING_PONG: gl.constexpr,
):  # fmt: skip
    """One of the two warpgroups that compute: query rows HALF * 64 ... of every unit of work."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    buffers = (k_smem, v_smem, k_full, k_empty, v_full, v_empty)
    q = q_smem.index(HALF).reshape([M // 2, D])
    n = 0
    units = 0
    # The first half starts: its first turn counts as already given.
    turn = 1 - HALF
    programs = gl.num_programs(0)
    for x in range(rounds_of(gl.program_id(0), programs, tiles * B * H * parts)):
        b, h, part, t0 = unit_of_work(index_in_round(x, gl.program_id(0), programs), tiles, B, H, parts, M)
        length = gl.load(lengths_ptr + b)
        count = gl.load(counts_ptr + b)
        acc = gl.zeros([M // 2, D], gl.float32, O_LAYOUT)
        m = gl.full([M // 2], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
        total = gl.full([M // 2], 0.0, gl.float32, gl.SliceLayout(1, S_LAYOUT))
        t = t0 + HALF * (M // 2) + gl.arange(0, M // 2, gl.SliceLayout(1, S_LAYOUT))
        i = length + t
        first, border, end, details = plan_part(
            b, h, part, t0, length, count, ids_ptr, listed_ptr, B, H, tiles, parts, window, sinks, capacity,
            M, N, HAS_RING, BY_POSITION, LISTED, PARTED,
        )  # fmt: skip
        if first < end:
            if PARTED:
                # The first tile goes through the mask in any case; a full one has position 0 here, which hides nothing from its queries.
                j0, low, width = _masked_tile(gl.minimum(first, border - 1), details, window, sinks, N, HAS_RING, LISTED)
                j0, low = gl.where(first < border, j0, 0), gl.where(first < border, low, 0)
                width = gl.where(first < border, width, UNBOUNDED)
            else:
                j0, low, width = _masked_tile(0, details, window, sinks, N, HAS_RING, LISTED)
            mbarrier.wait(q_full, units & 1)
            units += 1
            mbarrier.wait(k_full.index(n % STAGES), (n // STAGES) & 1)
            k = k_smem.index(n % STAGES).reshape([N, D])
            nothing = gl.zeros([M // 2, N], gl.float32, S_LAYOUT)
            s = warpgroup_mma(q, k.permute([1, 0]), nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_empty.index(n % STAGES), count=1)
            s = _hide(s, i, j0, low, width, N, S_LAYOUT)
            p, m, total, alpha = _softmax(s, m, total, scale_log2, True)
            mbarrier.wait(v_full.index(n % STAGES), (n // STAGES) & 1)
            n += 1
            for y in range(first + 1, gl.minimum(border, end)):
                j0, low, width = _masked_tile(y, details, window, sinks, N, HAS_RING, LISTED)
                p, m, total, acc = _step(
                    n, turn, i, j0, low, width, scale_log2, p, m, total, acc, q, buffers, my_turn, other_turn,
                    True, D, N, STAGES, S_LAYOUT, O_LAYOUT, PING_PONG,
                )  # fmt: skip
                n += 1
                turn += 1
            for _ in range(gl.maximum(border, first + 1), end):
                p, m, total, acc = _step(
                    n, turn, i, 0, 0, 0, scale_log2, p, m, total, acc, q, buffers, my_turn, other_turn,
                    False, D, N, STAGES, S_LAYOUT, O_LAYOUT, PING_PONG,
                )  # fmt: skip
                n += 1
                turn += 1
            mbarrier.arrive(q_empty, count=1)
            last = n - 1
            p16 = gl.convert_layout(p.to(k_smem.dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
            acc = warpgroup_mma(p16, v_smem.index(last % STAGES).reshape([N, D]), acc, is_async=True)
            acc, p16 = warpgroup_mma_wait(0, deps=[acc, p16])
            mbarrier.arrive(v_empty.index(last % STAGES), count=1)
        seen = (t < count) & (total != 0)
        total_safe = gl.where(seen, total, 1.0)
        if HAS_LSE:
            lse = gl.where(seen, (m + gl.log2(total_safe)) * LN_2, float("-inf"))
            gl.store(lse_ptr + ((part * B + b).to(gl.int64) * H + h) * T + t, lse, mask=t < T)
        row_layout: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
        t_out = gl.convert_layout(t, row_layout)
        # Rows that see nothing: acc may hold anything that was loaded, weight zero does not make it zero.
        inverse = gl.convert_layout(gl.where(seen, 1.0 / total_safe, 0.0), row_layout)
        out = gl.where((inverse != 0)[:, None], acc * inverse[:, None], 0.0)
        d = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
        out_base = out_ptr + part.to(gl.int64) * stride_op + b.to(gl.int64) * stride_ob + t0.to(gl.int64) * stride_ot
        out_base += (h // GROUP) * stride_ok + (h % GROUP) * stride_og
        gl.store(out_base + (t_out - t0)[:, None] * stride_ot + d[None, :], out.to(out_ptr.dtype.element_ty), mask=(t_out < T)[:, None])


@gluon.jit(do_not_specialize=["B", "H", "GROUP", "T", "tiles", "parts", "window", "sinks", "capacity"])
def _prefill_hopper(
    q_desc, k_desc, v_desc, ring_k_desc, ring_v_desc, sinks_k_desc, sinks_v_desc, out_ptr, lse_ptr,
    lengths_ptr, counts_ptr, ids_ptr, listed_ptr, stride_op, stride_ob, stride_ot, stride_ok, stride_og,
    B, H, GROUP, T, tiles, parts, window, sinks, scale_log2, capacity,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, HAS_RING: gl.constexpr,
    BY_POSITION: gl.constexpr, LISTED: gl.constexpr, PARTED: gl.constexpr, HAS_LSE: gl.constexpr, PING_PONG: gl.constexpr,
):  # fmt: skip
    """Persistent: each program walks the units of work with the stride of the grid."""
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, 1, M // 2, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, N, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, N, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    turn_a = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    turn_b = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    mbarrier.init(turn_a, count=1)
    mbarrier.init(turn_b, count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(k_empty.index(s), count=2)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(v_empty.index(s), count=2)
    # The arguments stay literal tuples: a tuple held in a variable loses its constexprs.
    gl.warp_specialize(
        [
            (_attend_partition, (
                out_ptr, lse_ptr, stride_op, stride_ob, stride_ot, stride_ok, stride_og, lengths_ptr, counts_ptr, ids_ptr, listed_ptr,
                q_smem, q_full, q_empty, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn_a, turn_b,
                B, H, GROUP, T, tiles, parts, window, sinks, scale_log2, capacity, gl.constexpr(0), M, N, D, STAGES, HAS_RING, BY_POSITION,
                LISTED, PARTED, HAS_LSE, PING_PONG,
            )),
            (_attend_partition, (
                out_ptr, lse_ptr, stride_op, stride_ob, stride_ot, stride_ok, stride_og, lengths_ptr, counts_ptr, ids_ptr, listed_ptr,
                q_smem, q_full, q_empty, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn_b, turn_a,
                B, H, GROUP, T, tiles, parts, window, sinks, scale_log2, capacity, gl.constexpr(1), M, N, D, STAGES, HAS_RING, BY_POSITION,
                LISTED, PARTED, HAS_LSE, PING_PONG,
            )),
            (load_partition, (
                q_desc, k_desc, v_desc, ring_k_desc, ring_v_desc, sinks_k_desc, sinks_v_desc, lengths_ptr, counts_ptr, ids_ptr, listed_ptr,
                q_smem, q_full, q_empty, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                B, H, GROUP, tiles, parts, window, sinks, capacity, M, N, STAGES, HAS_RING, BY_POSITION, LISTED,
                PARTED,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def launch(
    q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, lengths_B: torch.Tensor, counts_B: torch.Tensor,
    ring_k_BWKD: torch.Tensor | None, ring_v_BWKD: torch.Tensor | None, out_BTHD: torch.Tensor, lse_BHT: torch.Tensor | None,
    *, window: int, sinks: int, scale: float, by_position: bool = False, lists: tuple[torch.Tensor, torch.Tensor] | None = None,
    stages: int = 2, ping_pong: bool = True, parts: int | None = None,
) -> None:  # fmt: skip
    """See `kernel.describe`; fp16 or bf16, head dim 64 or 128, addresses and strides multiples of 16 bytes, blocks of 128.

    parts: pieces along the keys that are merged by a second launch (None: `parts_for` decides, from shapes alone).
    """
    K = k_BTKD.shape[2]
    q_BTKGD, out_BTKGD = (x if x.dim() == 5 else x.unflatten(2, (K, x.shape[2] // K)) for x in (q_BTHD, out_BTHD))
    B, T, _, G, D = q_BTKGD.shape
    if out_BTKGD.numel() == 0:
        return
    programs = torch.cuda.get_device_properties(q_BTKGD.device).multi_processor_count
    units, H = triton.cdiv(T, BLOCK_QUERIES) * B * K * G, K * G
    if parts is None:
        keys = min(k_BTKD.shape[1], window + sinks) if by_position else 0
        parts = parts_for(units, programs, keys, 4 * BLOCK_QUERIES * D)
    written, written_lse, stride_part = out_BTKGD, lse_BHT, 0
    if parts > 1:
        part_PBTHD = torch.empty((parts, B, T, H, D), dtype=torch.float32, device=q_BTKGD.device)
        written_lse = torch.empty((parts, B, H, T), dtype=torch.float32, device=q_BTKGD.device)
        written, stride_part = part_PBTHD[0].unflatten(2, (K, G)), part_PBTHD.stride(0)
    describe(
        q_BTKGD, k_BTKD, v_BTKD, lengths_B, counts_B, ring_k_BWKD, ring_v_BWKD, written, written_lse, window=window, sinks=sinks,
        scale=scale, by_position=by_position, lists=lists, stages=stages, ping_pong=ping_pong, parts=parts, stride_part=stride_part,
        programs=programs,
    ).run()  # fmt: skip
    if parts > 1:
        assert written_lse is not None
        merge_parts(part_PBTHD, written_lse, out_BTKGD, lse_BHT)


def describe(
    q_BTKGD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, lengths_B: torch.Tensor, counts_B: torch.Tensor,
    ring_k_BWKD: torch.Tensor | None, ring_v_BWKD: torch.Tensor | None, out_BTKGD: torch.Tensor, lse_BHT: torch.Tensor | None,
    *, window: int, sinks: int, scale: float, by_position: bool = False, lists: tuple[torch.Tensor, torch.Tensor] | None = None,
    stages: int = 2, ping_pong: bool = True, parts: int = 1, stride_part: int = 0, programs: int,
) -> Launch:  # fmt: skip
    """The launch that writes out (and lse, where given); programs: at most so many, one a multiprocessor.

    parts: out and lse are the first of so many results, each over a part of the keys and stride_part values behind the last.
    """
    B, T, K, G, D = q_BTKGD.shape
    tiles = triton.cdiv(T, BLOCK_QUERIES)
    k_desc, v_desc = descriptor(k_BTKD, BLOCK_KEYS), descriptor(v_BTKD, BLOCK_KEYS)
    ring_descs = [k_desc, v_desc, k_desc, v_desc]
    if ring_k_BWKD is not None and ring_v_BWKD is not None:
        ring_descs = [descriptor(x[:, sinks:], BLOCK_KEYS) for x in (ring_k_BWKD, ring_v_BWKD)]
        ring_descs += [descriptor(x[:, : max(sinks, 1)], BLOCK_KEYS) for x in (ring_k_BWKD, ring_v_BWKD)]
    ids, count = (lengths_B, lengths_B) if lists is None else lists
    return Launch(
        kernel=_prefill_hopper,
        grid=(min(programs, tiles * B * K * G * parts),),
        arguments=(
            descriptor(q_BTKGD, BLOCK_QUERIES // 2), k_desc, v_desc, *ring_descs, out_BTKGD, out_BTKGD if lse_BHT is None else lse_BHT,
            lengths_B, counts_B, ids, count, stride_part, *out_BTKGD.stride()[:4], B, K * G, G, T, tiles, parts, window, sinks,
            scale * LOG2_E.value, ids.shape[-1],
        ),
        constants={
            "M": BLOCK_QUERIES, "N": BLOCK_KEYS, "D": D, "STAGES": stages, "HAS_RING": ring_k_BWKD is not None,
            "BY_POSITION": by_position, "LISTED": lists is not None, "PARTED": parts > 1, "HAS_LSE": lse_BHT is not None,
            "PING_PONG": ping_pong,
        },
        num_warps=4,
    )  # fmt: skip
