"""decode_layer: the whole attention of one layer for one new token per sequence, retrieval and local heads together."""

# B batch  S cached tokens  W ring slots (sinks + window)  H query heads  K kv heads  D head dim
# I index-key sets  R index dim  N blocks
import importlib.util

import torch

from rtpurbo.kernels.decode_layer import cuda, fused, reference
from rtpurbo.kernels.decode_layer.plan import DecodeLayerPlan, plan_decode_layer
from rtpurbo.kernels.decode_layer.step import DecodeStep

__all__ = ["DecodeLayerPlan", "DecodeStep", "choose_impl", "decode_layer", "plan_decode_layer"]

IMPLEMENTATIONS = ("reference", "composed", "fused", "cuda")


def decode_layer(
    q_BHD: torch.Tensor,
    index_q_BHR: torch.Tensor | None,
    *,
    plan: DecodeLayerPlan,
    lengths_B: torch.Tensor,
    k_BSKD: torch.Tensor | None,
    v_BSKD: torch.Tensor | None,
    index_k_BSIR: torch.Tensor | None,
    ring_k_BWKD: torch.Tensor | None,
    ring_v_BWKD: torch.Tensor | None,
    scale: float,
    index_scale: float,
    top_p: float,
    out_BHD: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Attention of every head of a layer, after the token's own keys were appended to the caches.

    Retrieval heads: `score_and_select`, then softmax over the selected blocks (top_p >= 1 or a dense plan: over all keys).
    Local heads: softmax over the newest `window` positions and the sinks, read from the ring of a local KV group or from the
    full cache of a retained one. Heads are in run-time order: retained KV groups first, retrieval heads first inside each.

    Args:
        q_BHD: post-RoPE queries, H = group_size * num_groups; B <= the plan's batch.
        index_q_BHR: index queries of the retrieval heads (see `score_and_select`); None where nothing is selected.
        plan: from `plan_decode_layer`.
        lengths_B: int32, tokens of every sequence, the new one included; read on the device. 0 marks an inactive row, whose
            output is unspecified.
        k_BSKD, v_BSKD: caches of the retained groups by position, last axis contiguous; None if there is none.
        index_k_BSIR: index keys; fastest when stored set by set ([B, I, S, R] in memory). None where nothing is selected.
        ring_k_BWKD, ring_v_BWKD: rings of the local groups, W = sinks + window; None if there is none.
        scale, index_scale: logit scales of attention and indexer.
        top_p: > 0.
        out_BHD: written (default: a new tensor).
        impl: "auto" or one of IMPLEMENTATIONS; `choose_impl` says what "auto" picks.

    Cache rows at or beyond a length, and empty slots, may hold anything.
    Returns (out [B, H, D] in q's dtype, (ids int32 [B, H, N], count int32 [B, H]) of the selection or None).
    Raises ValueError for tensors that do not fit the plan. Source: arXiv 2605.16928 section 3; heads in one layer: ours.
    """
    step = DecodeStep(
        q_BHD=q_BHD, index_q_BHR=index_q_BHR, lengths_B=lengths_B, k_BSKD=k_BSKD, v_BSKD=v_BSKD, index_k_BSIR=index_k_BSIR,
        ring_k_BWKD=ring_k_BWKD, ring_v_BWKD=ring_v_BWKD, scale=scale, index_scale=index_scale, top_p=top_p,
        out_BHD=torch.empty_like(q_BHD) if out_BHD is None else out_BHD,
    )  # fmt: skip
    plan.check(step)
    chosen = choose_impl(
        plan, q_BHD, k_BSKD, v_BSKD, ring_k_BWKD, ring_v_BWKD, out_BHD=step.out_BHD, index_q_BHR=index_q_BHR,
        index_k_BSIR=index_k_BSIR, top_p=top_p, impl=impl,
    )  # fmt: skip
    if chosen == "cuda":
        assert plan.cuda is not None
        return step.out_BHD, cuda.launch(plan.cuda, step, plan.window, plan.sinks)
    if chosen == "fused":
        assert plan.fused is not None
        return step.out_BHD, fused.launch(plan.fused, step, plan.window, plan.sinks)
    if chosen == "reference":
        return step.out_BHD, reference.decode_layer(plan, step)
    from rtpurbo.kernels.decode_layer import composed

    return step.out_BHD, composed.decode_layer(plan, step)


def choose_impl(
    plan: DecodeLayerPlan,
    q_BHD: torch.Tensor,
    k_BSKD: torch.Tensor | None = None,
    v_BSKD: torch.Tensor | None = None,
    ring_k_BWKD: torch.Tensor | None = None,
    ring_v_BWKD: torch.Tensor | None = None,
    *,
    out_BHD: torch.Tensor | None = None,
    index_q_BHR: torch.Tensor | None = None,
    index_k_BSIR: torch.Tensor | None = None,
    top_p: float,
    impl: str = "auto",
) -> str:
    """The implementation that `decode_layer` runs: a named one, or ValueError with what is in its way.

    "auto" picks "reference" on the CPU; on a GPU, where the retrieval heads select and the plan does not ask for blocks read once, one
    launch: "cuda" (in CUDA C++) or "fused" (in Triton), where the tensors allow it and `is_faster` of either says so; else "composed".
    """
    if impl == "reference" or (impl == "auto" and not q_BHD.is_cuda):
        return "reference"
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"decode_layer: impl {impl!r} is not one of {', '.join(('auto', *IMPLEMENTATIONS))}")
    if importlib.util.find_spec("triton") is None:
        raise ValueError(f"decode_layer: impl {impl!r} needs triton, which is not installed")
    from triton import knobs

    if not q_BHD.is_cuda and not knobs.runtime.interpret:
        raise ValueError(f"decode_layer: impl {impl!r} needs tensors on an NVIDIA GPU, found {q_BHD.device}")
    if impl == "composed":
        return impl
    capability = torch.cuda.get_device_capability(q_BHD.device) if q_BHD.is_cuda else (0, 0)
    caches = (k_BSKD, v_BSKD, ring_k_BWKD, ring_v_BWKD)

    def obstacle(form: str) -> str | None:
        if not plan.selects(top_p):
            return "nothing is selected"
        if form == "fused":
            return fused.obstacle(plan.fused, *caches)
        return cuda.obstacle(plan.cuda, capability, q_BHD, out_BHD, index_q_BHR, index_k_BSIR, caches)

    if impl in ("fused", "cuda"):
        found = obstacle(impl)
        if found is not None:
            raise ValueError(f"decode_layer: impl {impl!r} cannot run: {found}")
        return impl
    faster = {
        "cuda": plan.cuda is not None and cuda.is_faster(capability, plan.batch, plan.capacity),
        "fused": fused.is_faster(capability, q_BHD.dtype, plan.batch, plan.capacity, plan.head_dim),
    }
    one_launch = [form for form in faster if plan.grouped is None and faster[form] and obstacle(form) is None]
    return one_launch[0] if one_launch else "composed"
