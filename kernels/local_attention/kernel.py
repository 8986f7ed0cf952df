"""Portable Triton kernel of attend_local, and the tile plan it shares with the Hopper kernel."""

# Triton's kernel language is not typed Python: launches take options and constants that signatures do not name.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# B batch  T chunk tokens  W ring slots (sinks + window)  H query heads  K kv heads  D head dim
# A key tile is a run of consecutive positions that lies contiguously in one source: the chunk, the ring's window slots before or
# after the write position, or the ring's sinks. Tiles are aligned to the END of their run, so that none reaches past the last
# written row: an unwritten row may hold NaN, and 0 * NaN would reach the sum. Rows before a tensor's first row read as zero.
import torch
import triton
import triton.language as tl

from rtpurbo.kernels.launch import Launch

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
CHUNK = tl.constexpr(0)
RING_WINDOW = tl.constexpr(1)
RING_SINKS = tl.constexpr(2)
UNBOUNDED = tl.constexpr(1 << 30)


@triton.jit
def plan_tiles(
    t0, length, count, window, sinks, M: tl.constexpr, N: tl.constexpr, HAS_RING: tl.constexpr, BY_POSITION: tl.constexpr = False
):
    """Key tiles of the query rows t0 ... min(t0 + M, count) - 1 (t0 < count): (masked tiles, full tiles, details).

    BY_POSITION: the "chunk" is a whole cache whose row j holds position j; it starts at position 0, not at `length`.

    A full tile is visible to each of these rows; a masked one holds a border (diagonal, window edge, sinks) and needs
    `oldest_visible`. Where no row's window starts after the sinks, they are no separate run: everything up to the query is visible.
    """
    first = length + t0
    last = length + tl.minimum(t0 + M, count) - 1
    base = 0 if BY_POSITION else length
    joined = last - window + 1 <= sinks
    width = tl.where(joined, UNBOUNDED, window)
    low = tl.maximum(first - width + 1, 0)
    full_low = last - width + 1
    chunk_low = tl.maximum(tl.maximum(low, base), tl.where(joined, 0, sinks))
    diagonal = tl.maximum(tl.cdiv(last - first, N), 1)
    chunk_full = tl.maximum((last + 1 - tl.maximum(chunk_low, full_low)) // N - diagonal, 0)
    chunk_masked = tl.cdiv(last + 1 - chunk_low, N) - chunk_full
    chunk_sinks_end = tl.maximum(tl.where(joined, 0, sinks), base)
    chunk_sinks = tl.cdiv(chunk_sinks_end - base, N)
    masked = chunk_masked + chunk_sinks
    full = chunk_full
    lap = base
    new_low, new_full, new_masked = base, 0, 0
    old_low, old_full, old_masked = base, 0, 0
    if HAS_RING:
        # Position of the ring's first window slot in the lap that is being written; before it, the previous lap.
        lap = base - tl.maximum(base - sinks, 0) % window
        old_low = tl.maximum(low, sinks)
        new_low = tl.maximum(old_low, lap)
        new_full = tl.maximum(base - tl.maximum(new_low, full_low), 0) // N
        new_masked = tl.cdiv(tl.maximum(base - new_low, 0), N) - new_full
        old_full = tl.maximum(lap - tl.maximum(old_low, full_low), 0) // N
        old_masked = tl.cdiv(tl.maximum(lap - old_low, 0), N) - old_full
        masked += new_masked + old_masked + tl.cdiv(tl.minimum(sinks, base), N)
        full += new_full + old_full
    chunk = (width, base, last + 1, chunk_low, diagonal, chunk_full, chunk_masked, chunk_sinks, chunk_sinks_end)
    ring = (lap, new_low, new_full, new_masked, old_low, old_full, old_masked)
    return masked, full, chunk + ring


@triton.jit
def masked_tile(x, details, window, sinks, N: tl.constexpr, HAS_RING: tl.constexpr):
    """Tile x of the masked ones: (source, first row in it, first position, lowest position of the run, width of its window)."""
    width, length, end, chunk_low, diagonal, chunk_full, chunk_masked, chunk_sinks, chunk_sinks_end = details[:9]
    k = tl.where(x < diagonal, x, x + chunk_full)
    source = CHUNK
    shift = length
    low = chunk_low
    position = end - (k + 1) * N
    x -= chunk_masked
    in_sinks = x >= 0
    low = tl.where(in_sinks, length, low)
    width = tl.where(in_sinks, UNBOUNDED, width)
    position = tl.where(in_sinks, chunk_sinks_end - (x + 1) * N, position)
    if HAS_RING:
        lap, new_low, new_full, new_masked, old_low, old_full, old_masked = details[9:]
        x -= chunk_sinks
        in_new = x >= 0
        width = tl.where(in_new, details[0], width)
        low = tl.where(in_new, new_low, low)
        shift = tl.where(in_new, lap, shift)
        position = tl.where(in_new, length - (x + new_full + 1) * N, position)
        source = tl.where(in_new, RING_WINDOW, CHUNK)
        x -= new_masked
        in_old = x >= 0
        low = tl.where(in_old, old_low, low)
        shift = tl.where(in_old, lap - window, shift)
        position = tl.where(in_old, lap - (x + old_full + 1) * N, position)
        x -= old_masked
        in_ring_sinks = x >= 0
        low = tl.where(in_ring_sinks, 0, low)
        width = tl.where(in_ring_sinks, UNBOUNDED, width)
        shift = tl.where(in_ring_sinks, 0, shift)
        position = tl.where(in_ring_sinks, tl.minimum(sinks, length) - (x + 1) * N, position)
        source = tl.where(in_ring_sinks, RING_SINKS, source)
    return source, position - shift, position, low, width


@triton.jit
def full_tile(x, details, window, N: tl.constexpr, HAS_RING: tl.constexpr):
    """Tile x of the full ones: (source, first row in it)."""
    width, length, end, chunk_low, diagonal, chunk_full = details[:6]
    row = end - length - (x + diagonal + 1) * N
    source = CHUNK
    if HAS_RING:
        lap, new_low, new_full, new_masked, old_low, old_full, old_masked = details[9:]
        x -= chunk_full
        source = tl.where(x >= 0, RING_WINDOW, CHUNK)
        row = tl.where(x >= 0, length - lap - (x + 1) * N, row)
        x -= new_full
        row = tl.where(x >= 0, window - (x + 1) * N, row)
    return source, row


@triton.jit
def oldest_visible(i, low, width):
    """The query at position i sees the keys of a masked tile's run from here to i."""
    return tl.maximum(low, i - width + 1)


@triton.jit
def unit_of_work(index, tiles, B, H, M: tl.constexpr):
    """(sequence, query head, first query row) of a work index; heads run fastest and share K/V in L2, long rows come first."""
    h = index % H
    b = (index // H) % B
    return b, h, (tiles - 1 - index // (H * B)) * M


@triton.jit
def _source_base(source, row, chunk_ptr, chunk_stride, ring_ptr, ring_stride, sinks, HAS_RING: tl.constexpr):
    """Pointer to a row of the source, and the stride between its rows."""
    if HAS_RING:
        ring_row = row + tl.where(source == RING_WINDOW, sinks, 0)
        base = tl.where(source == CHUNK, chunk_ptr + row.to(tl.int64) * chunk_stride, ring_ptr + ring_row.to(tl.int64) * ring_stride)
        return base, tl.where(source == CHUNK, chunk_stride, ring_stride)
    else:
        return chunk_ptr + row.to(tl.int64) * chunk_stride, chunk_stride


@triton.jit
def _attend_tile(
    q, m, total, acc, k_base, v_base, stride_k, stride_v, stride_kd, stride_vd, row, i, j0, low, width, scale_log2,
    MASKED: tl.constexpr, N: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax (base 2) over the keys at k_base [N, D] and values at v_base [N, D]."""
    n = tl.arange(0, N)
    d = tl.arange(0, D)
    k_ptrs = k_base + d[:, None] * stride_kd + n[None, :] * stride_k
    v_ptrs = v_base + n[:, None] * stride_v + d[None, :] * stride_vd
    if MASKED:
        # Rows below the tile's lowest position are not part of it; those below 0 lie outside the tensor.
        inside = (j0 + n >= low) & (row + n >= 0)
        k = tl.load(k_ptrs, mask=inside[None, :], other=0.0)
        s = tl.dot(q, k, input_precision=PRECISION)
        j = j0 + n[None, :]
        s = tl.where((j >= oldest_visible(i, low, width)[:, None]) & (j <= i[:, None]), s, float("-inf"))
        v = tl.load(v_ptrs, mask=inside[:, None], other=0.0)
    else:
        k = tl.load(k_ptrs)
        s = tl.dot(q, k, input_precision=PRECISION)
        v = tl.load(v_ptrs)
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    # A row that has seen no key yet keeps a maximum of -inf: subtract 0 there, not -inf.
    shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    alpha = tl.exp2(m - shift)
    p = tl.exp2(s * scale_log2 - shift[:, None])
    total = total * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, total, acc


@triton.jit
def _local_attention(
    q_ptr, k_ptr, v_ptr, ring_k_ptr, ring_v_ptr, out_ptr, lse_ptr, lengths_ptr, counts_ptr,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_rkb, stride_rkw, stride_rkh, stride_rkd,
    stride_rvb, stride_rvw, stride_rvh, stride_rvd, stride_ob, stride_ot, stride_oh,
    T, B, H, tiles, window, sinks, scale_log2,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HAS_RING: tl.constexpr, BY_POSITION: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: M query rows of one head of one sequence."""
    b, h, t0 = unit_of_work(tl.program_id(0), tiles, B, H, M)
    length = tl.load(lengths_ptr + b).to(tl.int32)
    count = tl.load(counts_ptr + b).to(tl.int32)
    b64, kh = b.to(tl.int64), h // GROUP
    t = t0 + tl.arange(0, M)
    d = tl.arange(0, D)
    acc = tl.zeros([M, D], dtype=tl.float32)
    m = tl.full([M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
    if t0 < count:
        q_base = q_ptr + b64 * stride_qb + h * stride_qh + t0.to(tl.int64) * stride_qt
        q_offsets = tl.arange(0, M)[:, None] * stride_qt + d[None, :] * stride_qd
        q = tl.load(q_base + q_offsets, mask=(t < count)[:, None], other=0.0)
        k_chunk = k_ptr + b64 * stride_kb + kh * stride_kh
        v_chunk = v_ptr + b64 * stride_vb + kh * stride_vh
        k_ring = ring_k_ptr + b64 * stride_rkb + kh * stride_rkh
        v_ring = ring_v_ptr + b64 * stride_rvb + kh * stride_rvh
        i = length + t
        masked, full, details = plan_tiles(t0, length, count, window, sinks, M, N, HAS_RING, BY_POSITION)
        for x in range(masked):
            source, row, j0, low, width = masked_tile(x, details, window, sinks, N, HAS_RING)
            k_base, stride_k = _source_base(source, row, k_chunk, stride_kt, k_ring, stride_rkw, sinks, HAS_RING)
            v_base, stride_v = _source_base(source, row, v_chunk, stride_vt, v_ring, stride_rvw, sinks, HAS_RING)
            m, total, acc = _attend_tile(
                q, m, total, acc, k_base, v_base, stride_k, stride_v, stride_kd, stride_vd, row, i, j0, low, width,
                scale_log2, True, N, D, PRECISION,
            )  # fmt: skip
        for x in range(full):
            source, row = full_tile(x, details, window, N, HAS_RING)
            k_base, stride_k = _source_base(source, row, k_chunk, stride_kt, k_ring, stride_rkw, sinks, HAS_RING)
            v_base, stride_v = _source_base(source, row, v_chunk, stride_vt, v_ring, stride_rvw, sinks, HAS_RING)
            m, total, acc = _attend_tile(
                q, m, total, acc, k_base, v_base, stride_k, stride_v, stride_kd, stride_vd, row, i, 0, 0, 0,
                scale_log2, False, N, D, PRECISION,
            )  # fmt: skip
    valid = t < count
    out = tl.where(valid[:, None], acc / tl.where(valid, total, 1.0)[:, None], 0.0)
    lse = tl.where(valid, (m + tl.log2(tl.where(valid, total, 1.0))) * LN_2, float("-inf"))
    out_base = out_ptr + b64 * stride_ob + h * stride_oh + t0.to(tl.int64) * stride_ot
    out_offsets = tl.arange(0, M)[:, None] * stride_ot + d[None, :]
    tl.store(out_base + out_offsets, out.to(out_ptr.dtype.element_ty), mask=(t < T)[:, None])
    tl.store(lse_ptr + (b64 * H + h) * T + t, lse, mask=t < T)


def describe(
    q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, lengths_B: torch.Tensor, counts_B: torch.Tensor,
    ring_k_BWKD: torch.Tensor | None, ring_v_BWKD: torch.Tensor | None, out_BTHD: torch.Tensor, lse_BHT: torch.Tensor,
    *, window: int, sinks: int, scale: float, block_queries: int = 128, block_keys: int = 64, by_position: bool = False,
) -> Launch:  # fmt: skip
    """The launch that writes out and lse; block sizes are powers of two >= 16.

    by_position: k and v are [B, S, K, D] caches whose row j holds position j, the chunk's own keys included, and there is no ring.
    """
    B, T, H, D = q_BTHD.shape
    assert not (by_position and ring_k_BWKD is not None)
    tiles = triton.cdiv(T, block_queries)
    ring_k = k_BTKD if ring_k_BWKD is None else ring_k_BWKD
    ring_v = v_BTKD if ring_v_BWKD is None else ring_v_BWKD
    strides = [s for x in (q_BTHD, k_BTKD, v_BTKD, ring_k, ring_v) for s in x.stride()]
    return Launch(
        kernel=_local_attention,
        grid=(tiles * B * H,),
        arguments=(
            q_BTHD, k_BTKD, v_BTKD, ring_k, ring_v, out_BTHD, lse_BHT, lengths_B, counts_B,
            *strides, *out_BTHD.stride()[:3], T, B, H, tiles, window, sinks, scale * LOG2_E.value,
        ),
        constants={
            "GROUP": H // k_BTKD.shape[2],
            "M": block_queries,
            "N": block_keys,
            "D": D,
            "HAS_RING": ring_k_BWKD is not None,
            "BY_POSITION": by_position,
            "PRECISION": "ieee" if q_BTHD.dtype == torch.float32 else "tf32",
        },
        num_warps=4 if block_queries < 128 or D == 64 else 8,
        num_stages=2,
    )  # fmt: skip


def attend_local(
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    lengths_B: torch.Tensor,
    counts_B: torch.Tensor,
    ring_k_BWKD: torch.Tensor | None,
    ring_v_BWKD: torch.Tensor | None,
    window: int,
    sinks: int,
    scale: float,
    *,
    block_queries: int = 128,
    block_keys: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.local_attention.attend_local`; any strides; block sizes are powers of two >= 16."""
    B, T, H, D = q_BTHD.shape
    out_BTHD = torch.empty((B, T, H, D), dtype=q_BTHD.dtype, device=q_BTHD.device)
    lse_BHT = torch.empty((B, H, T), dtype=torch.float32, device=q_BTHD.device)
    if out_BTHD.numel():
        describe(
            q_BTHD, k_BTKD, v_BTKD, lengths_B, counts_B, ring_k_BWKD, ring_v_BWKD, out_BTHD, lse_BHT,
            window=window, sinks=sinks, scale=scale, block_queries=block_queries, block_keys=block_keys,
        ).run()  # fmt: skip
    return out_BTHD, lse_BHT
