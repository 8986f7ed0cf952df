"""Triton kernels of select_prefill: one launch pools the index keys, one scores and selects, a program for each list."""

# Triton's kernel language is not typed Python: launches take options and constants that signatures do not name.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# B batch  T chunk tokens  S cached tokens  H retrieval query heads  I index-key sets  R index dim  Q query blocks  N key blocks
import torch
import triton
import triton.language as tl

from rtpurbo.kernels.launch import Launch

BINS_PER_NAT = tl.constexpr(8.0)
MASS_ONE = tl.constexpr(4294967296.0)
# A mass is at most 2^32. The sums of its lower 17 and of its upper bits over 2^14 blocks fit 32 bits, whose sums are several times faster.
LIMB_BITS = tl.constexpr(17)
LIMB_MASK = tl.constexpr((1 << 17) - 1)
MAX_BLOCKS = 1 << 14


@triton.jit
def pool_rows(x_ptrs, first, filled, BLOCK: tl.constexpr, ROWS: tl.constexpr, MAX: tl.constexpr):
    """Mean or maximum of each dimension over rows first ... first + BLOCK - 1 below `filled`; x_ptrs [ROWS, R], ROWS >= BLOCK."""
    row = tl.arange(0, ROWS)
    valid = (row < BLOCK) & (first + row < filled)
    x = tl.load(x_ptrs, mask=valid[:, None], other=0.0).to(tl.float32)
    if MAX:
        pooled = tl.max(tl.where(valid[:, None], x, float("-inf")), 0)
        return tl.where(first < filled, pooled, 0.0)
    else:
        return tl.sum(x, 0) / tl.maximum(tl.minimum(filled - first, BLOCK), 1).to(tl.float32)


@triton.jit
def _pool_keys(
    k_ptr, pooled_ptr, lengths_ptr, counts_ptr, stride_kb, stride_ks, stride_ki, stride_kr, sets, blocks,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr, R_PADDED: tl.constexpr, MAX: tl.constexpr,
):  # fmt: skip
    """One program: one block of one key set of one sequence, to pooled [B, I, R, N]."""
    block = tl.program_id(0)
    b, i = (tl.program_id(1) // sets).to(tl.int64), tl.program_id(1) % sets
    filled = tl.load(lengths_ptr + b).to(tl.int32) + tl.load(counts_ptr + b).to(tl.int32)
    r = tl.arange(0, R_PADDED)
    row = block.to(tl.int64) * BLOCK + tl.arange(0, ROWS)
    x_ptrs = k_ptr + b * stride_kb + i * stride_ki + row[:, None] * stride_ks + tl.minimum(r, R - 1)[None, :] * stride_kr
    pooled = pool_rows(x_ptrs, block * BLOCK, filled, BLOCK, ROWS, MAX)
    tl.store(pooled_ptr + (b * sets + i) * R * blocks + r * blocks + block, pooled, mask=r < R)


@triton.jit
def mass_of(mass, chosen):
    """Sum of the chosen masses, int64."""
    low = tl.sum(tl.where(chosen, mass & LIMB_MASK, 0).to(tl.int32))
    high = tl.sum(tl.where(chosen, mass >> LIMB_BITS, 0).to(tl.int32))
    return low.to(tl.int64) + (high.to(tl.int64) << LIMB_BITS)


@triton.jit
def choose_blocks(logit, candidate, forced, TOP_P: tl.constexpr):
    """The forced blocks, and whole bins from the top until the mass reaches TOP_P of the candidates' total.

    The last bin taken is the largest n with forced mass + mass of the bins below n < needed, found bit by bit: the same bin as a scan
    of the histogram gives.
    """
    if TOP_P >= 1.0:
        return candidate
    else:
        top = tl.max(tl.where(candidate, logit, float("-inf")))
        logit = tl.where(candidate, logit, top)
        mass = tl.where(candidate, (tl.exp(logit - top) * MASS_ONE + 0.5).to(tl.int64), 0)
        # Forced blocks count from the start: they sit in a bin before the first.
        in_bin = tl.where(forced, -1, tl.minimum((top - logit) * BINS_PER_NAT, 255.0).to(tl.int32))
        total = mass_of(mass, candidate)
        needed = tl.ceil(total.to(tl.float64) * tl.full([], TOP_P, tl.float64)).to(tl.int64)
        last = tl.full([], -1, tl.int32)
        if mass_of(mass, candidate & (in_bin < 0)) < needed:
            last = tl.zeros([], tl.int32)
            for bit in range(8):
                step = 128 >> bit
                last = tl.where(mass_of(mass, candidate & (in_bin < last + step)) < needed, last + step, last)
        return candidate & (in_bin <= last)


@triton.jit
def _select(
    q_ptr, pooled_ptr, key_set_ptr, lengths_ptr, counts_ptr, ids_ptr, count_ptr,
    stride_qb, stride_qt, stride_qh, stride_qr, heads, sets, query_blocks, blocks, scale, sinks,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr, R_PADDED: tl.constexpr, TILE: tl.constexpr, TOP_P: tl.constexpr,
    MAX: tl.constexpr,
):  # fmt: skip
    """One program: the list of one query block of one head of one sequence."""
    query_block = tl.program_id(0)
    b, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    length = tl.load(lengths_ptr + b).to(tl.int32)
    count = tl.load(counts_ptr + b).to(tl.int32)
    listed = tl.zeros([], tl.int32)
    row = (b * heads + h) * query_blocks + query_block
    t0 = query_block * BLOCK
    if t0 < count:
        r = tl.arange(0, R_PADDED)
        t = t0.to(tl.int64) + tl.arange(0, ROWS)
        q_ptrs = q_ptr + b * stride_qb + h * stride_qh + t[:, None] * stride_qt + tl.minimum(r, R - 1)[None, :] * stride_qr
        q = pool_rows(q_ptrs, t0, count, BLOCK, ROWS, MAX)
        pooled_base = pooled_ptr + (b * sets + tl.load(key_set_ptr + h).to(tl.int64)) * R * blocks
        n = tl.arange(0, TILE)
        newest = (length + tl.minimum(t0 + BLOCK, count) - 1) // BLOCK
        candidate = (n <= newest) & (n < blocks)
        logit = tl.zeros([TILE], tl.float32)
        # Not unrolled: the loads of all dimensions at once would not fit the registers.
        for dim in tl.range(0, R, loop_unroll_factor=1, num_stages=1):
            q_dim = tl.sum(tl.where(r == dim, q, 0.0))
            logit += q_dim * tl.load(pooled_base + dim * blocks + n, mask=candidate, other=0.0)
        forced = candidate & ((n * BLOCK < sinks) | (n >= (length + t0) // BLOCK - 1))
        chosen = choose_blocks(logit * scale, candidate, forced, TOP_P)
        place = tl.cumsum(chosen.to(tl.int32), axis=0)
        tl.store(ids_ptr + row * blocks + place - 1, n, mask=chosen)
        listed = tl.max(place)
    tl.store(count_ptr + row, listed)


def select_prefill(
    index_q_BTHR: torch.Tensor,
    index_k_BSIR: torch.Tensor,
    key_set_H: torch.Tensor,
    lengths_B: torch.Tensor,
    counts_B: torch.Tensor,
    scale: float,
    top_p: float,
    sinks: int,
    block: int,
    pooling: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.prefill_selection.select_prefill`; any strides, at most MAX_BLOCKS key blocks."""
    B, T, H, R = index_q_BTHR.shape
    S, sets = index_k_BSIR.shape[1:3]
    N, Q = triton.cdiv(S, block), triton.cdiv(T, block)
    device = index_q_BTHR.device
    ids_BHQN = torch.empty((B, H, Q, N), dtype=torch.int32, device=device)
    count_BHQ = torch.empty((B, H, Q), dtype=torch.int32, device=device)
    if ids_BHQN.numel() == 0:
        return ids_BHQN, count_BHQ.zero_()
    pooled_BIRN = torch.empty((B, sets, R, N), dtype=torch.float32, device=device)
    describe_pool(index_k_BSIR, lengths_B, counts_B, pooled_BIRN, block=block, pooling=pooling).run()
    describe_select(
        index_q_BTHR, pooled_BIRN, key_set_H, lengths_B, counts_B, ids_BHQN, count_BHQ, scale=scale, top_p=top_p, sinks=sinks, block=block,
        pooling=pooling,
    ).run()  # fmt: skip
    return ids_BHQN, count_BHQ


def describe_pool(
    index_k_BSIR: torch.Tensor, lengths_B: torch.Tensor, counts_B: torch.Tensor, pooled_BIRN: torch.Tensor, *, block: int,
    pooling: str = "mean",
) -> Launch:  # fmt: skip
    """The launch that pools the index keys."""
    B, sets, _, N = pooled_BIRN.shape
    return Launch(
        kernel=_pool_keys, grid=(N, B * sets),
        arguments=(index_k_BSIR, pooled_BIRN, lengths_B, counts_B, *index_k_BSIR.stride(), sets, N),
        constants={**_shape(block, index_k_BSIR.shape[3]), "MAX": pooling == "max"}, num_warps=2,
    )  # fmt: skip


def describe_select(
    index_q_BTHR: torch.Tensor, pooled_BIRN: torch.Tensor, key_set_H: torch.Tensor, lengths_B: torch.Tensor, counts_B: torch.Tensor,
    ids_BHQN: torch.Tensor, count_BHQ: torch.Tensor, *, scale: float, top_p: float, sinks: int, block: int, pooling: str = "mean",
) -> Launch:  # fmt: skip
    """The launch that fills the lists from pooled keys."""
    B, H, Q, N = ids_BHQN.shape
    tile = tile_of(N)
    return Launch(
        kernel=_select, grid=(Q, B * H),
        arguments=(
            index_q_BTHR, pooled_BIRN, key_set_H, lengths_B, counts_B, ids_BHQN, count_BHQ, *index_q_BTHR.stride(), H,
            pooled_BIRN.shape[1], Q, N, float(scale), sinks,
        ),
        constants={**_shape(block, index_q_BTHR.shape[3]), "TILE": tile, "TOP_P": float(top_p), "MAX": pooling == "max"},
        num_warps=min(16, max(1, tile // 512)),
    )  # fmt: skip


def tile_of(blocks: int) -> int:
    """Blocks of a program's tile: steps of four, since each is compiled when a growing prompt first needs it, a second each."""
    tile = 128
    while tile < blocks:
        tile *= 4
    return tile


def _shape(block: int, R: int) -> dict[str, int]:
    return {"BLOCK": block, "ROWS": triton.next_power_of_2(block), "R": R, "R_PADDED": triton.next_power_of_2(R)}
