"""Work division and scratch memory of one layer's decode: made once for a layer shape, used by every step."""

# B batch  H query heads  D head dim
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rtpurbo.kernels.block_selection import SelectionPlan, plan_selection
from rtpurbo.kernels.decode_layer.cuda import CudaPlan, fits, is_faster, plan_cuda, static_obstacle
from rtpurbo.kernels.decode_layer.fused import FusedPlan, plan_fused
from rtpurbo.kernels.decode_layer.step import DecodeStep
from rtpurbo.kernels.division import num_processors_of
from rtpurbo.kernels.sparse_attention import AttendPlan, plan_attention

# Tokens of all sequences from which heads that share a KV group read shared blocks once (benchmarks/decode.md).
READ_ONCE_TOKENS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class DecodeLayerPlan:
    """Static facts and scratch memory of `decode_layer`; calls that share one must not overlap in time.

    Parts that the layer does not have are None: selection and selected (its retrieval heads, one job each), everything (all
    heads of a KV group that read the whole cache), window (local heads of retained groups), ring (local groups); grouped (instead
    of selected: the retrieval heads of a KV group as one job); fused, cuda (everything in one launch).
    """

    group_size: int
    num_groups: int
    retrieval_counts: tuple[int, ...]
    key_sets: tuple[int, ...]
    batch: int
    capacity: int
    head_dim: int
    window: int
    sinks: int
    block_size: int
    dense: bool
    selection: SelectionPlan | None
    selected: AttendPlan | None
    grouped: AttendPlan | None
    everything: AttendPlan | None
    local_window: AttendPlan | None
    ring: AttendPlan | None
    fused: FusedPlan | None
    cuda: CudaPlan | None
    lse_BH: torch.Tensor
    side_stream: torch.cuda.Stream | None

    @property
    def num_heads(self) -> int:
        """Query heads of the layer."""
        return self.group_size * self.num_groups

    @property
    def num_retained(self) -> int:
        """KV groups with a cache by position: groups 0 ... num_retained - 1."""
        return len(self.retrieval_counts)

    @property
    def retrieval_heads(self) -> tuple[int, ...]:
        """Query heads that retrieve, ascending; with a dense plan all of them."""
        return tuple(g * self.group_size + j for g, count in enumerate(self.retrieval_counts) for j in range(count))

    def selects(self, top_p: float) -> bool:
        """Whether the retrieval heads attend to a selection, not to everything."""
        return bool(self.retrieval_counts) and not self.dense and top_p < 1

    def check(self, step: DecodeStep) -> None:
        """ValueError for a step whose tensors do not fit."""
        B, D = step.q_BHD.shape[0], self.head_dim
        if step.q_BHD.shape[1:] != (self.num_heads, D) or self.batch < B or step.q_BHD.stride(2) != 1:
            raise ValueError(
                f"decode_layer: q {tuple(step.q_BHD.shape)}, the plan wants {(self.batch, self.num_heads, D)} or fewer sequences "
                "(last axis contiguous)"
            )
        if step.lengths_B.shape != (B,) or step.lengths_B.dtype != torch.int32 or not step.top_p > 0:
            raise ValueError(
                f"decode_layer: lengths {tuple(step.lengths_B.shape)} {step.lengths_B.dtype}, wanted int32 {(B,)}; top_p {step.top_p} must "
                "be > 0"
            )
        if step.out_BHD.shape != step.q_BHD.shape or step.out_BHD.stride(2) != 1:
            raise ValueError(
                f"decode_layer: out {tuple(step.out_BHD.shape)} does not fit q {tuple(step.q_BHD.shape)} (last axis contiguous)"
            )
        groups, slots = self.num_groups - self.num_retained, self.window + self.sinks
        _check_keys("k", step.k_BSKD, B, self.num_retained, D)
        _check_keys("v", step.v_BSKD, B, self.num_retained, D)
        _check_keys("ring_k", step.ring_k_BWKD, B, groups, D, slots)
        _check_keys("ring_v", step.ring_v_BWKD, B, groups, D, slots)
        if self.selects(step.top_p):
            heads, sets = len(self.key_sets), max(self.key_sets) + 1
            if step.index_q_BHR is None or step.index_q_BHR.shape[:2] != (B, heads):
                raise ValueError(f"decode_layer: index_q {_shape(step.index_q_BHR)}, wanted {heads} retrieval heads of {B} sequences")
            if step.index_k_BSIR is None or (step.index_k_BSIR.shape[0], step.index_k_BSIR.shape[2]) != (B, sets):
                raise ValueError(f"decode_layer: index_k {_shape(step.index_k_BSIR)}, wanted {sets} key sets of {B} sequences")


def _check_keys(name: str, tensor: torch.Tensor | None, B: int, groups: int, D: int, slots: int | None = None) -> None:
    if groups and (tensor is None or (tensor.shape[0], *tensor.shape[2:]) != (B, groups, D)):
        raise ValueError(f"decode_layer: {name} {_shape(tensor)}, wanted {groups} KV heads of {D}")
    if groups and tensor is not None and slots is not None and tensor.shape[1] != slots:
        raise ValueError(f"decode_layer: {name} has {tensor.shape[1]} slots, wanted {slots}")


def _shape(tensor: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def reads_once(retrieval_counts: Sequence[int], group_size: int, tokens: int) -> bool:
    """Whether heads of a KV group share so much at that many cached tokens of all sequences that a block is better read once.

    The choice of least regret: at 1M tokens with a whole group of eight heads whose blocks are drawn for each alone it takes 71 us
    against 56 in one launch where 3 % are selected, 117 against 119 where 10 % are, and 157 against 251 where 25 % are.
    """
    return bool(retrieval_counts) and all(count == group_size for count in retrieval_counts) and tokens >= READ_ONCE_TOKENS


def plan_decode_layer(
    *,
    group_size: int,
    num_groups: int,
    retrieval_counts: Sequence[int],
    key_sets: Sequence[int],
    batch: int,
    capacity: int,
    head_dim: int,
    window: int,
    sinks: int,
    block_size: int,
    device: torch.device | str,
    dense: bool = False,
    read_once: bool | None = None,
    cuda: bool | None = None,
) -> DecodeLayerPlan:
    """Divide the work of `decode_layer` and allocate its scratch memory.

    Args:
        group_size, num_groups: query heads of a KV group; KV groups.
        retrieval_counts: retrieval heads (>= 1) of each retained group, which come first; () for a layer of local heads.
        key_sets: for each retrieval head the set of index keys it reads; every set has a reader.
        batch, capacity: largest batch and tokens of a sequence.
        head_dim, window, sinks, block_size: D; visible keys of local heads; tokens a block.
        dense: all groups are retained and every head reads everything (counts and key sets are not used).
        read_once: let the separate launches read a block that several heads of a KV group selected once (`attend_grouped`);
            None: on a GPU where it was measured to be worth it, see `reads_once`.
        cuda: plan for the one launch in CUDA C++ too, where the GPU and the shape allow it; None: where it was measured to be faster.

    Raises ValueError for counts that do not fit the groups.
    """
    device = torch.device(device)
    counts = (group_size,) * num_groups if dense else tuple(retrieval_counts)
    sets = () if dense else tuple(key_sets)
    if len(counts) > num_groups or any(not 1 <= count <= group_size for count in counts) or (not dense and len(sets) != sum(counts)):
        raise ValueError(
            f"plan_decode_layer: retrieval_counts {list(counts)} and {len(sets)} key sets do not fit {num_groups} groups of {group_size}"
        )

    if read_once is None:
        read_once = device.type == "cuda" and reads_once(counts, group_size, batch * capacity)

    def attention(
        reads: str, first_H: Sequence[int], stop_H: Sequence[int], kv_J: Sequence[int], *, union_blocks: int = 0
    ) -> AttendPlan | None:
        jobs = [range(first, stop) for first, stop in zip(first_H, stop_H, strict=True)]
        kept = [job for job, heads in enumerate(jobs) if heads]
        if not kept:
            return None
        return plan_attention(
            [tuple(jobs[job]) for job in kept], [kv_J[job] for job in kept], batch=batch, head_dim=head_dim, device=device,
            block_size=block_size, reads=reads, union_blocks=union_blocks,
        )  # fmt: skip

    layer = {
        "group_size": group_size, "num_groups": num_groups, "retrieval_counts": counts, "key_sets": sets, "batch": batch,
        "capacity": capacity, "head_dim": head_dim, "block_size": block_size,
    }  # fmt: skip
    if cuda is None:
        cuda = device.type == "cuda" and not read_once and is_faster(torch.cuda.get_device_capability(device), batch, capacity)
    suits_cuda = cuda and fits(device, head_dim) and static_obstacle(**layer, programs=num_processors_of(device)) is None
    retained, local = range(len(counts)), range(len(counts), num_groups)
    start_K = [g * group_size for g in range(num_groups + 1)]
    split_K = [start_K[g] + counts[g] for g in retained]
    heads = [head for g in retained for head in range(start_K[g], split_K[g])]
    return DecodeLayerPlan(
        group_size=group_size, num_groups=num_groups, retrieval_counts=counts, key_sets=sets, batch=batch, capacity=capacity,
        head_dim=head_dim, window=window, sinks=sinks, block_size=block_size, dense=dense,
        selection=plan_selection(
            sets, num_sets=max(sets) + 1, batch=batch, capacity=capacity, device=device, block_size=block_size, masks=read_once,
            cuda=False,
        ) if sets else None,
        grouped=attention("union", start_K[: len(counts)], split_K, retained, union_blocks=max(1, -(-capacity // block_size)))
        if sets and read_once else None,
        selected=attention("list", heads, [head + 1 for head in heads], [head // group_size for head in heads]) if sets else None,
        everything=attention("all", start_K[: len(counts)], split_K, retained),
        local_window=attention("ring", split_K, start_K[1 : len(counts) + 1], retained),
        ring=attention("ring", start_K[len(counts) : -1], start_K[len(counts) + 1 :], [g - len(counts) for g in local]),
        fused=plan_fused(**layer, device=device) if sets and list(sets) == sorted(sets) else None,
        cuda=plan_cuda(**layer, device=device) if suits_cuda else None,
        lse_BH=torch.zeros(batch, group_size * num_groups, dtype=torch.float32, device=device),
        side_stream=torch.cuda.Stream(device) if device.type == "cuda" and sets else None,
    )  # fmt: skip
