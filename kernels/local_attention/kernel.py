"""Portable Triton kernel of causal prefill attention: window + sinks, everything, or listed key blocks, by the plan in tiles.py."""

# Triton's kernel language is not typed Python: launches take options and constants that signatures do not name.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# B batch  T chunk tokens  W ring slots (sinks + window)  K kv heads  G query heads per kv head  D head dim  H = K * G
# Q query blocks  N listed key blocks
import torch
import triton
import triton.language as tl

from rtpurbo.kernels.launch import Launch
from rtpurbo.kernels.local_attention.tiles import (
    CHUNK,
    LN_2,
    LOG2_E,
    RING_WINDOW,
    UNBOUNDED,
    full_tile,
    listed_tile,
    masked_tile,
    oldest_visible,
    plan_listed,
    plan_tiles,
    unit_of_work,
)


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


@triton.jit(do_not_specialize=["T", "B", "H", "GROUP", "tiles", "window", "sinks", "capacity"])
def _prefill(
    q_ptr, k_ptr, v_ptr, ring_k_ptr, ring_v_ptr, out_ptr, lse_ptr, lengths_ptr, counts_ptr, ids_ptr, listed_ptr,
    stride_qb, stride_qt, stride_qk, stride_qg, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_rkb, stride_rkw, stride_rkh, stride_rkd,
    stride_rvb, stride_rvw, stride_rvh, stride_rvd, stride_ob, stride_ot, stride_ok, stride_og,
    T, B, H, GROUP, tiles, window, sinks, scale_log2, capacity,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HAS_RING: tl.constexpr, BY_POSITION: tl.constexpr,
    LISTED: tl.constexpr, HAS_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: M query rows of one head of one sequence."""
    b, h, part, t0 = unit_of_work(tl.program_id(0), tiles, B, H, 1, M)
    length = tl.load(lengths_ptr + b).to(tl.int32)
    count = tl.load(counts_ptr + b).to(tl.int32)
    b64, kh, g = b.to(tl.int64), h // GROUP, h % GROUP
    t = t0 + tl.arange(0, M)
    d = tl.arange(0, D)
    acc = tl.zeros([M, D], dtype=tl.float32)
    m = tl.full([M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
    if t0 < count:
        q_base = q_ptr + b64 * stride_qb + kh * stride_qk + g * stride_qg + t0.to(tl.int64) * stride_qt
        q_offsets = tl.arange(0, M)[:, None] * stride_qt + d[None, :] * stride_qd
        q = tl.load(q_base + q_offsets, mask=(t < count)[:, None], other=0.0)
        k_chunk = k_ptr + b64 * stride_kb + kh * stride_kh
        v_chunk = v_ptr + b64 * stride_vb + kh * stride_vh
        k_ring = ring_k_ptr + b64 * stride_rkb + kh * stride_rkh
        v_ring = ring_v_ptr + b64 * stride_rvb + kh * stride_rvh
        i = length + t
        if LISTED:
            row = (b64 * H + h) * tiles + t0 // M
            listed = tl.load(listed_ptr + row)
            ids_row = ids_ptr + row * capacity
            end = length + tl.minimum(t0 + M, count)
            masked, full = plan_listed(ids_row, listed, length + t0, M, M // N)
        else:
            origin = 0 if BY_POSITION else length
            masked, full, details = plan_tiles(t0, length, origin, count, window, sinks, M, N, HAS_RING)
        for x in range(masked):
            if LISTED:
                j0, low = listed_tile(x, ids_row, listed, end, N, M // N)
                source, row_k, width = 0, j0, UNBOUNDED
            else:
                source, row_k, j0, low, width = masked_tile(x, details, window, sinks, N, HAS_RING)
            k_base, stride_k = _source_base(source, row_k, k_chunk, stride_kt, k_ring, stride_rkw, sinks, HAS_RING)
            v_base, stride_v = _source_base(source, row_k, v_chunk, stride_vt, v_ring, stride_rvw, sinks, HAS_RING)
            m, total, acc = _attend_tile(
                q, m, total, acc, k_base, v_base, stride_k, stride_v, stride_kd, stride_vd, row_k, i, j0, low, width,
                scale_log2, True, N, D, PRECISION,
            )  # fmt: skip
        for x in range(full):
            if LISTED:
                row_k, low = listed_tile(masked + x, ids_row, listed, end, N, M // N)
                source = 0
            else:
                source, row_k = full_tile(x, details, window, N, HAS_RING)
            k_base, stride_k = _source_base(source, row_k, k_chunk, stride_kt, k_ring, stride_rkw, sinks, HAS_RING)
            v_base, stride_v = _source_base(source, row_k, v_chunk, stride_vt, v_ring, stride_rvw, sinks, HAS_RING)
            m, total, acc = _attend_tile(
                q, m, total, acc, k_base, v_base, stride_k, stride_v, stride_kd, stride_vd, row_k, i, 0, 0, 0,
                scale_log2, False, N, D, PRECISION,
            )  # fmt: skip
    seen = (t < count) & (total != 0)
    out = tl.where(seen[:, None], acc / tl.where(seen, total, 1.0)[:, None], 0.0)
    out_base = out_ptr + b64 * stride_ob + kh * stride_ok + g * stride_og + t0.to(tl.int64) * stride_ot
    out_offsets = tl.arange(0, M)[:, None] * stride_ot + d[None, :]
    tl.store(out_base + out_offsets, out.to(out_ptr.dtype.element_ty), mask=(t < T)[:, None])
    if HAS_LSE:
        lse = tl.where(seen, (m + tl.log2(tl.where(seen, total, 1.0))) * LN_2, float("-inf"))
        tl.store(lse_ptr + (b64 * H + h) * T + t, lse, mask=t < T)


# Queries and keys of a tile, the fastest first.
TILES = ((128, 64), (64, 64), (64, 32), (32, 32), (32, 16), (16, 16))


def tiles_that_fit(head_dim: int, itemsize: int, shared_bytes: int, listed_block: int | None = None) -> dict[str, int]:
    """The first of TILES, as `describe` takes it, that a program with this much shared memory holds; the smallest if none fits.

    listed_block: of the lists, which are for tiles of as many queries.
    """
    tiles = TILES
    if listed_block is not None:
        tiles = tuple((listed_block, keys) for keys in (64, 32, 16) if keys <= listed_block)
    # q, k and v, the weights of a step, and the rows' maxima: what a float32 tile takes; in 16 bits the weights stay in registers.
    bytes_of = {(m, n): (m + 2 * n) * head_dim * itemsize + m * n * itemsize + 4 * m for m, n in tiles}
    queries, keys = next((tile for tile in tiles if bytes_of[tile] <= shared_bytes), tiles[-1])
    return {"block_queries": queries, "block_keys": keys}


def describe(
    q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, lengths_B: torch.Tensor, counts_B: torch.Tensor,
    ring_k_BWKD: torch.Tensor | None, ring_v_BWKD: torch.Tensor | None, out_BTHD: torch.Tensor, lse_BHT: torch.Tensor | None,
    *, window: int, sinks: int, scale: float, by_position: bool = False, lists: tuple[torch.Tensor, torch.Tensor] | None = None,
    block_queries: int = 128, block_keys: int = 64,
) -> Launch:  # fmt: skip
    """The launch that writes out (and lse, where given); q and out may be views [B, T, K, G, D].

    by_position: k and v are [B, S, K, D] caches whose row j holds position j, the chunk's own keys included, and there is no ring.
    window: UNBOUNDED for dense attention. lists: contiguous int32 (ids_BHQN, count_BHQ) for blocks of block_queries queries and keys
    of a cache by position; window and sinks are not looked at then. Block sizes are powers of two >= 16.
    """
    K = k_BTKD.shape[2]
    q_BTKGD, out_BTKGD = (x if x.dim() == 5 else x.unflatten(2, (K, x.shape[2] // K)) for x in (q_BTHD, out_BTHD))
    B, T, _, G, D = q_BTKGD.shape
    assert not (by_position and ring_k_BWKD is not None)
    assert lists is None or (by_position and block_queries % block_keys == 0)
    tiles = triton.cdiv(T, block_queries)
    ring_k = k_BTKD if ring_k_BWKD is None else ring_k_BWKD
    ring_v = v_BTKD if ring_v_BWKD is None else ring_v_BWKD
    ids, count = (lengths_B, lengths_B) if lists is None else lists
    strides = [s for x in (q_BTKGD, k_BTKD, v_BTKD, ring_k, ring_v) for s in x.stride()]
    return Launch(
        kernel=_prefill,
        grid=(tiles * B * K * G,),
        arguments=(
            q_BTKGD, k_BTKD, v_BTKD, ring_k, ring_v, out_BTKGD, out_BTKGD if lse_BHT is None else lse_BHT, lengths_B, counts_B, ids, count,
            *strides, *out_BTKGD.stride()[:4], T, B, K * G, G, tiles, window, sinks, scale * LOG2_E.value, ids.shape[-1],
        ),
        constants={
            "M": block_queries,
            "N": block_keys,
            "D": D,
            "HAS_RING": ring_k_BWKD is not None,
            "BY_POSITION": by_position,
            "LISTED": lists is not None,
            "HAS_LSE": lse_BHT is not None,
            "PRECISION": "ieee" if q_BTKGD.dtype == torch.float32 else "tf32",
        },
        num_warps=4 if block_queries < 128 or D == 64 else 8,
        num_stages=2,
    )  # fmt: skip


def launch(
    q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, lengths_B: torch.Tensor, counts_B: torch.Tensor,
    ring_k_BWKD: torch.Tensor | None, ring_v_BWKD: torch.Tensor | None, out_BTHD: torch.Tensor, lse_BHT: torch.Tensor | None,
    *, window: int, sinks: int, scale: float, by_position: bool = False, lists: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """Run what `describe` describes; an empty chunk is no launch."""
    if out_BTHD.numel():
        describe(
            q_BTHD, k_BTKD, v_BTKD, lengths_B, counts_B, ring_k_BWKD, ring_v_BWKD, out_BTHD, lse_BHT,
            window=window, sinks=sinks, scale=scale, by_position=by_position, lists=lists,
        ).run()  # fmt: skip
