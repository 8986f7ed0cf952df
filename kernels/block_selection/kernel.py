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
from rtpurbo.kernels.block_selection.histogram import ROW, bins_and_offset, load_tile, parts_of, select_whole, sum_part, write_ids
from rtpurbo.kernels.block_selection.plan import MAX_CHUNKS
from rtpurbo.kernels.block_selection.scoring import score_chunk, score_stages
from rtpurbo.kernels.division import padded_width
from rtpurbo.kernels.launch import Launch


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
    histogram_ptr,  # int64 [B, H, P, ROW]: mass and number of blocks by bin, packed
    counter_ptr,  # int32 [B, J, 2 + G], zero between launches
    ids_ptr,  # int32 [B, H, N]
    count_ptr,  # int32 [B, H]
    mask_ptr,  # int32 [B, H, N / 32], with MASKS
    stride_qb,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_ki,
    scale,
    num_heads,
    capacity,
    mask_words,
    max_selectors,
    TOP_P: tl.constexpr,
    SINK_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    R: tl.constexpr,
    R_PADDED: tl.constexpr,
    G: tl.constexpr,
    SETS: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    PARTED: tl.constexpr,
    SELECT_TILE: tl.constexpr,
    PART_BLOCKS: tl.constexpr,
    MASKS: tl.constexpr,
    EARLY_LAUNCH: tl.constexpr,
):
    group = tl.program_id(0)
    chunk = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    chunks = tl.num_programs(1)
    slot_G = tl.arange(0, G)
    # All small tables at once: one trip to memory before the keys, not three. One group of sets needs but one of them.
    set_slot_G = tl.load(set_slot_ptr + group * G + slot_G)
    if ONE_GROUP:
        head_G = tl.where(slot_G < num_heads, slot_G, -1)
        first_set = tl.zeros([], tl.int32)
        sets_in_group = first_set + SETS
    else:
        head_G = tl.load(heads_ptr + group * G + slot_G)
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
    parts, part_blocks = parts_of(blocks, SELECT_TILE, PART_BLOCKS, PARTS)
    jobs = heads_in_group * parts

    dim_R = tl.arange(0, R_PADDED)
    used_GR = (head_G >= 0)[:, None] & (dim_R < R)[None, :]
    q_GR = tl.load(q_ptr + batch * stride_qb + head_G[:, None] * stride_qh + dim_R[None, :], mask=used_GR, other=0.0)
    k_base = k_ptr + batch * stride_kb + first_set.to(tl.int64) * stride_ki
    best_G = score_chunk(
        q_GR, set_slot_G, k_base, max_ptr + row_G * capacity, sum_ptr + row_G * capacity, head_G,
        chunk * tiles_a_chunk, tl.minimum((chunk + 1) * tiles_a_chunk, tiles), length, sets_in_group,
        stride_ks, stride_ki, scale, BLOCK, R, R_PADDED, G, SETS, TILE_BLOCKS, WARPS, STAGES,
    )  # fmt: skip
    tl.store(chunk_max_ptr + row_G * chunks + chunk, best_G, mask=head_G >= 0)

    counter_ptr += (batch * tl.num_programs(0) + group) * (2 + G)
    ticket = arrive(counter_ptr)
    selectors = tl.minimum(tl.minimum(jobs, active), max_selectors)
    selector = ticket - (active - selectors)
    if selector < 0:
        return
    wait_until(counter_ptr, active, ticket + 1)
    # A dynamic bound, not a branch: the loop is compiled once.
    whole = tl.where(parts == 1, jobs, 0) if PARTED else jobs
    for slot in range(selector, whole, selectors):
        row = batch * num_heads + tl.sum(tl.where(slot_G == slot, head_G, 0))
        start = row * capacity
        count = select_whole(
            max_ptr + start, sum_ptr + start, ids_ptr + start, mask_ptr + row * mask_words, blocks, TOP_P, SINK_BLOCKS, SELECT_TILE, MASKS
        )  # fmt: skip
        tl.store(count_ptr + row, count)
    if PARTED:
        chunk_c = tl.arange(0, MAX_CHUNKS)
        for job in range(selector, jobs - whole, selectors):
            slot = job // parts
            part = job % parts
            row = batch * num_heads + tl.sum(tl.where(slot_G == slot, head_G, 0))
            lo, hi = part * part_blocks, tl.minimum((part + 1) * part_blocks, blocks)
            max_n = load_tile(max_ptr + row * capacity, lo, hi, PART_BLOCKS)
            sum_n = load_tile(sum_ptr + row * capacity, lo, hi, PART_BLOCKS)
            top_c = tl.load(chunk_max_ptr + row * chunks + chunk_c, mask=chunk_c < active, other=float("-inf"), cache_modifier=".cg")
            sum_part(
                max_n, sum_n, max_ptr + row * capacity, sum_ptr + row * capacity, histogram_ptr + (row * PARTS + part) * ROW,
                tl.max(top_c), lo, hi, blocks, SINK_BLOCKS, PART_BLOCKS,
            )  # fmt: skip
            arrive(counter_ptr + 2 + slot)
        for job in range(selector, jobs - whole, selectors):
            slot = job // parts
            part = job % parts
            row = batch * num_heads + tl.sum(tl.where(slot_G == slot, head_G, 0))
            lo, hi = part * part_blocks, tl.minimum((part + 1) * part_blocks, blocks)
            max_n = load_tile(max_ptr + row * capacity, lo, hi, PART_BLOCKS)
            top_c = tl.load(chunk_max_ptr + row * chunks + chunk_c, mask=chunk_c < active, other=float("-inf"), cache_modifier=".cg")
            top = tl.max(top_c)
            wait_until(counter_ptr + 2 + slot, parts, tl.zeros([], tl.int32))
            bins, offset = bins_and_offset(histogram_ptr + row * PARTS * ROW, part, parts, PARTS, TOP_P)
            end = write_ids(
                max_n, max_ptr + row * capacity, ids_ptr + row * capacity, mask_ptr + row * mask_words, offset, top, bins, lo, hi,
                blocks, SINK_BLOCKS, PART_BLOCKS, MASKS,
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
    R_padded = padded_width(R)
    tile_bytes = plan.sets_in_group * plan.tile_blocks * plan.block_size * R_padded * index_k_BSIR.element_size()
    return Launch(
        kernel=score_and_select_kernel,
        grid=(plan.heads_JG.shape[0], plan.chunks, B),
        arguments=(
            index_q_BHR, index_k_BSIR, lengths_B, plan.heads_JG, plan.set_slot_JG, plan.first_set_J, plan.block_max_BHN, plan.block_sum_BHN,
            plan.chunk_max_BHC, plan.histogram_BHPb, plan.counters, ids_BHN, count_BH,
            plan.counters if plan.mask_BHW is None else plan.mask_BHW,
            *index_q_BHR.stride()[:2], *index_k_BSIR.stride()[:3], float(scale), H, plan.capacity_blocks,
            0 if plan.mask_BHW is None else plan.mask_BHW.shape[2], plan.max_selectors,
        ),
        constants={
            "TOP_P": float(top_p),
            "SINK_BLOCKS": -(-sinks // plan.block_size),
            "BLOCK": plan.block_size,
            "R": R,
            "R_PADDED": R_padded,
            "G": plan.heads_JG.shape[1],
            "SETS": plan.sets_in_group,
            "ONE_GROUP": plan.heads_JG.shape[0] == 1,
            "MAX_CHUNKS": MAX_CHUNKS,
            "TILE_BLOCKS": plan.tile_blocks,
            "WARPS": plan.num_warps,
            "STAGES": score_stages(plan.stages, tile_bytes, plan.pipeline_bytes, plan.held_tiles),
            "PARTS": plan.max_parts,
            "PARTED": plan.capacity_blocks > plan.select_tile,
            "SELECT_TILE": plan.select_tile,
            "PART_BLOCKS": plan.part_blocks,
            "MASKS": plan.mask_BHW is not None,
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
