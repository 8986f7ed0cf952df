"""Workspace and work division of decode attention: made once for a layer shape, used by every step."""

# B batch  H query heads  J jobs  G heads of a job (padded)  D head dim  L slots for partial results
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from rtpurbo.kernels.division import group_heads, max_waiting, num_processors_of, pipeline_bytes_of


class Division(NamedTuple):
    """Blocks of a step, stages of the pipeline that loads them (one less is on its way), programs a multiprocessor."""

    step_blocks: int
    stages: int
    programs_per_processor: int


# What was fastest for what a job reads (benchmarks/decode.md): blocks of a list, those of a union of lists, all keys, a ring (small
# steps leave room beside the selection).
DIVISIONS = {"list": Division(1, 3, 2), "union": Division(2, 3, 1), "all": Division(2, 3, 1), "ring": Division(1, 4, 1)}


@dataclass(frozen=True, kw_only=True)
class AttendPlan:
    """Static facts and scratch memory of decode attention; calls that share one must not overlap in time.

    A job is a row of query heads that read the same blocks of the same KV head.
    """

    head_J: tuple[tuple[int, ...], ...]
    kv_J: tuple[int, ...]
    block_size: int
    programs: int
    max_mergers: int
    merge_tile: int
    stages: int
    pipeline_bytes: int
    num_warps: int
    step_blocks: int
    early_launch: bool
    heads_JG: torch.Tensor
    kv_head_J: torch.Tensor
    acc_BLGD: torch.Tensor
    best_BLG: torch.Tensor
    sum_BLG: torch.Tensor
    counters: torch.Tensor
    row_JG: torch.Tensor
    list_BJN: torch.Tensor | None
    heads_BJN: torch.Tensor | None


def plan_attention(
    head_J: Sequence[Sequence[int]],
    kv_head_J: Sequence[int],
    *,
    batch: int,
    head_dim: int,
    device: torch.device | str,
    block_size: int = 64,
    reads: str = "list",
    step_blocks: int | None = None,
    stages: int | None = None,
    programs_per_processor: int | None = None,
    merge_tile: int = 64,
    num_warps: int = 4,
    early_launch: bool = False,
    pipeline_bytes: int | None = None,
    union_blocks: int = 0,
) -> AttendPlan:
    """Divide the work of `attend_selected` (one head a job) or `attend_slots` (the heads of a KV group a job).

    Args:
        head_J: for every job its query heads, as rows of q and out; a head belongs to one job.
        kv_head_J: for every job the KV head it reads.
        batch, head_dim: largest batch; D.
        device: where the cache lives.
        block_size: keys a block.
        reads: what the jobs read, one of DIVISIONS.
        step_blocks, stages, programs_per_processor, merge_tile, num_warps: work division; None: that of DIVISIONS.
        early_launch: let the launch overlap the end of the launch before it (programmatic dependent launch).
        pipeline_bytes: shared memory of a multiprocessor for keys and values on their way; what the device has.
        union_blocks: blocks that a cache has at most, for `attend_grouped`; 0: the plan is not for it.

    Raises ValueError for jobs that are empty, share a head or lack a KV head, and for an unknown `reads`.
    """
    device = torch.device(device)
    heads = [head for job in head_J for head in job]
    if not heads or any(not job for job in head_J) or len(set(heads)) != len(heads) or len(kv_head_J) != len(head_J):
        raise ValueError(f"plan_attention: jobs {[list(job) for job in head_J]} and KV heads {list(kv_head_J)} do not fit")
    job_of = {head: job for job, members in enumerate(head_J) for head in members}
    local_JG = group_heads([job_of[head] for head in heads], len(head_J))
    heads_JG = torch.where(local_JG >= 0, torch.tensor(heads)[local_JG.clamp(min=0)], -1)
    J, G = heads_JG.shape
    if union_blocks and G > 16:
        raise ValueError(f"plan_attention: a union of the blocks of {G} heads, wanted at most 16")
    if reads not in DIVISIONS:
        raise ValueError(f"plan_attention: reads {reads!r} is not one of {', '.join(DIVISIONS)}")
    division = DIVISIONS[reads]
    # Wide heads: fewer keys a step, or registers spill.
    step_blocks = (step_blocks or division.step_blocks) if head_dim <= 128 else 1
    stages = stages or division.stages
    pipeline_bytes = pipeline_bytes or pipeline_bytes_of(device)
    if programs_per_processor is None:
        # Little shared memory: one program that loads ahead, rather than two that cannot.
        ahead_bytes = (stages - 1) * step_blocks * block_size * 4 * head_dim
        programs_per_processor = max(1, min(division.programs_per_processor, pipeline_bytes // ahead_bytes))
    num_processors = num_processors_of(device)
    programs = max(1, -(-num_processors * programs_per_processor // batch))
    slots = programs + J
    return AttendPlan(
        head_J=tuple(tuple(job) for job in head_J),
        kv_J=tuple(kv_head_J),
        block_size=block_size,
        programs=programs,
        # The interpreter runs one program after the other: there the last one must not wait for a later one.
        max_mergers=max_waiting(batch * J, num_processors) if device.type == "cuda" else 1,
        merge_tile=merge_tile,
        stages=stages,
        pipeline_bytes=pipeline_bytes // programs_per_processor,
        num_warps=num_warps,
        step_blocks=step_blocks,
        early_launch=early_launch,
        heads_JG=heads_JG.to(device=device, dtype=torch.int32),
        kv_head_J=torch.tensor(list(kv_head_J), dtype=torch.int32, device=device),
        acc_BLGD=torch.empty(batch, slots, G, head_dim, dtype=torch.float32, device=device),
        best_BLG=torch.empty(batch, slots, G, dtype=torch.float32, device=device),
        sum_BLG=torch.empty(batch, slots, G, dtype=torch.float32, device=device),
        counters=torch.zeros(batch, J, 2, dtype=torch.int32, device=device),
        row_JG=local_JG.clamp(min=0).to(device=device, dtype=torch.int32),
        list_BJN=torch.empty(batch, J, union_blocks, dtype=torch.int32, device=device) if union_blocks else None,
        heads_BJN=torch.empty(batch, J, union_blocks, dtype=torch.int32, device=device) if union_blocks else None,
    )
