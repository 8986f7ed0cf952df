"""decode_layer as one launch: its scratch memory, what it can run, and the launcher."""

# B batch  S cached tokens  W ring slots (sinks + window)  H retrieval heads  K kv heads  D head dim
# I index-key sets  J groups of sets  R index dim  N blocks  L slots for partial results  P parts of a head's selection  b bins
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rtpurbo.kernels.block_selection.plan import (
    HISTOGRAM_WORDS,
    MAX_PART,
    MAX_PARTS,
    check_capacity,
    divide_heads,
    largest_tile,
    parts_for,
    scores_of_blocks,
)
from rtpurbo.kernels.decode_layer.step import DecodeStep
from rtpurbo.kernels.division import next_power_of_2, num_processors_of, padded_width, pipeline_bytes_of, stages_that_fit
from rtpurbo.kernels.launch import Launch

TILE_BYTES, SCRATCH_BYTES = 40 << 10, 8 << 10
MAX_TILE_BLOCKS = 8
# Of a multiprocessor.
REGISTERS = 1 << 16
# Largest batch, in sequences and in tokens of all of them, for which one launch was faster.
FEW_SEQUENCES, FEW_TOKENS = 8, 1 << 18
# Blocks of a head selected by one program where a capacity needs parts, and of a part.
PARTED_TILE, PART_BLOCKS = 1024, 512
# Largest capacity, in tokens, for which the local heads' keys are loaded two steps ahead.
FEW_SCORED = 1 << 16
NEVER = -(1 << 31)
# What a program has done when it stamps the time.
STAMP_NAMES = (
    "started", "scored", "arrived", "all arrived", "part summed", "all parts summed", "bins known", "ids written", "local heads done",
    "ids there", "attended", "ended",
)  # fmt: skip
LOG2E = 1.4426950408889634


@dataclass(frozen=True, kw_only=True)
class FusedPlan:
    """Static facts and scratch memory of the one-launch decode; calls that share one must not overlap in time."""

    batch: int
    capacity_blocks: int
    block_size: int
    group_size: int
    num_groups: int
    num_retained: int
    num_sets: int
    num_heads: int
    processors: int
    programs: int
    early_launch: bool
    max_registers: int
    pipeline_bytes: int
    held_tiles: int | None
    num_warps: int
    tile_blocks: int
    score_stages: int
    sets_in_group: int
    columns: int
    select_tile: int
    part_blocks: int
    max_parts: int
    step: int
    stages: int
    local_step: int
    local_stages: int
    merge_tile: int
    key_set_H: torch.Tensor
    first_set_J: torch.Tensor
    first_head_J: torch.Tensor
    retrieval_K: torch.Tensor
    block_max_BHN: torch.Tensor
    block_sum_BHN: torch.Tensor
    top_BH: torch.Tensor
    histogram_BHPb: torch.Tensor
    acc_LD: torch.Tensor
    best_L: torch.Tensor
    sum_L: torch.Tensor
    local_acc_LGD: torch.Tensor
    local_best_LG: torch.Tensor
    local_sum_LG: torch.Tensor
    gates: torch.Tensor
    head_counters: torch.Tensor
    listed_2X: torch.Tensor
    stamps: torch.Tensor | None


def plan_fused(
    *,
    group_size: int,
    num_groups: int,
    retrieval_counts: Sequence[int],
    key_sets: Sequence[int],
    batch: int,
    capacity: int,
    head_dim: int,
    block_size: int,
    device: torch.device,
    num_warps: int = 4,
    programs_per_processor: int = 2,
    tile_blocks: int | None = None,
    score_stages: int = 3,
    select_tile: int | None = None,
    part_blocks: int = PART_BLOCKS,
    max_parts: int = MAX_PARTS,
    step: int = 64,
    stages: int = 3,
    local_step: int = 64,
    local_stages: int | None = None,
    merge_tile: int = 32,
    pipeline_bytes: int | None = None,
    held_tiles: int | None = None,
    early_launch: bool | None = None,
    stamps: bool = False,
) -> FusedPlan:
    """Divide the work and allocate scratch memory; key_sets must ascend (the order of `runtime/layout.py`).

    early_launch: overlap the end of the launch before (programmatic dependent launch); None: on GPUs that can. The other options are
    measured variants, see benchmarks/decode.md.
    stamps: let every program note in `plan.stamps` [programs, 16] when (ns) it came to each of STAMP_NAMES; 0: it did not.
    """
    H, num_sets, N = len(key_sets), max(key_sets) + 1, max(1, -(-capacity // block_size))
    tile = largest_tile(N, block_size)
    select_tile = select_tile or (tile if tile >= N else min(tile, PARTED_TILE))
    # Few tokens are scored by a part of the programs: the others have the bandwidth of the local heads' keys for themselves.
    local_stages = local_stages or (3 if capacity <= FEW_SCORED else 2)
    if early_launch is None:
        early_launch = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    heads_JG, _, first_J = divide_heads(key_sets, num_sets, 6)
    J = len(first_J) - 1
    sets_in_group = max(first_J[j + 1] - first_J[j] for j in range(J))
    tile_bytes = sets_in_group * block_size * 32
    tile_blocks = tile_blocks or max(num_warps, min(MAX_TILE_BLOCKS, next_power_of_2(TILE_BYTES // tile_bytes + 1) // 2))
    check_capacity("plan_decode_layer", capacity, block_size, select_tile)
    part_blocks = min(part_blocks, select_tile)
    max_parts = parts_for(N, part_blocks, max_parts)
    if select_tile < N and (max_parts < 2 or -(-N // max_parts) > MAX_PART):
        raise ValueError(f"plan_decode_layer: {N} blocks in {max_parts} parts, wanted at least 2 of at most {MAX_PART} blocks")
    # Wide heads: fewer keys a step.
    row_bytes = 4 * next_power_of_2(head_dim)
    step, local_step = (max(16, min(width, (64 << 10) // row_bytes)) for width in (step, local_step))
    processors = num_processors_of(device)
    programs = processors * programs_per_processor
    slots, local_slots = programs + batch * H, programs + batch * num_groups

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def table(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=device)

    return FusedPlan(
        batch=batch, capacity_blocks=N, block_size=block_size, group_size=group_size, num_groups=num_groups,
        num_retained=len(retrieval_counts), num_sets=num_sets, num_heads=H, processors=processors, programs=programs,
        early_launch=early_launch,
        max_registers=min(255, REGISTERS // (programs_per_processor * num_warps * 32) // 8 * 8),
        pipeline_bytes=(pipeline_bytes or pipeline_bytes_of(device)) // programs_per_processor, held_tiles=held_tiles, num_warps=num_warps,
        tile_blocks=tile_blocks, score_stages=score_stages, sets_in_group=sets_in_group, columns=heads_JG.shape[1],
        select_tile=select_tile, part_blocks=part_blocks, max_parts=max_parts, step=step, stages=stages,
        local_step=local_step, local_stages=local_stages, merge_tile=merge_tile,
        key_set_H=table(key_sets),
        first_set_J=table(first_J),
        first_head_J=table([sum(key_set < first for key_set in key_sets) for first in first_J]),
        retrieval_K=table([*retrieval_counts, *([0] * (num_groups - len(retrieval_counts)))]),
        block_max_BHN=scores_of_blocks(batch, H, N, device), block_sum_BHN=scores_of_blocks(batch, H, N, device),
        top_BH=torch.full((batch, H), NEVER, dtype=torch.int32, device=device),
        histogram_BHPb=scratch(batch, H, max_parts, HISTOGRAM_WORDS, dtype=torch.int64),
        acc_LD=scratch(slots, head_dim), best_L=scratch(slots), sum_L=scratch(slots),
        local_acc_LGD=scratch(local_slots, group_size, head_dim), local_best_LG=scratch(local_slots, group_size),
        local_sum_LG=scratch(local_slots, group_size),
        gates=torch.zeros(32, dtype=torch.int64, device=device),
        head_counters=torch.zeros(batch, H, 2, dtype=torch.int32, device=device),
        listed_2X=torch.zeros(2, next_power_of_2(batch * H), dtype=torch.int64, device=device),
        stamps=torch.zeros(programs, 16, dtype=torch.int64, device=device) if stamps else None,
    )  # fmt: skip


def is_faster(capability: tuple[int, int], dtype: torch.dtype, batch: int, capacity: int, head_dim: int) -> bool:
    """Whether one launch was measured faster than the separate ones (benchmarks/decode.md: H200, bf16; one sequence, or 8 of 32K)."""
    small = batch == 1 or (batch <= FEW_SEQUENCES and batch * capacity <= FEW_TOKENS)
    return capability == (9, 0) and dtype in (torch.bfloat16, torch.float16) and small and head_dim <= 128


def obstacle(
    plan: FusedPlan | None,
    k_BSKD: torch.Tensor | None,
    v_BSKD: torch.Tensor | None,
    ring_k: torch.Tensor | None,
    ring_v: torch.Tensor | None,
) -> str | None:
    """Why these tensors cannot run in one launch, or None."""
    if plan is None:
        return "the plan selects nothing, or its key sets do not ascend"
    for name, k, v in (("k and v", k_BSKD, v_BSKD), ("ring_k and ring_v", ring_k, ring_v)):
        if k is not None and v is not None and (k.stride() != v.stride() or k.stride(3) != 1):
            return f"{name} need equal strides and a contiguous last axis, found {k.stride()} and {v.stride()}"
    return None


def _constants(
    plan: FusedPlan, k_BSKD: torch.Tensor, index_k_BSIR: torch.Tensor, top_p: float, sinks: int, phase: int
) -> dict[str, object]:  # fmt: skip
    """The kernel's constexpr parameters; stages by the size of the elements."""
    from rtpurbo.kernels.block_selection.scoring import score_stages

    H, D, R = plan.num_heads, k_BSKD.shape[3], index_k_BSIR.shape[3]
    R_padded = padded_width(R)
    tile_bytes = plan.sets_in_group * plan.tile_blocks * plan.block_size * R_padded * index_k_BSIR.element_size()
    row_bytes = 2 * padded_width(D) * k_BSKD.element_size()
    return {
        "PHASE": phase, "TOP_P": float(top_p), "SINK_BLOCKS": -(-sinks // plan.block_size), "BLOCK": plan.block_size,
        "GROUP": plan.group_size,
        "B_PADDED": next_power_of_2(plan.batch), "K_PADDED": next_power_of_2(plan.num_groups),
        "J": plan.first_set_J.shape[0] - 1, "J_PADDED": next_power_of_2(plan.first_set_J.shape[0] - 1),
        "JOBS_PADDED": next_power_of_2(plan.batch * H), "G": plan.columns, "R": R, "R_PADDED": R_padded, "SETS": plan.sets_in_group,
        "TILE_BLOCKS": plan.tile_blocks,
        "SCORE_STAGES": score_stages(plan.score_stages, tile_bytes, plan.pipeline_bytes - SCRATCH_BYTES, plan.held_tiles),
        "SELECT_TILE": plan.select_tile, "PART_BLOCKS": plan.part_blocks, "PARTS": plan.max_parts,
        "PARTED": plan.capacity_blocks > plan.select_tile,
        "D": D, "D_PADDED": padded_width(D), "GROUP_PADDED": padded_width(plan.group_size),
        "STEP": plan.step, "STAGES": stages_that_fit(plan.stages, plan.step * row_bytes, plan.pipeline_bytes),
        "LOCAL_STEP": plan.local_step,
        "LOCAL_STAGES": stages_that_fit(plan.local_stages, plan.local_step * row_bytes, plan.pipeline_bytes),
        "MERGE_TILE": plan.merge_tile, "WARPS": plan.num_warps,
        "EARLY_LAUNCH": plan.early_launch, "STAMPS": plan.stamps is not None,
    }  # fmt: skip


def describe(
    plan: FusedPlan, step: DecodeStep, window: int, sinks: int, ids_BHN: torch.Tensor, count_BH: torch.Tensor, phase: int
) -> Launch:
    """The launch that writes out, ids and count (phase 0), or one of its four stretches."""
    from rtpurbo.kernels.decode_layer.fused_kernel import decode_layer_kernel

    B, H, q_BHD, out_BHD = step.q_BHD.shape[0], plan.num_heads, step.q_BHD, step.out_BHD
    (k_BSKD, v_BSKD), (index_q_BHR, index_k_BSIR) = step.cache, step.index
    ring_k, ring_v = step.cache if step.ring_k_BWKD is None else step.ring
    arguments = (
        q_BHD, k_BSKD, v_BSKD, ring_k, ring_v, out_BHD, index_q_BHR, index_k_BSIR, step.lengths_B,
        plan.key_set_H, plan.first_set_J, plan.first_head_J, plan.retrieval_K,
        plan.block_max_BHN, plan.block_sum_BHN, plan.top_BH, plan.histogram_BHPb,
        plan.acc_LD, plan.best_L, plan.sum_L, plan.local_acc_LGD, plan.local_best_LG, plan.local_sum_LG,
        plan.gates, plan.head_counters, plan.listed_2X, plan.gates if plan.stamps is None else plan.stamps, ids_BHN, count_BH,
        plan.processors, B, H, plan.num_groups, plan.num_retained, plan.num_sets, plan.capacity_blocks, sinks + window, sinks,
        float(step.scale) * LOG2E, float(step.index_scale),
        q_BHD.stride(0), q_BHD.stride(1), k_BSKD.stride(0), k_BSKD.stride(1), k_BSKD.stride(2),
        ring_k.stride(0), ring_k.stride(1), ring_k.stride(2), out_BHD.stride(0), out_BHD.stride(1),
        index_q_BHR.stride(0), index_q_BHR.stride(1), index_k_BSIR.stride(0), index_k_BSIR.stride(1), index_k_BSIR.stride(2),
    )  # fmt: skip
    return Launch(
        kernel=decode_layer_kernel,
        grid=(plan.programs,),
        arguments=arguments,
        constants=_constants(plan, k_BSKD, index_k_BSIR, step.top_p, sinks, phase),
        num_warps=plan.num_warps,
        early_launch=plan.early_launch,
        all_at_once=phase == 0,
        max_registers=plan.max_registers,
    )


def launch(plan: FusedPlan, step: DecodeStep, window: int, sinks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel with the plan's workspace; writes out, returns (ids, count). On a CPU (the interpreter runs one program
    after the other) the stretches between its gates are launches of their own."""
    B, device = step.q_BHD.shape[0], step.q_BHD.device
    ids_BHN = torch.empty(B, plan.num_heads, plan.capacity_blocks, dtype=torch.int32, device=device)
    count_BH = torch.empty(B, plan.num_heads, dtype=torch.int32, device=device)
    for phase in (0,) if step.q_BHD.is_cuda else (1, 2, 3, 4):
        describe(plan, step, window, sinks, ids_BHN, count_BH, phase).run()
    return ids_BHN, count_BH
