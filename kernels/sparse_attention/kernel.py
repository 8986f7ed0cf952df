"""Decode attention in Triton: one query token over blocks of the cache, split over the GPU and merged in one launch."""
# Triton's compiler, not Python's type rules, decides what the jitted functions mean:
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false

# B batch  H query heads  J jobs (a row of heads that read the same blocks)  G heads of a job (padded)  D head dim
# N blocks  L slots for partial results
import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from rtpurbo.kernels.arrival import arrive, last_to_leave, wait_until
from rtpurbo.kernels.division import padded_width, stages_that_fit
from rtpurbo.kernels.launch import Launch
from rtpurbo.kernels.sparse_attention.union import counts_of_union, list_union

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
# Keys that are not divided between programs, where no list of blocks says what is read.
UNIT = tl.constexpr(16)
# Ids of blocks that a program holds at a time.
LISTED = tl.constexpr(64)


@triton.jit
def of_blocks(listed_x, place, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """What the list holds for the block of each of STEP keys from `place` on, counted from the first key of the first block listed."""
    slot_x = tl.arange(0, listed_x.shape[0])
    block_s = tl.arange(0, STEP) // BLOCK
    of_s = tl.zeros([STEP], tl.int32)
    for n in tl.static_range(max(STEP // BLOCK, 1)):
        of_s = tl.where(block_s == n, tl.sum(tl.where(slot_x == place // BLOCK + n, listed_x, 0)), of_s)
    return of_s


@triton.jit
def attend_keys(
    q_GD, best_G, sum_Gs, acc_GD, k_base, v_base, ids_x, heads_x, first, end, tokens, sinks, shift, stride_ks, stride_vs, scale_log2,
    HAS_IDS: tl.constexpr, HAS_HEADS: tl.constexpr, SHIFTED: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr,
    G: tl.constexpr, D_PADDED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Continue an online softmax (base 2) over places first ... end - 1, STEP at a time; ids_x, heads_x: the list from their block on.

    sum_Gs holds the sums of exponentials by place in a step: added up once at the end, not across warps in every step.
    """
    dim_D = tl.arange(0, D_PADDED)
    row_s = tl.arange(0, STEP)
    listed_from = first // BLOCK * BLOCK
    # A step lies within blocks of the list.
    begin = first // min(STEP, BLOCK) * min(STEP, BLOCK) if HAS_IDS else first
    for start in tl.range(begin, end, STEP, num_stages=STAGES):
        token_s = start + row_s
        stored_s = (token_s >= first) & (token_s < end) if HAS_IDS else token_s < end
        seen_Gs = tl.full([G, STEP], True, tl.int1)
        if HAS_HEADS:
            heads_s = of_blocks(heads_x, start - listed_from, BLOCK, STEP)
            seen_Gs = ((heads_s[None, :] >> tl.arange(0, G)[:, None]) & 1) != 0
        if HAS_IDS:
            token_s = of_blocks(ids_x, start - listed_from, BLOCK, STEP) * BLOCK + token_s % BLOCK
            stored_s = stored_s & (token_s < tokens)
        if SHIFTED:
            token_s = tl.where(token_s < sinks, token_s, token_s + shift)
        offset_s = token_s.to(tl.int64)[:, None]
        # Rows that were never written may hold NaN: they are replaced, not only weighted with zero.
        mask_sD = stored_s[:, None] & (dim_D < D)[None, :]
        k_sD = tl.load(k_base + offset_s * stride_ks + dim_D[None, :], mask=mask_sD, other=0.0)
        v_sD = tl.load(v_base + offset_s * stride_vs + dim_D[None, :], mask=mask_sD, other=0.0)
        logits_Gs = tl.dot(q_GD, tl.trans(k_sD), input_precision="ieee") * scale_log2
        logits_Gs = tl.where(seen_Gs & stored_s[None, :], logits_Gs, float("-inf"))
        new_best_G = tl.maximum(best_G, tl.max(logits_Gs, axis=1))
        # The first keys of a span may all be missing: exponentials must not see inf - inf.
        safe_best_G = tl.where(new_best_G == float("-inf"), 0.0, new_best_G)
        weight_Gs = tl.exp2(logits_Gs - safe_best_G[:, None])
        decay_G = tl.exp2(best_G - safe_best_G)
        sum_Gs = sum_Gs * decay_G[:, None] + weight_Gs
        acc_GD = acc_GD * decay_G[:, None] + tl.dot(weight_Gs.to(v_sD.dtype), v_sD, input_precision="ieee")
        best_G = new_best_G
    return best_G, sum_Gs, acc_GD


@triton.jit
def attend_span(
    q_GD, k_base, v_base, ids_ptr, listed_heads_ptr, first, end, tokens, sinks, shift, stride_ks, stride_vs, scale_log2,
    HAS_IDS: tl.constexpr, HAS_HEADS: tl.constexpr, SHIFTED: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr,
    G: tl.constexpr, D_PADDED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax (base 2) of the job's heads over places first ... end - 1 of its list of keys.

    HAS_IDS: place x is key x mod BLOCK of the block ids[x // BLOCK]; keys at or beyond `tokens` are not stored yet. HAS_HEADS: only the
    heads whose bit is set in listed_heads[x // BLOCK] see the block. Without ids place x is slot x; SHIFTED: slots from `sinks` on lie
    `shift` rows further (a window read from a cache by position).
    """
    best_G = tl.full([G], float("-inf"), tl.float32)
    sum_Gs = tl.zeros([G, STEP], tl.float32)
    acc_GD = tl.zeros([G, D_PADDED], tl.float32)
    slot_x = tl.arange(0, LISTED)
    ids_x = tl.zeros([LISTED], tl.int32)
    heads_x = ids_x
    if HAS_IDS:
        # Ids stay in registers: loads of the loop's own would take half of the stages of its pipeline from the keys that they lead to.
        for listed_from in range(first // BLOCK * BLOCK, end, LISTED * BLOCK):
            listed_x = listed_from // BLOCK + slot_x
            ids_x = tl.load(ids_ptr + listed_x, mask=listed_x * BLOCK < end, other=0, cache_modifier=".cg")
            if HAS_HEADS:
                heads_x = tl.load(listed_heads_ptr + listed_x, mask=listed_x * BLOCK < end, other=0, cache_modifier=".cg")
            best_G, sum_Gs, acc_GD = attend_keys(
                q_GD, best_G, sum_Gs, acc_GD, k_base, v_base, ids_x, heads_x, tl.maximum(first, listed_from),
                tl.minimum(listed_from + LISTED * BLOCK, end), tokens, sinks, shift, stride_ks, stride_vs, scale_log2,
                True, HAS_HEADS, SHIFTED, BLOCK, STEP, D, G, D_PADDED, STAGES,
            )  # fmt: skip
    else:
        best_G, sum_Gs, acc_GD = attend_keys(
            q_GD, best_G, sum_Gs, acc_GD, k_base, v_base, ids_x, heads_x, first, end, tokens, sinks, shift, stride_ks, stride_vs,
            scale_log2, False, False, SHIFTED, BLOCK, STEP, D, G, D_PADDED, STAGES,
        )  # fmt: skip
    return best_G, tl.sum(sum_Gs, axis=1), acc_GD


@triton.jit
def merge_head(acc_ptr, best_ptr, sum_ptr, chunks, stride_chunk, D: tl.constexpr, D_PADDED: tl.constexpr, TILE: tl.constexpr):
    """Merge one head's partial results in the order of its chunks; returns out fp32 [D] and the base-2 log of the sum."""
    dim_D = tl.arange(0, D_PADDED)
    best = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    out_D = tl.zeros([D_PADDED], tl.float32)
    for start in range(0, chunks, TILE):
        chunk_c = start + tl.arange(0, TILE)
        used_c = chunk_c < chunks
        used_cD = used_c[:, None] & (dim_D < D)[None, :]
        acc_cD = tl.load(acc_ptr + chunk_c[:, None] * (stride_chunk * D) + dim_D[None, :], mask=used_cD, other=0.0, cache_modifier=".cg")
        best_c = tl.load(best_ptr + chunk_c * stride_chunk, mask=used_c, other=float("-inf"), cache_modifier=".cg")
        sum_c = tl.load(sum_ptr + chunk_c * stride_chunk, mask=used_c, other=0.0, cache_modifier=".cg")
        new_best = tl.maximum(best, tl.max(best_c))
        # Parts may hold no key of this head.
        safe_best = tl.where(new_best == float("-inf"), 0.0, new_best)
        weight_c = tl.exp2(best_c - safe_best)
        decay = tl.exp2(best - safe_best)
        total = total * decay + tl.sum(sum_c * weight_c)
        out_D = out_D * decay + tl.sum(acc_cD * weight_c[:, None], axis=0)
        best = new_best
    return out_D / total, best + tl.log2(total)


@triton.jit
def attend_decode_kernel(
    q_ptr,  # [B, H, D], last axis contiguous
    k_ptr,  # [B, S, K, D], last axis contiguous
    v_ptr,
    out_ptr,  # [B, H, D], contiguous rows
    lse_ptr,  # fp32 [B, H]
    ids_ptr,  # int32 [B, J, N], with UNION filled here; without ids: unused
    count_ptr,  # int32 [B, J], without ids: unused
    mask_ptr,  # int32 [B, heads of all jobs, N / 32], with UNION
    row_ptr,  # int32 [J, G], the row of the mask of each head, with UNION
    listed_heads_ptr,  # int32 [B, J, N], with UNION filled here
    lengths_ptr,  # int32 [B]
    heads_ptr,  # int32 [J, G], -1 where a job has fewer heads
    kv_head_ptr,  # int32 [J]
    acc_ptr,  # fp32 [B, L, G, D]
    best_ptr,  # fp32 [B, L, G]
    sum_ptr,  # fp32 [B, L, G]
    counter_ptr,  # int32 [B, J, 2], zero between launches
    stride_qb,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_ob,
    stride_oh,
    num_heads,
    num_jobs,
    slots,
    capacity,
    num_masks,
    mask_words,
    target_programs,
    sinks,
    scale_log2,
    max_mergers,
    HAS_IDS: tl.constexpr,
    UNION: tl.constexpr,
    BY_POSITION: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    G: tl.constexpr,
    G_PADDED: tl.constexpr,
    J_PADDED: tl.constexpr,
    W_PADDED: tl.constexpr,
    MERGE_TILE: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY_LAUNCH: tl.constexpr,
):
    program = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    job_J = tl.arange(0, J_PADDED)
    real_J = job_J < num_jobs
    slot_G = tl.arange(0, G_PADDED)
    dim_D = tl.arange(0, D_PADDED)
    # All small tables at once: one trip to memory before the cache, not four.
    head_JG = tl.load(heads_ptr + job_J[:, None] * G + slot_G[None, :], mask=real_J[:, None] & (slot_G < G)[None, :], other=-1)
    kv_head_J = tl.load(kv_head_ptr + job_J, mask=real_J, other=0)
    if EARLY_LAUNCH:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    length = tl.load(lengths_ptr + batch)
    tokens = tl.minimum(length, slots)
    # Equal chunks over all jobs of the sequence: a head with many blocks gets many programs.
    if UNION:
        words = tl.cdiv(tl.cdiv(length, BLOCK), 32)
        slot_H = tl.arange(0, G)
        keys_J = tl.zeros([J_PADDED], tl.int32)
        for j in range(num_jobs):
            row_H = tl.load(row_ptr + j * G + slot_H)
            used_H = tl.load(heads_ptr + j * G + slot_H) >= 0
            mask_base = mask_ptr + batch * num_masks * mask_words
            count = tl.sum(counts_of_union(mask_base, row_H, used_H, mask_words, words, W_PADDED))
            keys_J = tl.where(job_J == j, count * BLOCK, keys_J)
        chunk_keys = tl.maximum(tl.cdiv(tl.cdiv(tl.sum(keys_J), target_programs), BLOCK), 1) * BLOCK
    else:
        keys_J = tl.load(count_ptr + batch * num_jobs + job_J, mask=real_J, other=0) * BLOCK if HAS_IDS else tl.where(real_J, tokens, 0)
        unit = BLOCK if HAS_IDS else UNIT
        chunk_keys = tl.maximum(tl.cdiv(tl.cdiv(tl.sum(keys_J), target_programs), unit), 1) * unit
    chunks_J = tl.where(real_J, tl.maximum(tl.cdiv(keys_J, chunk_keys), 1), 0)
    ends_J = tl.cumsum(chunks_J, axis=0)
    job = tl.sum((real_J & (ends_J <= program)).to(tl.int32))
    if job >= num_jobs:
        return
    chunks = tl.sum(tl.where(job_J == job, chunks_J, 0))
    keys = tl.sum(tl.where(job_J == job, keys_J, 0))
    first_program = tl.sum(tl.where(job_J == job, ends_J, 0)) - chunks
    first = (program - first_program) * chunk_keys
    end = tl.minimum(first + chunk_keys, keys)

    head_G = tl.max(tl.where(job_J[:, None] == job, head_JG, -1), axis=0)
    kv_head = tl.sum(tl.where(job_J == job, kv_head_J, 0)).to(tl.int64)
    used_G = head_G >= 0
    used_GD = used_G[:, None] & (dim_D < D)[None, :]
    q_GD = tl.load(q_ptr + batch * stride_qb + head_G[:, None] * stride_qh + dim_D[None, :], mask=used_GD, other=0.0)
    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh
    ids_ptr += (batch * num_jobs + job) * capacity
    listed_heads_ptr += (batch * num_jobs + job) * capacity
    if UNION:
        slot_H = tl.arange(0, G)
        row_H = tl.load(row_ptr + job * G + slot_H)
        used_H = tl.load(heads_ptr + job * G + slot_H) >= 0
        list_union(
            mask_ptr + batch * num_masks * mask_words, ids_ptr, listed_heads_ptr, row_H, used_H, mask_words,
            tl.cdiv(tl.cdiv(length, BLOCK), 32), first // BLOCK, end // BLOCK, W_PADDED, G,
        )  # fmt: skip
        tl.debug_barrier()
    best_G, sum_G, acc_GD = attend_span(
        q_GD, k_base, v_base, ids_ptr, listed_heads_ptr, first, end, tokens, sinks, length - tokens, stride_ks, stride_vs, scale_log2,
        HAS_IDS, UNION, BY_POSITION, BLOCK, STEP, D, G_PADDED, D_PADDED, STAGES,
    )  # fmt: skip

    out_ptr += batch * stride_ob
    lse_ptr += batch * num_heads
    if chunks == 1:
        # A head without any key gives 0 and -inf.
        weight_G = tl.where(sum_G > 0, 1.0 / sum_G, 0.0)
        out_ptrs_GD = out_ptr + head_G[:, None] * stride_oh + dim_D[None, :]
        tl.store(out_ptrs_GD, (acc_GD * weight_G[:, None]).to(out_ptr.dtype.element_ty), mask=used_GD)
        tl.store(lse_ptr + head_G, (best_G + tl.log2(sum_G)) * LN2, mask=used_G)
        return
    row = (batch * tl.num_programs(0) + program) * G
    tl.store(best_ptr + row + slot_G, best_G, mask=used_G)
    tl.store(sum_ptr + row + slot_G, sum_G, mask=used_G)
    tl.store(acc_ptr + (row + slot_G)[:, None] * D + dim_D[None, :], acc_GD, mask=used_GD)
    counter_ptr += (batch * num_jobs + job) * 2
    ticket = arrive(counter_ptr)
    heads_in_job = tl.sum(used_G.to(tl.int32))
    mergers = tl.minimum(tl.minimum(heads_in_job, chunks), max_mergers)
    merger = ticket - (chunks - mergers)
    if merger < 0:
        return
    wait_until(counter_ptr, chunks, ticket + 1)
    for slot in range(merger, heads_in_job, mergers):
        head = tl.load(heads_ptr + job * G + slot)
        first_row = (batch * tl.num_programs(0) + first_program) * G + slot
        out_D, lse = merge_head(acc_ptr + first_row * D, best_ptr + first_row, sum_ptr + first_row, chunks, G, D, D_PADDED, MERGE_TILE)
        tl.store(out_ptr + head * stride_oh + dim_D, out_D.to(out_ptr.dtype.element_ty), mask=dim_D < D)
        tl.store(lse_ptr + head, lse * LN2)
    if last_to_leave(counter_ptr + 1, mergers):
        tl.store(counter_ptr, 0)
        tl.store(counter_ptr + 1, 0)


def describe(
    plan,
    q_BHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    lengths_B: torch.Tensor,
    ids_BJN: torch.Tensor | None,
    count_BJ: torch.Tensor | None,
    scale: float,
    out_BHD: torch.Tensor,
    lse_BH: torch.Tensor,
    window: int | None = None,
    sinks: int = 0,
    mask_BHW: torch.Tensor | None = None,
) -> Launch:
    """The launch that writes out and lse of the plan's heads, with an `AttendPlan`'s workspace.

    With a window the keys are those of the sinks and of the newest `window` positions of a cache by position. With a mask (bits of
    a `SelectionPlan`) a job reads the blocks that any of its heads selected once, and ids and count are not given.
    """
    B, H, D = q_BHD.shape
    J, G = plan.heads_JG.shape
    D_padded = padded_width(D)
    if mask_BHW is not None:
        ids_BJN = plan.list_BJN
    unused = plan.counters
    step, row_bytes = plan.step_blocks * plan.block_size, 2 * D_padded * k_BSKD.element_size()
    # Wide rows: the products of one step read its keys and values from shared memory too.
    while step > UNIT.value and step * row_bytes > plan.pipeline_bytes:
        step //= 2
    return Launch(
        kernel=attend_decode_kernel,
        grid=(plan.programs + J, B),
        arguments=(
            q_BHD, k_BSKD, v_BSKD, out_BHD, lse_BH,
            unused if ids_BJN is None else ids_BJN, unused if count_BJ is None else count_BJ, unused if mask_BHW is None else mask_BHW,
            plan.row_JG, unused if mask_BHW is None else plan.heads_BJN, lengths_B, plan.heads_JG, plan.kv_head_J,
            plan.acc_BLGD, plan.best_BLG, plan.sum_BLG, plan.counters,
            *q_BHD.stride()[:2], *k_BSKD.stride()[:3], *v_BSKD.stride()[:3], *out_BHD.stride()[:2],
            H, J, k_BSKD.shape[1] if window is None else sinks + window, 0 if ids_BJN is None else ids_BJN.shape[2],
            *((0, 0) if mask_BHW is None else mask_BHW.shape[1:]), plan.programs, sinks,
            float(scale) * LOG2E, plan.max_mergers,
        ),
        constants={
            "HAS_IDS": ids_BJN is not None,
            "UNION": mask_BHW is not None,
            "BY_POSITION": window is not None,
            "BLOCK": plan.block_size,
            "STEP": step,
            "D": D,
            "D_PADDED": D_padded,
            "G": G,
            # A matrix product has at least 16 rows.
            "G_PADDED": max(16, G),
            "J_PADDED": triton.next_power_of_2(J),
            "W_PADDED": 1 if mask_BHW is None else triton.next_power_of_2(mask_BHW.shape[2]),
            "MERGE_TILE": plan.merge_tile,
            "STAGES": stages_that_fit(plan.stages, step * row_bytes, plan.pipeline_bytes),
            "EARLY_LAUNCH": plan.early_launch,
        },
        num_warps=plan.num_warps,
        early_launch=plan.early_launch,
    )  # fmt: skip
