"""Fused decode selection in Triton: index scores per block, then histogram top-p by the last programs, in one launch."""
# Triton's compiler, not Python's type rules, decides what the jitted functions mean:
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false

# B batch  S cached tokens  H retrieval query heads  I index-key sets  G heads of a set (padded to a power of two)
# R index dim  N blocks  C chunks (programs a set)  P parts of a head's selection
import torch
import triton
import triton.language as tl
from rtpurbo.kernels.arrival import arrive, wait_until

BINS = tl.constexpr(256)
BINS_PER_NAT = tl.constexpr(8.0)
MASS_ONE = tl.constexpr(4294967296.0)


@triton.jit
def block_bin(block_max, top):
    """Histogram bin of a block: 0 for the highest maximum, 255 open-ended."""
    return tl.minimum((top - block_max) * BINS_PER_NAT, 255.0).to(tl.int32)


@triton.jit
def score_chunk(
    q_GR,
    k_base,
    max_ptrs_G,
    sum_ptrs_G,
    head_G,
    first_tile,
    end_tile,
    length,
    stride_ks,
    scale,
    BLOCK: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write (m_b, l_b) of the chunk's blocks for the set's heads; returns the largest m_b per head."""
    TILE: tl.constexpr = TILE_BLOCKS * BLOCK
    best_G = tl.full([G], float("-inf"), tl.float32)
    offset_t = tl.arange(0, TILE)
    dim_R = tl.arange(0, R)
    for tile in tl.range(first_tile, end_tile, num_stages=STAGES):
        token_t = tile * TILE + offset_t
        visible_t = token_t < length
        k_tR = tl.load(k_base + token_t.to(tl.int64)[:, None] * stride_ks + dim_R[None, :], mask=visible_t[:, None], other=0.0)
        if G == 1:
            logits_tG = tl.sum(k_tR.to(tl.float32) * q_GR.to(tl.float32), axis=1)[:, None]
        else:
            logits_tG = tl.dot(k_tR.to(q_GR.dtype), tl.trans(q_GR), input_precision="ieee")
        logits_tG = tl.where(visible_t[:, None], logits_tG * scale, float("-inf"))
        logits_nsG = tl.reshape(logits_tG, [TILE_BLOCKS, BLOCK, G])
        max_nG = tl.max(logits_nsG, axis=1)
        # A block without visible key has maximum -inf; its exponentials must not see inf - inf.
        reference_nG = tl.where(max_nG == float("-inf"), 0.0, max_nG)
        sum_nG = tl.sum(tl.exp(logits_nsG - reference_nG[:, None, :]), axis=1)
        block_n = tile * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
        written_nG = (block_n * BLOCK < length)[:, None] & (head_G >= 0)[None, :]
        tl.store(max_ptrs_G[None, :] + block_n[:, None], max_nG, mask=written_nG)
        tl.store(sum_ptrs_G[None, :] + block_n[:, None], sum_nG, mask=written_nG)
        best_G = tl.maximum(best_G, tl.max(max_nG, axis=0))
    return best_G


@triton.jit
def is_forced(block, blocks, SINK_BLOCKS: tl.constexpr):
    return (block < SINK_BLOCKS) | (block >= blocks - 2)


@triton.jit
def sum_part(max_ptr, sum_ptr, mass_ptr, bin_count_ptr, forced_ptr, top, lo, hi, blocks, SINK_BLOCKS: tl.constexpr, TILE: tl.constexpr):
    """Fill one part's histogram: mass and number of the free blocks by bin, mass and number of the forced ones."""
    forced_mass = tl.zeros([], tl.int64)
    forced_count = tl.zeros([], tl.int32)
    bin_count = tl.zeros([BINS], tl.int32)
    for start in range(lo, hi, TILE):
        block_n = start + tl.arange(0, TILE)
        valid_n = block_n < hi
        max_n = tl.load(max_ptr + block_n, mask=valid_n, other=0.0, cache_modifier=".cg")
        sum_n = tl.load(sum_ptr + block_n, mask=valid_n, other=0.0, cache_modifier=".cg")
        max_n = tl.where(valid_n, max_n, top)
        mass_n = (sum_n * tl.exp(max_n - top) * MASS_ONE + 0.5).to(tl.int64)
        forced_n = valid_n & is_forced(block_n, blocks, SINK_BLOCKS)
        free_n = valid_n & (forced_n == 0)
        bin_n = block_bin(max_n, top)
        tl.atomic_add(mass_ptr + bin_n, mass_n, mask=free_n & (mass_n > 0), sem="relaxed", scope="gpu")
        bin_count += tl.histogram(bin_n, BINS, mask=free_n)
        forced_mass += tl.sum(tl.where(forced_n, mass_n, 0))
        forced_count += tl.sum(forced_n.to(tl.int32))
    tl.store(bin_count_ptr + tl.arange(0, BINS), bin_count)
    tl.store(forced_ptr, forced_mass)
    tl.store(forced_ptr + 1, forced_count.to(tl.int64))


@triton.jit
def num_bins_taken(mass_ptr, forced_ptr, parts, PARTS: tl.constexpr, TOP_P: tl.constexpr):
    """Whole bins from the top until forced + binned mass >= top_p * total."""
    part_p = tl.arange(0, PARTS)
    bin_b = tl.arange(0, BINS)
    mass_pb = tl.load(mass_ptr + part_p[:, None] * BINS + bin_b[None, :], mask=(part_p < parts)[:, None], other=0, cache_modifier=".cg")
    forced_mass = tl.sum(tl.load(forced_ptr + part_p * 2, mask=part_p < parts, other=0, cache_modifier=".cg"))
    mass_b = tl.sum(mass_pb, axis=0)
    total = forced_mass + tl.sum(mass_b)
    needed = tl.ceil(total.to(tl.float64) * tl.full([], TOP_P, tl.float64)).to(tl.int64)
    before_b = forced_mass + tl.cumsum(mass_b, axis=0) - mass_b
    return tl.sum((before_b < needed).to(tl.int32))


@triton.jit
def num_selected_before(bin_count_ptr, forced_ptr, part, bins, PARTS: tl.constexpr):
    """How many blocks the earlier parts select: where this part's ids start."""
    part_p = tl.arange(0, PARTS)
    bin_b = tl.arange(0, BINS)
    earlier_pb = (part_p < part)[:, None] & (bin_b < bins)[None, :]
    count_pb = tl.load(bin_count_ptr + part_p[:, None] * BINS + bin_b[None, :], mask=earlier_pb, other=0, cache_modifier=".cg")
    forced_p = tl.load(forced_ptr + part_p * 2 + 1, mask=part_p < part, other=0, cache_modifier=".cg")
    return tl.sum(tl.sum(count_pb, axis=0)) + tl.sum(forced_p).to(tl.int32)


@triton.jit
def write_ids(max_ptr, ids_ptr, offset, top, bins, lo, hi, blocks, SINK_BLOCKS: tl.constexpr, TILE: tl.constexpr):
    """Write the part's selected ids, ascending, from `offset` on; returns where they end."""
    for start in range(lo, hi, TILE):
        block_n = start + tl.arange(0, TILE)
        valid_n = block_n < hi
        max_n = tl.load(max_ptr + block_n, mask=valid_n, other=0.0, cache_modifier=".cg")
        max_n = tl.where(valid_n, max_n, top)
        selected_n = valid_n & (is_forced(block_n, blocks, SINK_BLOCKS) | (block_bin(max_n, top) < bins))
        place_n = offset + tl.cumsum(selected_n.to(tl.int32), axis=0) - 1
        tl.store(ids_ptr + place_n, block_n, mask=selected_n)
        offset += tl.sum(selected_n.to(tl.int32))
    return offset


@triton.jit
def score_and_select_kernel(
    q_ptr,  # [B, H, R]
    k_ptr,  # [B, S, I, R], last axis contiguous
    lengths_ptr,  # int32 [B]
    heads_ptr,  # int32 [I, G], -1 where a set has fewer heads
    max_ptr,  # fp32 [B, H, N]
    sum_ptr,  # fp32 [B, H, N]
    chunk_max_ptr,  # fp32 [B, H, C]
    mass_ptr,  # int64 [B, H, P, 256]
    bin_count_ptr,  # int32 [B, H, P, 256]
    forced_ptr,  # int64 [B, H, P, 2]: mass, number
    counter_ptr,  # int32 [B, I, 2 + G], zero between launches
    ids_ptr,  # int32 [B, H, N]
    count_ptr,  # int32 [B, H]
    stride_qb,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_ki,
    scale,
    num_heads,
    capacity,
    TOP_P: tl.constexpr,
    SINK_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    SELECT_TILE: tl.constexpr,
    MAX_SELECTORS: tl.constexpr,
):
    key_set = tl.program_id(0)
    chunk = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths_ptr + batch)
    blocks = tl.cdiv(length, BLOCK)
    tiles = tl.cdiv(blocks, TILE_BLOCKS)
    tiles_a_chunk = tl.maximum(tl.cdiv(tiles, tl.num_programs(1)), 1)
    active = tl.maximum(tl.cdiv(tiles, tiles_a_chunk), 1)
    if chunk >= active:
        return
    slot_G = tl.arange(0, G)
    head_G = tl.load(heads_ptr + key_set * G + slot_G)
    heads_in_set = tl.sum((head_G >= 0).to(tl.int32))
    row_G = batch * num_heads + tl.maximum(head_G, 0)
    select_tiles = tl.cdiv(blocks, SELECT_TILE)
    parts = tl.maximum(tl.minimum(PARTS, select_tiles), 1)
    part_blocks = tl.cdiv(select_tiles, parts) * SELECT_TILE
    jobs = heads_in_set * parts

    # The histograms are cleared by the scorers: their arrival orders this before the first addition.
    for job in range(chunk, jobs, active):
        head = tl.load(heads_ptr + key_set * G + job // parts)
        row = (batch * num_heads + head) * PARTS + job % parts
        tl.store(mass_ptr + row * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int64))

    dim_R = tl.arange(0, R)
    q_GR = tl.load(q_ptr + batch * stride_qb + head_G[:, None] * stride_qh + dim_R[None, :], mask=(head_G >= 0)[:, None], other=0.0)
    first_tile = chunk * tiles_a_chunk
    end_tile = tl.minimum(first_tile + tiles_a_chunk, tiles)
    k_base = k_ptr + batch * stride_kb + key_set.to(tl.int64) * stride_ki
    max_ptrs_G = max_ptr + row_G * capacity
    sum_ptrs_G = sum_ptr + row_G * capacity
    best_G = score_chunk(
        q_GR, k_base, max_ptrs_G, sum_ptrs_G, head_G, first_tile, end_tile, length, stride_ks, scale,
        BLOCK, R, G, TILE_BLOCKS, STAGES,
    )  # fmt: skip
    tl.store(chunk_max_ptr + row_G * CHUNKS + chunk, best_G, mask=head_G >= 0)

    counter_ptr += (batch * tl.num_programs(0) + key_set) * (2 + G)
    ticket = arrive(counter_ptr)
    selectors = tl.minimum(tl.minimum(jobs, active), MAX_SELECTORS)
    selector = ticket - (active - selectors)
    if selector < 0:
        return
    wait_until(counter_ptr, active)
    CHUNKS_PADDED: tl.constexpr = triton.next_power_of_2(CHUNKS)
    chunk_c = tl.arange(0, CHUNKS_PADDED)
    for job in range(selector, jobs, selectors):
        slot = job // parts
        part = job % parts
        row = batch * num_heads + tl.load(heads_ptr + key_set * G + slot)
        top = tl.max(tl.load(chunk_max_ptr + row * CHUNKS + chunk_c, mask=chunk_c < active, other=float("-inf"), cache_modifier=".cg"))
        part_row = row * PARTS + part
        sum_part(
            max_ptr + row * capacity, sum_ptr + row * capacity,
            mass_ptr + part_row * BINS, bin_count_ptr + part_row * BINS, forced_ptr + part_row * 2,
            top, part * part_blocks, tl.minimum((part + 1) * part_blocks, blocks), blocks, SINK_BLOCKS, SELECT_TILE,
        )  # fmt: skip
        arrive(counter_ptr + 2 + slot)
    for job in range(selector, jobs, selectors):
        slot = job // parts
        part = job % parts
        row = batch * num_heads + tl.load(heads_ptr + key_set * G + slot)
        top = tl.max(tl.load(chunk_max_ptr + row * CHUNKS + chunk_c, mask=chunk_c < active, other=float("-inf"), cache_modifier=".cg"))
        wait_until(counter_ptr + 2 + slot, parts)
        forced_row_ptr = forced_ptr + row * PARTS * 2
        if TOP_P >= 1.0:  # noqa: SIM108 - compile-time branch
            bins = BINS
        else:
            bins = num_bins_taken(mass_ptr + row * PARTS * BINS, forced_row_ptr, parts, PARTS, TOP_P)
        offset = num_selected_before(bin_count_ptr + row * PARTS * BINS, forced_row_ptr, part, bins, PARTS)
        end = write_ids(
            max_ptr + row * capacity, ids_ptr + row * capacity, offset, top, bins,
            part * part_blocks, tl.minimum((part + 1) * part_blocks, blocks), blocks, SINK_BLOCKS, SELECT_TILE,
        )  # fmt: skip
        if part == parts - 1:
            tl.store(count_ptr + row, end)
    if arrive(counter_ptr + 1) == selectors - 1:
        tl.store(counter_ptr + slot_G + 2, tl.zeros([G], tl.int32))
        tl.store(counter_ptr, 0)
        tl.store(counter_ptr + 1, 0)


def launch(plan, index_q_BHR: torch.Tensor, index_k_BSIR: torch.Tensor, lengths_B: torch.Tensor, scale: float, top_p: float, sinks: int):
    """Run the kernel with a `SelectionPlan`'s workspace; returns ids int32 [B, H, N] and count int32 [B, H]."""
    B, H, R = index_q_BHR.shape
    device = index_q_BHR.device
    ids_BHN = torch.empty(B, H, plan.capacity_blocks, dtype=torch.int32, device=device)
    count_BH = torch.empty(B, H, dtype=torch.int32, device=device)
    grid = (plan.num_sets, plan.chunks, B)
    score_and_select_kernel[grid](
        index_q_BHR,
        index_k_BSIR,
        lengths_B,
        plan.heads_IG,
        plan.block_max_BHN,
        plan.block_sum_BHN,
        plan.chunk_max_BHC,
        plan.bin_mass_BHPb,
        plan.bin_count_BHPb,
        plan.forced_BHP2,
        plan.counters,
        ids_BHN,
        count_BH,
        index_q_BHR.stride(0),
        index_q_BHR.stride(1),
        index_k_BSIR.stride(0),
        index_k_BSIR.stride(1),
        index_k_BSIR.stride(2),
        float(scale),
        H,
        plan.capacity_blocks,
        TOP_P=float(top_p),
        SINK_BLOCKS=-(-sinks // plan.block_size),
        BLOCK=plan.block_size,
        R=R,
        G=plan.heads_IG.shape[1],
        CHUNKS=plan.chunks,
        TILE_BLOCKS=plan.tile_blocks,
        STAGES=plan.stages,
        PARTS=plan.parts,
        SELECT_TILE=plan.select_tile,
        MAX_SELECTORS=plan.max_selectors,
        num_warps=plan.num_warps,
    )
    return ids_BHN, count_BH
