"""decode_layer as one launch in CUDA C++ (kernels/cuda/decode_layer.cu): its scratch memory, what it can run, and the launcher."""

# B batch  S cached tokens  W ring slots (sinks + window)  H retrieval heads  K kv heads  G heads of a group  D head dim
# I index-key sets  V groups of readers  R index dim  N blocks  C programs  P parts of a head's selection  L parts of results
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rtpurbo.kernels.block_selection.cuda import (
    BLOCK,
    COLUMNS,
    HISTOGRAM_BINS,
    WARPS,
    alignment_obstacle,
    index_constants,
    index_obstacle,
    index_strides,
    part_items_for,
    readers_of,
)
from rtpurbo.kernels.cuda import CudaKernel, Long, TileMaps
from rtpurbo.kernels.decode_layer.step import DecodeStep
from rtpurbo.kernels.division import num_processors_of
from rtpurbo.kernels.launch import Launch

LOG2E = 1.4426950408889634
# As in the source: keys of a step, slots of a warp that weighs them, heads of all sequences.
STEP, WARP_SLOTS, MOST_ROWS = 16, 2, 64
HEAD_DIMS = (64, 128)
# Tokens for which it was measured faster than the launch in Triton: of one sequence, or of each of a few, from; of all, to (a million and
# what is generated after it).
FASTER_FROM, FASTER_TO = 1 << 15, 5 << 18
FEW_SEQUENCES, FEW_FROM = 4, 1 << 13
# What a program has done when it stamps the time, by place.
STAMPS = {0: "started", 1: "scored", 7: "selected", 8: "local heads done", 9: "lists there", 10: "attended", 11: "ended"}


@dataclass(frozen=True, kw_only=True)
class CudaPlan:
    """Static facts and scratch memory of the launch; calls that share one must not overlap in time."""

    batch: int
    capacity_blocks: int
    group_size: int
    num_retained: int
    num_heads: int
    num_jobs: int
    programs: int
    part_items: int
    readers_V4: torch.Tensor
    row_head_H: torch.Tensor
    shares_PC8: torch.Tensor
    places_P: torch.Tensor
    job_of_head: torch.Tensor
    scores_BHN4: torch.Tensor
    listed_BHN: torch.Tensor
    counted_BH: torch.Tensor
    parts_L: torch.Tensor
    local_parts_L: torch.Tensor
    tops_L: torch.Tensor
    histograms_L: torch.Tensor
    launches_C: torch.Tensor
    stamps: torch.Tensor | None


def share_local_heads(
    jobs: Sequence[tuple[int, int]], counts: Sequence[int], selectors: int, programs: int
) -> tuple[list[tuple[int, ...]], int]:
    """Which program attends to which place of which job: a sequence and a KV group with local heads.

    Selectors, the first programs, do nothing beside it unless they are more than two thirds or the others too few. Returns for every
    program (sequence, group, first local head, place, places, job, 0, 0), a sequence beyond all for those without work, and the places of
    every job.
    """
    apart = selectors * 3 <= programs * 2 and programs - selectors >= len(jobs)
    workers = range(selectors if apart else 0, programs)
    places = len(workers) // len(jobs) if jobs else 0
    shares: list[tuple[int, ...]] = [(1 << 30, *[0] * 7)] * programs
    for place in range(places):
        for job, (b, group) in enumerate(jobs):
            shares[workers[place * len(jobs) + job]] = (b, group, counts[group], place, places, job, 0, 0)
    return shares, places


def static_obstacle(
    *, group_size: int, num_groups: int, retrieval_counts: Sequence[int], key_sets: Sequence[int], batch: int, capacity: int, head_dim: int,
    block_size: int, programs: int,
) -> str | None:  # fmt: skip
    """Why the launch cannot serve a layer of this shape on a GPU of that many multiprocessors, or None."""
    rows, blocks = batch * len(key_sets), max(1, -(-capacity // block_size))
    local = batch * (num_groups - sum(count == group_size for count in retrieval_counts))
    if list(key_sets) != sorted(key_sets) or not key_sets:
        return "nothing is selected, or key sets do not ascend"
    if head_dim not in HEAD_DIMS or block_size != BLOCK or group_size > COLUMNS:
        return f"heads of {head_dim} in groups of {group_size}, blocks of {block_size}; it takes {HEAD_DIMS}, up to {COLUMNS}, and {BLOCK}"
    items = part_items_for(rows, blocks, programs)
    if rows > min(MOST_ROWS, programs) or items is None:
        return f"{rows} heads of all sequences with {blocks} blocks each are too many for {programs} programs"
    if local > programs:
        return f"{local} KV groups of all sequences have local heads, more than {programs} programs"
    return None


def plan_cuda(
    *, group_size: int, num_groups: int, retrieval_counts: Sequence[int], key_sets: Sequence[int], batch: int, capacity: int, head_dim: int,
    block_size: int, device: torch.device, programs: int | None = None, stamps: bool = False,
) -> CudaPlan:  # fmt: skip
    """Divide the work and allocate scratch memory, 24 bytes a head and block and about 2 MB.

    programs: one a multiprocessor; None: as many as the device has.
    stamps: let every program note in `plan.stamps` [programs, 16] when (ns) it came to each of STAMPS; 0: it did not.
    Raises ValueError where `static_obstacle` names one.
    """
    H, N, programs = len(key_sets), max(1, -(-capacity // block_size)), programs or num_processors_of(device)
    obstacle = static_obstacle(
        group_size=group_size, num_groups=num_groups, retrieval_counts=retrieval_counts, key_sets=key_sets, batch=batch, capacity=capacity,
        head_dim=head_dim, block_size=block_size, programs=programs,
    )  # fmt: skip
    items = part_items_for(batch * H, N, programs)
    if obstacle is not None or items is None:
        raise ValueError(f"plan_decode_layer: {obstacle}")
    counts = [*retrieval_counts, *([0] * (num_groups - len(retrieval_counts)))]
    jobs = [(b, group) for b in range(batch) for group, count in enumerate(counts) if count < group_size]
    job_of = {pair: job for job, pair in enumerate(jobs)}
    most_parts = -(-N // (items * 32 * WARPS))
    shares, places = zip(*(share_local_heads(jobs, counts, batch * H * parts, programs) for parts in range(1, most_parts + 1)), strict=True)

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def table(values: Sequence) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    pairs, rows = head_dim // 2, batch * H
    # Records hold the number of their launch: what is here before the first must be zero.
    return CudaPlan(
        batch=batch, capacity_blocks=N, group_size=group_size, num_retained=len(retrieval_counts), num_heads=H, num_jobs=len(jobs),
        programs=programs, part_items=items,
        readers_V4=table(readers_of(key_sets)),
        row_head_H=table([g * group_size + j for g, count in enumerate(retrieval_counts) for j in range(count)]),
        shares_PC8=table(shares), places_P=table(places),
        job_of_head=table([
            job_of[b, g] if j >= count else -1 for b in range(batch) for g, count in enumerate(counts) for j in range(group_size)
        ]),
        scores_BHN4=zeros(batch, H, N, 4), listed_BHN=zeros(batch, H, N, dtype=torch.int64), counted_BH=zeros(batch, H, dtype=torch.int64),
        parts_L=zeros(programs + rows, pairs, 4), local_parts_L=zeros(programs, group_size, pairs, 4),
        tops_L=zeros(programs, 4), histograms_L=zeros(programs, HISTOGRAM_BINS, 4),
        launches_C=zeros(programs, dtype=torch.int32), stamps=zeros(programs, 16, dtype=torch.int64) if stamps else None,
    )  # fmt: skip


def shared_bytes(head_dim: int) -> int:
    """Shared memory of a program: steps' keys, values and weights, what a selection counts, and small tables; the source checks it."""
    slots = WARP_SLOTS * (WARPS - 1 - head_dim // 16)
    steps = slots * (STEP * 4 * head_dim + 32 * 8 + 48 + 3 * 8)
    selection = 4 * 4 * (HISTOGRAM_BINS + 7) + 1024
    tables = 20 * MOST_ROWS + 1024
    return -(-(steps + selection + tables) // 1024) * 1024


def fits(device: torch.device, head_dim: int) -> bool:
    """Whether a GPU copies tiles as Hopper does and has the shared memory that a program wants."""
    if device.type != "cuda" or head_dim not in HEAD_DIMS:
        return False
    facts = torch.cuda.get_device_properties(device)
    return facts.major >= 9 and facts.shared_memory_per_block_optin >= shared_bytes(head_dim)


def obstacle(
    plan: CudaPlan | None,
    capability: tuple[int, int],
    q_BHD: torch.Tensor,
    out_BHD: torch.Tensor | None,
    index_q_BHR: torch.Tensor | None,
    index_k_BSIR: torch.Tensor | None,
    caches: Sequence[torch.Tensor | None],
) -> str | None:
    """Why these tensors cannot run in the launch, or None. caches: k, v, ring_k, ring_v."""
    if plan is None or index_q_BHR is None or index_k_BSIR is None:
        return "the plan has none: it is made where it was measured faster, or with cuda=True; it needs a selection and a GPU like Hopper"
    if q_BHD.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes heads in 16 bits, found {q_BHD.dtype}"
    for name, x in (("out", out_BHD), *(("a cache", x) for x in caches)):
        if x is not None and x.dtype != q_BHD.dtype:
            return f"{name} holds {x.dtype}, and q {q_BHD.dtype}"
    found = alignment_obstacle([("q", q_BHD, 16), ("out", out_BHD, 4), *(("a cache", x, 16) for x in caches)])
    return found or index_obstacle(capability, index_q_BHR, index_k_BSIR)


def is_faster(capability: tuple[int, int], batch: int, capacity: int) -> bool:
    """Whether it was measured faster than the launch in Triton (benchmarks/decode.md: H200, bf16, heads of 128)."""
    enough = capacity >= (FASTER_FROM if batch == 1 else FEW_FROM)
    return capability == (9, 0) and batch <= FEW_SEQUENCES and enough and batch * capacity <= FASTER_TO


def describe(plan: CudaPlan, step: DecodeStep, window: int, sinks: int, ids_BHN: torch.Tensor, count_BH: torch.Tensor) -> Launch:
    """The launch that writes out, ids and count."""
    (k, v), (index_q, index_k) = step.cache, step.index
    ring_k, ring_v = step.cache if step.ring_k_BWKD is None else step.ring
    q, out = step.q_BHD, step.out_BHD
    D, size = q.shape[2], q.element_size()
    arguments = (
        TileMaps((k, v, ring_k, ring_v), (1, STEP, 1, 64)),
        q, out, step.lengths_B, plan.row_head_H, plan.listed_BHN, plan.counted_BH, plan.parts_L, plan.local_parts_L,
        index_q, index_k, plan.readers_V4, plan.shares_PC8, plan.job_of_head, plan.places_P, plan.scores_BHN4, plan.tops_L,
        plan.histograms_L, plan.launches_C, plan.launches_C if plan.stamps is None else plan.stamps, ids_BHN, count_BH,
        q.shape[0], plan.batch * plan.num_heads, plan.num_jobs, plan.num_heads, plan.readers_V4.shape[0], plan.group_size, q.shape[1],
        plan.num_retained, plan.capacity_blocks, window, sinks, plan.shares_PC8.shape[0],
        float(step.scale) * LOG2E, float(step.index_scale),
        Long(q.stride(0) * size), Long(q.stride(1) * size), Long(out.stride(0)), Long(out.stride(1)),
        *index_strides(index_q, index_k),
    )  # fmt: skip
    return Launch(
        kernel=CudaKernel("decode_layer", shared_bytes(D)),
        grid=(plan.programs,),
        arguments=arguments,
        constants={
            "HEAD_DIM": D, "SHARED_BYTES": shared_bytes(D), "HALF_FLOAT": int(q.dtype == torch.float16),
            "STAMPS": int(plan.stamps is not None),
            **index_constants(plan.part_items, index_q, index_k, step.top_p),
        },
        num_warps=WARPS,
        early_launch=True,
        all_at_once=True,
    )  # fmt: skip


def launch(plan: CudaPlan, step: DecodeStep, window: int, sinks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel with the plan's workspace; writes out, returns (ids, count)."""
    B, device = step.q_BHD.shape[0], step.q_BHD.device
    ids_BHN = torch.empty(B, plan.num_heads, plan.capacity_blocks, dtype=torch.int32, device=device)
    count_BH = torch.empty(B, plan.num_heads, dtype=torch.int32, device=device)
    describe(plan, step, window, sinks, ids_BHN, count_BH).run()
    return ids_BHN, count_BH
