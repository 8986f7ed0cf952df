"""Fused decode selection in Triton: index scores per block, then histogram top-p by the last programs, in one launch."""
# Triton's compiler, not Python's type rules, decides what the jitted functions mean:
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false

# B batch  S cached tokens  H retrieval query heads  I index-key sets  J groups of sets  G heads of a group (padded)
# R index dim  N blocks  C chunks (programs a group)  P parts of a head's selection
import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from rtpurbo.kernels.arrival import arrive, last_to_leave, wait_until
from rtpurbo.kernels.block_selection.plan import MAX_CHUNKS, MAX_PARTS
from rtpurbo.kernels.launch import Launch

BINS = tl.constexpr(256)
BINS_PER_NAT = tl.constexpr(8.0)
MASS_ONE = tl.constexpr(4294967296.0)
LIMB_BITS = tl.constexpr(19)
LIMB_MASK = tl.constexpr((1 << 19) - 1)
# A part has at most 4096 blocks of 64 keys: its mass stays below 2^51, its count within the 13 bits above.
COUNT_SHIFT = tl.constexpr(51)
COUNT_MASK = tl.constexpr((1 << 13) - 1)
PACKED_MASS = tl.constexpr((1 << 51) - 1)


@triton.jit
def block_bin(block_max, top):
    """Histogram bin of a block: 0 for the highest maximum, 255 open-ended."""
    return tl.minimum((top - block_max) * BINS_PER_NAT, 255.0).to(tl.int32)


@triton.jit
def block_mass(block_max, block_sum, top):
    """round(2^32 * l * exp(m - top)) as int64: the products are fp32, their sums exact."""
    return (block_sum * tl.exp(block_max - top) * MASS_ONE + 0.5).to(tl.int64)


@triton.jit
def mass_needed(total, TOP_P: tl.constexpr):
    return tl.ceil(total.to(tl.float64) * tl.full([], TOP_P, tl.float64)).to(tl.int64)


@triton.jit
def score_chunk(
    q_GR,
    set_slot_G,
    k_base,
    max_ptrs_G,
    sum_ptrs_G,
    head_G,
    first_tile,
    end_tile,
    length,
    sets_in_group,
    stride_ks,
    stride_ki,
    scale,
    BLOCK: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    SETS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write (m_b, l_b) of the chunk's blocks for the group's heads; returns the largest m_b per head.

    One column of the product a head: K_set [tokens, R] times q^T with zeros for the heads of other sets, summed over the
    group's sets, so that heads with keys of their own fill the matrix unit as well as heads that share one set.

    Rows of a tile are ordered so that a warp holds whole blocks in the layouts that Triton gives products (16 rows a
    warp, then the next warp, then the next register): row = ((x * SUB + y) * WARPS + warp) * 16 + z is token y * 16 + z
    of block x * WARPS + warp. The reductions over a block then stay inside a warp.
    """
    TILE: tl.constexpr = TILE_BLOCKS * BLOCK
    SUB: tl.constexpr = BLOCK // 16
    ROUNDS: tl.constexpr = TILE_BLOCKS // WARPS
    row_t = tl.arange(0, TILE)
    warp_t = (row_t // 16) % WARPS
    round_t = row_t // (16 * WARPS)
    offset_t = ((round_t // SUB) * WARPS + warp_t) * BLOCK + (round_t % SUB) * 16 + row_t % 16
    dim_R = tl.arange(0, R)
    offset_tR = offset_t[:, None] * stride_ks + dim_R[None, :]
    best_nG = tl.full([TILE_BLOCKS, G], float("-inf"), tl.float32)
    for tile in tl.range(first_tile, end_tile, num_stages=STAGES):
        visible_t = offset_t < length - tile * TILE
        k_tile = k_base + (tl.zeros([], tl.int64) + tile * TILE) * stride_ks
        logits_tG = tl.zeros([TILE, G], tl.float32)
        for slot in tl.static_range(SETS):
            mask_t = offset_t < tl.where(sets_in_group > slot, length - tile * TILE, 0)
            k_tR = tl.load(k_tile + slot * stride_ki + offset_tR, mask=mask_t[:, None], other=0.0)
            q_slot_GR = tl.where((set_slot_G == slot)[:, None], q_GR, 0.0).to(q_GR.dtype)
            logits_tG = tl.dot(k_tR.to(q_GR.dtype), tl.trans(q_slot_GR), logits_tG, input_precision="ieee")
        logits_tG = tl.where(visible_t[:, None], logits_tG * scale, float("-inf"))
        logits_xywzG = tl.reshape(logits_tG, [ROUNDS, SUB, WARPS, 16, G])
        max_xywzG = tl.max(tl.max(logits_xywzG, axis=1, keep_dims=True), axis=3, keep_dims=True)
        # A block without visible key has maximum -inf; its exponentials must not see inf - inf.
        weight_xywzG = tl.exp(logits_xywzG - tl.where(max_xywzG == float("-inf"), 0.0, max_xywzG))
        sum_xywzG = tl.sum(tl.sum(weight_xywzG, axis=1, keep_dims=True), axis=3, keep_dims=True)
        max_nG = tl.reshape(max_xywzG, [TILE_BLOCKS, G])
        sum_nG = tl.reshape(sum_xywzG, [TILE_BLOCKS, G])
        block_n = tile * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
        written_nG = (block_n * BLOCK < length)[:, None] & (head_G >= 0)[None, :]
        tl.store(max_ptrs_G[None, :] + block_n[:, None], max_nG, mask=written_nG)
        tl.store(sum_ptrs_G[None, :] + block_n[:, None], sum_nG, mask=written_nG)
        best_nG = tl.maximum(best_nG, max_nG)
    return tl.max(best_nG, axis=0)


@triton.jit
def is_forced(block, blocks, SINK_BLOCKS: tl.constexpr):
    return (block < SINK_BLOCKS) | (block >= blocks - 2)


@triton.jit
def mass_of(chosen_n, limbs_n2):
    """Sum of the chosen masses from limbs of 19 bits: 32-bit sums are one instruction a warp, 64-bit ones are ten."""
    low, high = tl.split(tl.sum(tl.where(chosen_n[:, None], limbs_n2, 0), axis=0))
    return low.to(tl.int64) + (high.to(tl.int64) << LIMB_BITS)


@triton.jit
def select_whole(max_ptr, sum_ptr, ids_ptr, blocks, TOP_P: tl.constexpr, SINK_BLOCKS: tl.constexpr, TILE: tl.constexpr):
    """Select among blocks that fit one tile, in registers; returns the count.

    The last bin taken is the largest n with forced mass + mass of the bins below n < needed: found bit by bit from
    eight masked sums, the same bin as a scan of the histogram gives.
    """
    block_n = tl.arange(0, TILE)
    valid_n = block_n < blocks
    max_n = tl.load(max_ptr + block_n, mask=valid_n, other=float("-inf"), cache_modifier=".cg")
    sum_n = tl.load(sum_ptr + block_n, mask=valid_n, other=0.0, cache_modifier=".cg")
    selected_n = valid_n
    if TOP_P < 1.0:
        top = tl.max(max_n)
        max_n = tl.where(valid_n, max_n, top)
        mass_n = tl.where(valid_n, block_mass(max_n, sum_n, top), 0)
        limbs_n2 = tl.join((mass_n & LIMB_MASK).to(tl.int32), (mass_n >> LIMB_BITS).to(tl.int32))
        # Forced blocks count from the start: they sit in a bin before the first.
        bin_n = tl.where(is_forced(block_n, blocks, SINK_BLOCKS), -1, block_bin(max_n, top))
        needed = mass_needed(mass_of(valid_n, limbs_n2), TOP_P)
        last = tl.full([], -1, tl.int32)
        if mass_of(bin_n < 0, limbs_n2) < needed:
            last = tl.zeros([], tl.int32)
            for bit in range(8):
                step = 128 >> bit
                last = tl.where(mass_of(bin_n < last + step, limbs_n2) < needed, last + step, last)
        selected_n = valid_n & (bin_n <= last)
    place_n = tl.cumsum(selected_n.to(tl.int32), axis=0)
    tl.store(ids_ptr + place_n - 1, block_n, mask=selected_n)
    return tl.max(place_n)


@triton.jit
def sum_part(max_ptr, sum_ptr, histogram_ptr, forced_ptr, top, lo, hi, blocks, SINK_BLOCKS: tl.constexpr, TILE: tl.constexpr):
    """Fill one part's histogram: mass in the low 51 bits and number of the free blocks by bin; the forced ones apart."""
    forced = tl.zeros([], tl.int64)
    for start in range(lo, hi, TILE):
        block_n = start + tl.arange(0, TILE)
        valid_n = block_n < hi
        max_n = tl.load(max_ptr + block_n, mask=valid_n, other=0.0, cache_modifier=".cg")
        sum_n = tl.load(sum_ptr + block_n, mask=valid_n, other=0.0, cache_modifier=".cg")
        max_n = tl.where(valid_n, max_n, top)
        packed_n = block_mass(max_n, sum_n, top) + (tl.full([], 1, tl.int64) << COUNT_SHIFT)
        forced_n = valid_n & is_forced(block_n, blocks, SINK_BLOCKS)
        free_n = valid_n & (forced_n == 0)
        tl.atomic_add(histogram_ptr + block_bin(max_n, top), packed_n, mask=free_n, sem="relaxed", scope="gpu")
        forced += tl.sum(tl.where(forced_n, packed_n, 0))
    tl.store(forced_ptr, forced)


@triton.jit
def bins_and_offset(histogram_ptr, forced_ptr, part, parts, PARTS: tl.constexpr, TOP_P: tl.constexpr):
    """Whole bins from the top until forced + binned mass >= top_p * total; where this part's ids start."""
    part_p = tl.arange(0, PARTS)
    bin_b = tl.arange(0, BINS)
    used_p = part_p < parts
    packed_pb = tl.load(histogram_ptr + part_p[:, None] * BINS + bin_b[None, :], mask=used_p[:, None], other=0, cache_modifier=".cg")
    forced_p = tl.load(forced_ptr + part_p, mask=used_p, other=0, cache_modifier=".cg")
    bins = tl.full([], BINS, tl.int32)
    if TOP_P < 1.0:
        mass_b = tl.sum(packed_pb & PACKED_MASS, axis=0)
        upto_b = tl.cumsum(mass_b, axis=0) + tl.sum(forced_p & PACKED_MASS)
        needed = mass_needed(tl.max(upto_b), TOP_P)
        bins = tl.sum((upto_b - mass_b < needed).to(tl.int32))
    count_pb = ((packed_pb >> COUNT_SHIFT) & COUNT_MASK).to(tl.int32)
    count_b = tl.sum(tl.where((part_p < part)[:, None], count_pb, 0), axis=0)
    forced_count_p = ((forced_p >> COUNT_SHIFT) & COUNT_MASK).to(tl.int32)
    return bins, tl.sum(tl.where(bin_b < bins, count_b, 0)) + tl.sum(tl.where(part_p < part, forced_count_p, 0))


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
    heads_ptr,  # int32 [J, G], -1 where a group has fewer heads
    set_slot_ptr,  # int32 [J, G], which of the group's sets each head reads
    first_set_ptr,  # int32 [J + 1], the first set of every group
    max_ptr,  # fp32 [B, H, N]
    sum_ptr,  # fp32 [B, H, N]
    chunk_max_ptr,  # fp32 [B, H, C]
    histogram_ptr,  # int64 [B, H, P, 256]: mass and number of free blocks, packed
    forced_ptr,  # int64 [B, H, P]: the same of the forced ones
    counter_ptr,  # int32 [B, J, 2 + G], zero between launches
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
    max_selectors,
    TOP_P: tl.constexpr,
    SINK_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    SETS: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    SELECT_TILE: tl.constexpr,
    EARLY_LAUNCH: tl.constexpr,
):
    group = tl.program_id(0)
    chunk = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    chunks = tl.num_programs(1)
    # All small tables at once: one trip to memory before the keys, not three.
    slot_G = tl.arange(0, G)
    head_G = tl.load(heads_ptr + group * G + slot_G)
    set_slot_G = tl.load(set_slot_ptr + group * G + slot_G)
    first_set = tl.load(first_set_ptr + group)
    sets_in_group = tl.load(first_set_ptr + group + 1) - first_set
    if EARLY_LAUNCH:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    length = tl.load(lengths_ptr + batch)
    blocks = tl.cdiv(length, BLOCK)
    tiles = tl.cdiv(blocks, TILE_BLOCKS)
    # Groups with fewer sets get fewer programs, so that all programs read about the same number of bytes.
    tiles_a_chunk = tl.maximum(tl.cdiv(tiles, tl.cdiv(chunks * sets_in_group, SETS)), 1)
    active = tl.maximum(tl.cdiv(tiles, tiles_a_chunk), 1)
    if chunk >= active:
        return
    heads_in_group = tl.sum((head_G >= 0).to(tl.int32))
    row_G = batch * num_heads + tl.maximum(head_G, 0)
    select_tiles = tl.cdiv(blocks, SELECT_TILE)
    parts = tl.maximum(tl.minimum(PARTS, select_tiles), 1)
    part_blocks = tl.cdiv(select_tiles, parts) * SELECT_TILE
    jobs = heads_in_group * parts

    # The histograms are cleared by the scorers: their arrival orders this before the first addition.
    for job in range(chunk, tl.where(parts > 1, jobs, 0), active):
        head = tl.load(heads_ptr + group * G + job // parts)
        row = (batch * num_heads + head) * PARTS + job % parts
        tl.store(histogram_ptr + row * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int64))

    dim_R = tl.arange(0, R)
    q_GR = tl.load(q_ptr + batch * stride_qb + head_G[:, None] * stride_qh + dim_R[None, :], mask=(head_G >= 0)[:, None], other=0.0)
    k_base = k_ptr + batch * stride_kb + first_set.to(tl.int64) * stride_ki
    best_G = score_chunk(
        q_GR, set_slot_G, k_base, max_ptr + row_G * capacity, sum_ptr + row_G * capacity, head_G,
        chunk * tiles_a_chunk, tl.minimum((chunk + 1) * tiles_a_chunk, tiles), length, sets_in_group,
        stride_ks, stride_ki, scale, BLOCK, R, G, SETS, TILE_BLOCKS, WARPS, STAGES,
    )  # fmt: skip
    tl.store(chunk_max_ptr + row_G * chunks + chunk, best_G, mask=head_G >= 0)

    counter_ptr += (batch * tl.num_programs(0) + group) * (2 + G)
    ticket = arrive(counter_ptr)
    selectors = tl.minimum(tl.minimum(jobs, active), max_selectors)
    selector = ticket - (active - selectors)
    if selector < 0:
        return
    wait_until(counter_ptr, active, ticket + 1)
    if parts == 1:
        for slot in range(selector, jobs, selectors):
            row = batch * num_heads + tl.sum(tl.where(slot_G == slot, head_G, 0))
            start = row * capacity
            count = select_whole(max_ptr + start, sum_ptr + start, ids_ptr + start, blocks, TOP_P, SINK_BLOCKS, SELECT_TILE)
            tl.store(count_ptr + row, count)
    else:
        chunk_c = tl.arange(0, MAX_CHUNKS)
        for job in range(selector, jobs, selectors):
            slot = job // parts
            part = job % parts
            row = batch * num_heads + tl.sum(tl.where(slot_G == slot, head_G, 0))
            top_c = tl.load(chunk_max_ptr + row * chunks + chunk_c, mask=chunk_c < active, other=float("-inf"), cache_modifier=".cg")
            sum_part(
                max_ptr + row * capacity, sum_ptr + row * capacity,
                histogram_ptr + (row * PARTS + part) * BINS, forced_ptr + row * PARTS + part, tl.max(top_c),
                part * part_blocks, tl.minimum((part + 1) * part_blocks, blocks), blocks, SINK_BLOCKS, SELECT_TILE,
            )  # fmt: skip
            arrive(counter_ptr + 2 + slot)
        for job in range(selector, jobs, selectors):
            slot = job // parts
            part = job % parts
            row = batch * num_heads + tl.sum(tl.where(slot_G == slot, head_G, 0))
            top_c = tl.load(chunk_max_ptr + row * chunks + chunk_c, mask=chunk_c < active, other=float("-inf"), cache_modifier=".cg")
            wait_until(counter_ptr + 2 + slot, parts, tl.zeros([], tl.int32))
            bins, offset = bins_and_offset(histogram_ptr + row * PARTS * BINS, forced_ptr + row * PARTS, part, parts, PARTS, TOP_P)
            end = write_ids(
                max_ptr + row * capacity, ids_ptr + row * capacity, offset, tl.max(top_c), bins,
                part * part_blocks, tl.minimum((part + 1) * part_blocks, blocks), blocks, SINK_BLOCKS, SELECT_TILE,
            )  # fmt: skip
            if part == parts - 1:
                tl.store(count_ptr + row, end)
    if last_to_leave(counter_ptr + 1, selectors):
        tl.store(counter_ptr + slot_G + 2, tl.zeros([G], tl.int32))
        tl.store(counter_ptr, 0)
        tl.store(counter_ptr + 1, 0)


def describe(
    plan, index_q_BHR: torch.Tensor, index_k_BSIR: torch.Tensor, lengths_B: torch.Tensor, scale: float, top_p: float, sinks: int,
    ids_BHN: torch.Tensor, count_BH: torch.Tensor,
) -> Launch:  # fmt: skip
    """The launch that fills ids and count, with a `SelectionPlan`'s workspace."""
    B, H, R = index_q_BHR.shape
    return Launch(
        kernel=score_and_select_kernel,
        grid=(plan.heads_JG.shape[0], plan.chunks, B),
        arguments=(
            index_q_BHR, index_k_BSIR, lengths_B, plan.heads_JG, plan.set_slot_JG, plan.first_set_J, plan.block_max_BHN, plan.block_sum_BHN,
            plan.chunk_max_BHC, plan.histogram_BHPb, plan.forced_BHP, plan.counters, ids_BHN, count_BH,
            *index_q_BHR.stride()[:2], *index_k_BSIR.stride()[:3], float(scale), H, plan.capacity_blocks, plan.max_selectors,
        ),
        constants={
            "TOP_P": float(top_p),
            "SINK_BLOCKS": -(-sinks // plan.block_size),
            "BLOCK": plan.block_size,
            "R": R,
            "G": plan.heads_JG.shape[1],
            "SETS": plan.sets_in_group,
            "MAX_CHUNKS": MAX_CHUNKS,
            "TILE_BLOCKS": plan.tile_blocks,
            "WARPS": plan.num_warps,
            "STAGES": plan.stages,
            "PARTS": MAX_PARTS,
            "SELECT_TILE": plan.select_tile,
            "EARLY_LAUNCH": plan.early_launch,
        },
        num_warps=plan.num_warps,
        early_launch=plan.early_launch,
    )  # fmt: skip


def launch(plan, index_q_BHR: torch.Tensor, index_k_BSIR: torch.Tensor, lengths_B: torch.Tensor, scale: float, top_p: float, sinks: int):
    """Run the kernel with a `SelectionPlan`'s workspace; returns ids int32 [B, H, N] and count int32 [B, H]."""
    B, H, _ = index_q_BHR.shape
    ids_BHN = torch.empty(B, H, plan.capacity_blocks, dtype=torch.int32, device=index_q_BHR.device)
    count_BH = torch.empty(B, H, dtype=torch.int32, device=index_q_BHR.device)
    describe(plan, index_q_BHR, index_k_BSIR, lengths_B, scale, top_p, sinks, ids_BHN, count_BH).run()
    return ids_BHN, count_BH
