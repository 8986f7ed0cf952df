"""The whole decode step of a layer as one launch in Triton: programs that run all at once and wait for each other."""
# Triton's compiler, not Python's type rules, decides what the jitted functions mean:
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false

# B batch  S cached tokens  W ring slots  H retrieval heads  K kv heads  J groups of index-key sets  I index-key sets
# G heads of a group of sets (padded)  L heads of a KV group (padded)  D head dim  R index dim  N blocks  P parts of a head's selection
import triton
import triton.language as tl
from triton.language.extra import cuda

from rtpurbo.kernels.arrival import arrive, signal, wait_until
from rtpurbo.kernels.block_selection.histogram import parts_of
from rtpurbo.kernels.block_selection.scoring import score_chunk
from rtpurbo.kernels.decode_layer.fused_parts import (
    LINE,
    at,
    before,
    counts_when_listed,
    ordered_key,
    place_of,
    roles,
    select_jobs,
    share_start,
    stamp,
    store_normalised,
    store_partial,
)
from rtpurbo.kernels.sparse_attention.kernel import attend_span, merge_head

# Keys that are not divided between programs.
UNIT = tl.constexpr(16)
NEVER = tl.constexpr(-(1 << 31))


@triton.jit
def decode_layer_kernel(
    q_ptr,  # [B, heads, D], last axis contiguous
    k_ptr,  # [B, S, retained K, D], last axis contiguous
    v_ptr,  # like k, equal strides
    ring_k_ptr,  # [B, W, local K, D], last axis contiguous
    ring_v_ptr,  # like ring_k, equal strides
    out_ptr,  # [B, heads, D], last axis contiguous
    index_q_ptr,  # [B, H, R]
    index_k_ptr,  # [B, S, I, R], last axis contiguous
    lengths_ptr,  # int32 [B]
    key_set_ptr,  # int32 [H], ascending
    first_set_ptr,  # int32 [J + 1]: the first set of every group
    first_head_ptr,  # int32 [J + 1]: the first retrieval head of every group
    retrieval_ptr,  # int32 [K]: retrieval heads of every KV group
    max_ptr,  # fp32 [B, H, N]
    sum_ptr,  # fp32 [B, H, N]
    top_ptr,  # int32 [B, H], NEVER between launches
    histogram_ptr,  # int64 [B, H, P, ROW]
    acc_ptr,  # fp32 [programs + B * H, D]: partial results of the retrieval heads
    best_ptr,  # fp32 [programs + B * H]
    expsum_ptr,  # fp32 [programs + B * H]
    local_acc_ptr,  # fp32 [programs + B * K, GROUP, D]: those of the local heads
    local_best_ptr,  # fp32 [programs + B * K, GROUP]
    local_expsum_ptr,  # fp32 [programs + B * K, GROUP]
    gate_ptr,  # int64 [2 * LINE]: scored, local parts stored; every launch adds `programs` to each
    head_counter_ptr,  # int32 [B, H, 2]: parts summed, parts attended; zero between launches
    listed_ptr,  # int64 [2, JOBS_PADDED]: parts and ids written, by job; each launch fills one half and clears the other
    stamp_ptr,  # int64 [programs, LINE], with STAMPS
    ids_ptr,  # int32 [B, H, N]
    count_ptr,  # int32 [B, H]
    processors, batch, num_heads, num_groups, num_retained, num_sets, capacity, slots, sinks, scale_log2, index_scale,
    stride_qb, stride_qh, stride_kb, stride_ks, stride_kh, stride_rb, stride_rs, stride_rh, stride_ob, stride_oh,
    stride_iqb, stride_iqh, stride_ikb, stride_iks, stride_iki,
    PHASE: tl.constexpr,  # 0: everything in one launch; 1 ... 4: one of the stretches between gates, where nothing waits
    TOP_P: tl.constexpr, SINK_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    B_PADDED: tl.constexpr, K_PADDED: tl.constexpr, J: tl.constexpr, J_PADDED: tl.constexpr, JOBS_PADDED: tl.constexpr,
    G: tl.constexpr, R: tl.constexpr, R_PADDED: tl.constexpr, SETS: tl.constexpr, TILE_BLOCKS: tl.constexpr, SCORE_STAGES: tl.constexpr,
    SELECT_TILE: tl.constexpr, PART_BLOCKS: tl.constexpr, PARTS: tl.constexpr, PARTED: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, GROUP_PADDED: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
    LOCAL_STEP: tl.constexpr, LOCAL_STAGES: tl.constexpr, MERGE_TILE: tl.constexpr, WARPS: tl.constexpr,
    EARLY_LAUNCH: tl.constexpr, STAMPS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    if EARLY_LAUNCH:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    stamp(stamp_ptr, program, 0, STAMPS)
    batch_B = tl.arange(0, B_PADDED)
    group_K = tl.arange(0, K_PADDED)
    group_J = tl.arange(0, J_PADDED)
    slot_G = tl.arange(0, G)
    dim_R = tl.arange(0, R_PADDED)
    real_R = dim_R < R
    dim_D = tl.arange(0, D_PADDED)
    # All small tables at once: one trip to memory before the keys, not four.
    retrieval_K = tl.load(retrieval_ptr + group_K, mask=group_K < num_groups, other=GROUP)
    set_end_J = tl.load(first_set_ptr + 1 + group_J, mask=group_J < J, other=0)
    length_B = tl.load(lengths_ptr + batch_B, mask=batch_B < batch, other=0)
    # How many launches there were: this one's arrivals make no whole one before this program's own.
    epoch = tl.load(gate_ptr, cache_modifier=".cg") // programs
    blocks_B = tl.cdiv(length_B, BLOCK)
    num_jobs = batch * num_heads
    # Shares of the index keys in tiles times sets; one group of sets reads all of them of each tile.
    tiles_B = tl.cdiv(blocks_B, TILE_BLOCKS)
    score_units = tl.sum(tiles_B) * num_sets
    score_share = tl.maximum(tl.cdiv(tl.cdiv(score_units, programs), SETS) * SETS if J == 1 else tl.cdiv(score_units, programs), 1)
    scorers = tl.cdiv(score_units, score_share)

    # First stretch: every program scores an equal share of the index keys.
    if PHASE == 0 or PHASE == 1:
        first_set = tl.zeros([], tl.int32)
        sets = num_sets + first_set
        head_G = tl.where(slot_G < num_heads, slot_G, -1)
        set_slot_G = tl.load(key_set_ptr + head_G, mask=head_G >= 0, other=-1)
        used_GR = (head_G >= 0)[:, None] & real_R[None, :]
        q_GR = tl.load(index_q_ptr + head_G[:, None] * stride_iqh + dim_R[None, :], mask=used_GR, other=0.0)
        ends_B = tl.cumsum(tiles_B, axis=0) * num_sets
        pos = program * score_share
        stop = tl.minimum(pos + score_share, score_units)
        while pos < stop:
            b = tl.sum((ends_B <= pos).to(tl.int32))
            tiles = at(tiles_B, batch_B, b)
            start = at(ends_B, batch_B, b) - tiles * num_sets
            if J > 1:
                group = tl.sum(((group_J < J) & (tiles * set_end_J <= pos - start)).to(tl.int32))
                first_set = tl.load(first_set_ptr + group)
                sets = at(set_end_J, group_J, group) - first_set
                head_G = tl.load(first_head_ptr + group) + slot_G
                head_G = tl.where(head_G < tl.load(first_head_ptr + group + 1), head_G, -1)
                set_slot_G = tl.load(key_set_ptr + head_G, mask=head_G >= 0, other=-1) - first_set
                start += tiles * first_set
            segment_stop = tl.minimum(stop, start + tiles * sets)
            b = b.to(tl.int64)
            if B_PADDED > 1 or J > 1:
                used_GR = (head_G >= 0)[:, None] & real_R[None, :]
                q_GR = tl.load(index_q_ptr + b * stride_iqb + head_G[:, None] * stride_iqh + dim_R[None, :], mask=used_GR, other=0.0)
            row_G = b * num_heads + tl.maximum(head_G, 0)
            best_G = score_chunk(
                q_GR, set_slot_G, index_k_ptr + b * stride_ikb + first_set.to(tl.int64) * stride_iki,
                max_ptr + row_G * capacity, sum_ptr + row_G * capacity, head_G,
                tl.cdiv(pos - start, sets), tl.cdiv(segment_stop - start, sets), at(length_B, batch_B, b), sets,
                stride_iks, stride_iki, index_scale, BLOCK, R, R_PADDED, G, SETS, TILE_BLOCKS, WARPS, SCORE_STAGES,
            )  # fmt: skip
            tl.atomic_max(top_ptr + row_G, ordered_key(best_G), mask=(head_G >= 0) & (best_G > float("-inf")), sem="relaxed", scope="gpu")
            pos = segment_stop
    stamp(stamp_ptr, program, 1, STAMPS)
    job_X = tl.arange(0, JOBS_PADDED)
    real_X = job_X < num_jobs
    if PHASE == 1 and program == 0:
        tl.store(listed_ptr + job_X, tl.zeros([JOBS_PADDED], tl.int64))
    target = (epoch + 1) * programs
    if PHASE == 0:
        signal(gate_ptr)
        # Launches alternate between two halves of the words; one program clears the half of the next launch.
        half = (epoch % 2).to(tl.int32)
        if program == programs - 1:
            tl.store(listed_ptr + (1 - half) * JOBS_PADDED + job_X, tl.zeros([JOBS_PADDED], tl.int64))
        listed_ptr += half * JOBS_PADDED
        stamp(stamp_ptr, program, 2, STAMPS)

    # Local jobs: one a sequence and KV group with local heads; the slots of a strand of them are divided between its places.
    local_K = (retrieval_K < GROUP).to(tl.int32)
    num_local = tl.sum(local_K)
    nth_K = tl.cumsum(local_K, axis=0) - local_K
    filled_B = tl.minimum(length_B, slots)
    units_B = tl.cdiv(filled_B, UNIT)
    local_ends_B = tl.cumsum(units_B, axis=0) * num_local

    # Second stretch: some programs select, the others attend for the local heads.
    max_parts = tl.full([], 1, tl.int32)
    if PARTED:
        max_parts, _ = parts_of(tl.max(blocks_B), SELECT_TILE, PART_BLOCKS, PARTS)
    jobs = num_jobs * max_parts
    local_units = tl.sum(units_B) * num_local
    selectors, selector, workers, worker, turn, strands = roles(
        program, programs, processors, jobs, scorers, batch, num_local, local_units, LOCAL_STEP // UNIT
    )  # fmt: skip
    strand_units = local_units // strands
    places = workers // strands
    if (PHASE == 0 or PHASE == 2 or PHASE == 3) and selector >= 0:
        if PHASE == 0:
            wait_until(gate_ptr, target, tl.zeros([], tl.int64))
            stamp(stamp_ptr, program, 3, STAMPS)
        select_jobs(
            selector, selectors, jobs, max_parts, batch_B, blocks_B, num_heads, capacity, max_ptr, sum_ptr, top_ptr, histogram_ptr,
            head_counter_ptr, listed_ptr, ids_ptr, count_ptr, stamp_ptr, program, PHASE != 3, PHASE != 2,
            TOP_P, SINK_BLOCKS, SELECT_TILE, PART_BLOCKS, PARTS, PARTED, STAMPS,
        )  # fmt: skip
        stamp(stamp_ptr, program, 7, STAMPS)

    share = strand_units // places
    larger = strand_units - share * places
    group_L = tl.arange(0, GROUP_PADDED)
    if (PHASE == 0 or PHASE == 2) and worker < workers:
        strand = worker % strands
        place = worker // strands
        pos = strand * strand_units + share_start(tl.minimum(place, places), larger, share)
        stop = strand * strand_units + share_start(tl.minimum(place + 1, places), larger, share)
        while pos < stop:
            b = tl.sum((local_ends_B <= pos).to(tl.int32))
            units = at(units_B, batch_B, b)
            start = at(local_ends_B, batch_B, b) - units * num_local
            nth = (pos - start) // units
            group = tl.sum(tl.where((local_K == 1) & (nth_K == nth), group_K, 0))
            start += nth * units
            segment_stop = tl.minimum(stop, start + units)
            filled = at(filled_B, batch_B, b)
            used_L = (group_L >= at(retrieval_K, group_K, group)) & (group_L < GROUP)
            item = b * num_local + nth
            b = b.to(tl.int64)
            head_L = group * GROUP + group_L
            q_LD = tl.load(
                q_ptr + b * stride_qb + head_L[:, None] * stride_qh + dim_D[None, :],
                mask=used_L[:, None] & (dim_D < D)[None, :], other=0.0,
            )  # fmt: skip
            offset = b * stride_rb + (group - num_retained).to(tl.int64) * stride_rh
            k_base = ring_k_ptr + offset
            v_base = ring_v_ptr + offset
            stride = stride_rs + tl.zeros([], tl.int32)
            shift = tl.zeros([], tl.int32)
            if group < num_retained:
                offset = b * stride_kb + group.to(tl.int64) * stride_kh
                k_base = k_ptr + offset
                v_base = v_ptr + offset
                stride = stride_ks + tl.zeros([], tl.int32)
                shift = at(length_B, batch_B, b) - filled
            best_L, expsum_L, acc_LD = attend_span(
                q_LD, k_base, v_base, ids_ptr, ids_ptr, (pos - start) * UNIT, tl.minimum((segment_stop - start) * UNIT, filled), filled,
                sinks, shift, stride, stride, scale_log2, False, False, True, BLOCK, LOCAL_STEP, D, GROUP_PADDED, D_PADDED, LOCAL_STAGES,
            )  # fmt: skip
            if segment_stop - pos == units:
                store_normalised(out_ptr + b * stride_ob, stride_oh, head_L, used_L, acc_LD, expsum_L, D, D_PADDED)
            else:
                row_L = (strand * places + place + item) * GROUP + group_L
                store_partial(local_acc_ptr, local_best_ptr, local_expsum_ptr, row_L, used_L, acc_LD, best_L, expsum_L, D, D_PADDED)
            pos = segment_stop
        stamp(stamp_ptr, program, 8, STAMPS)
        if PHASE == 0:
            signal(gate_ptr + LINE, tl.where(worker == 0, programs - workers + 1, 1))

    # Third stretch: all programs attend to equal shares of all lists; the last one of a head merges its parts.
    if PHASE == 0 or PHASE == 4:
        HALF: tl.constexpr = max(STEP // UNIT // 2, 1)
        row_x = tl.arange(0, 16)
        retained_K = tl.where(group_K < num_retained, retrieval_K, 0)
        upto_K = tl.cumsum(retained_K, axis=0)
        q_xD = tl.zeros([16, D_PADDED], q_ptr.dtype.element_ty)
        if JOBS_PADDED <= 16:
            # Queries of all heads fit the rows of one product: they are loaded before the wait, and every share computes all rows.
            nth_x = row_x % num_heads
            group_x = tl.sum((upto_K[None, :] <= nth_x[:, None]).to(tl.int32), axis=1)
            earlier_x = tl.sum(tl.where(group_K[None, :] < group_x[:, None], retained_K[None, :], 0), axis=1)
            offset_x = (row_x // num_heads) * stride_qb + (group_x * GROUP + nth_x - earlier_x) * stride_qh
            q_xD = tl.load(
                q_ptr + offset_x[:, None] + dim_D[None, :], mask=(row_x < num_jobs)[:, None] & (dim_D < D)[None, :], other=0.0
            )  # fmt: skip
        parts_X = real_X.to(tl.int32)
        if PARTED:
            blocks_XB = tl.where((job_X // num_heads)[:, None] == batch_B[None, :], blocks_B[None, :], 0)
            parts_X, _ = parts_of(tl.sum(blocks_XB, axis=1), SELECT_TILE, PART_BLOCKS, PARTS)
            parts_X = tl.where(real_X, parts_X, 0)
        units_X = counts_when_listed(listed_ptr + job_X, parts_X, PHASE == 0) * (BLOCK // UNIT)
        stamp(stamp_ptr, program, 9, STAMPS)
        if program == programs - 1:
            tl.store(head_counter_ptr + 2 * job_X, tl.zeros([JOBS_PADDED], tl.int32), mask=real_X)
            tl.store(top_ptr + job_X, tl.full([JOBS_PADDED], NEVER, tl.int32), mask=real_X)
        # Every list is cut into chunks of equal half steps: less than a step takes as long as one, and makes more parts to merge.
        chunk = tl.maximum(tl.cdiv(tl.cdiv(tl.sum(units_X), tl.maximum(programs - num_jobs, programs // 2)), HALF), 2) * HALF
        chunks_X = tl.cdiv(units_X, chunk)
        ends_X = tl.cumsum(chunks_X, axis=0)
        for place in range(turn, tl.sum(chunks_X), programs):
            job = tl.sum((ends_X <= place).to(tl.int32))
            units = at(units_X, job_X, job)
            chunks = at(chunks_X, job_X, job)
            first_place = at(ends_X, job_X, job) - chunks
            start = (place - first_place) * chunk
            group = tl.sum((upto_K <= job % num_heads).to(tl.int32))
            head = group * GROUP + job % num_heads - before(retained_K, group_K, group)
            b = (job // num_heads).to(tl.int64)
            used_x = row_x == (job if JOBS_PADDED <= 16 else 0)
            if JOBS_PADDED > 16:
                head_x = head + tl.zeros([16], tl.int32)
                q_xD = tl.load(
                    q_ptr + b * stride_qb + head_x[:, None] * stride_qh + dim_D[None, :],
                    mask=used_x[:, None] & (dim_D < D)[None, :], other=0.0,
                )  # fmt: skip
            offset = b * stride_kb + group.to(tl.int64) * stride_kh
            best_x, expsum_x, acc_xD = attend_span(
                q_xD, k_ptr + offset, v_ptr + offset, ids_ptr + job.to(tl.int64) * capacity, ids_ptr,
                start * UNIT, tl.minimum(start + chunk, units) * UNIT, at(length_B, batch_B, b), 0, 0, stride_ks, stride_ks, scale_log2,
                True, False, False, BLOCK, STEP, D, 16, D_PADDED, STAGES,
            )  # fmt: skip
            if chunks == 1:
                out_x = head + tl.zeros([16], tl.int32)
                store_normalised(out_ptr + b * stride_ob, stride_oh, out_x, used_x, acc_xD, expsum_x, D, D_PADDED)
            else:
                part_x = place + tl.zeros([16], tl.int32)
                store_partial(acc_ptr, best_ptr, expsum_ptr, part_x, used_x, acc_xD, best_x, expsum_x, D, D_PADDED)
                if arrive(head_counter_ptr + 2 * job + 1) == chunks - 1:
                    tl.store(head_counter_ptr + 2 * job + 1, 0)
                    out_D, lse = merge_head(
                        acc_ptr + first_place * D, best_ptr + first_place, expsum_ptr + first_place, chunks, 1, D, D_PADDED, MERGE_TILE
                    )  # fmt: skip
                    out_ptrs_D = out_ptr + b * stride_ob + head * stride_oh + dim_D
                    tl.store(out_ptrs_D, out_D.to(out_ptr.dtype.element_ty), mask=dim_D < D)

        stamp(stamp_ptr, program, 10, STAMPS)
        # The local heads' parts were stored long ago; programs without blocks come first.
        merge = programs - 1 - turn
        if PHASE == 0 and merge < batch * num_groups * GROUP:
            wait_until(gate_ptr + LINE, target, tl.zeros([], tl.int64))
        for head in range(merge, batch * num_groups * GROUP, programs):
            b = head // (num_groups * GROUP)
            group = head // GROUP % num_groups
            units = at(units_B, batch_B, b)
            nth = at(nth_K, group_K, group)
            start = at(local_ends_B, batch_B, b) - units * (num_local - nth)
            strand = start // tl.maximum(strand_units, 1)
            start -= strand * strand_units
            first_place = place_of(start, larger, share)
            chunks = place_of(start + units - 1, larger, share) - first_place + 1
            out_ptrs_D = out_ptr + (tl.zeros([], tl.int64) + b) * stride_ob + (head % (num_groups * GROUP)) * stride_oh + dim_D
            if units == 0:
                # An idle sequence: nothing else writes its rows.
                tl.store(out_ptrs_D, tl.zeros([D_PADDED], out_ptr.dtype.element_ty), mask=dim_D < D)
            if (head % GROUP >= at(retrieval_K, group_K, group)) & (units > 0) & (chunks > 1):
                row = (strand * places + first_place + b * num_local + nth) * GROUP + head % GROUP
                out_D, lse = merge_head(
                    local_acc_ptr + row * D, local_best_ptr + row, local_expsum_ptr + row, chunks, GROUP, D, D_PADDED, MERGE_TILE
                )
                tl.store(out_ptrs_D, out_D.to(out_ptr.dtype.element_ty), mask=dim_D < D)
    stamp(stamp_ptr, program, 11, STAMPS)
