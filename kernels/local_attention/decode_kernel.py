"""Decode attention of local heads: over the filled slots of a ring (attend_slots), or the window of a full cache (attend_window)."""

# B batch  W slots  S cached tokens  H query heads  K kv heads  D head dim
import torch

from rtpurbo.kernels.local_attention.reference import masked_attention
from rtpurbo.kernels.sparse_attention import AttendPlan, check_decode_inputs


def attend_slots(
    q_BHD: torch.Tensor,
    k_BWKD: torch.Tensor,
    v_BWKD: torch.Tensor,
    *,
    plan: AttendPlan,
    lengths_B: torch.Tensor,
    scale: float,
    out_BHD: torch.Tensor | None = None,
    lse_BH: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax over slots 0 ... min(length, W) - 1 of scale * q . k, times v.

    With the ring of `attend_local` (W = sinks + window) and the token's own key written first, the filled slots are
    exactly the visible keys: the write replaced the one position that left the window. With a cache by position
    (W = capacity) it is dense attention. The heads of a job read each key once.

    Args:
        q_BHD: post-RoPE queries of the token; heads that no job names are not read.
        k_BWKD, v_BWKD: slots, last axis contiguous; empty slots may hold anything.
        plan: from `plan_attention`, one job a KV head: its local heads (any number, rows of q and out).
        lengths_B: int32, tokens so far, the query's own included.
        scale: logit scale, usually head_dim ** -0.5.
        out_BHD, lse_BH: written for the plan's heads only (default: new tensors, other heads 0).
        impl: "auto" (Triton on a GPU, else the reference), "triton" or "reference".

    Returns (out [B, H, D] in q's dtype, lse fp32 [B, H], natural log); length 0 gives 0 and -inf.
    Raises ValueError for shapes that do not fit. Source: arXiv 2605.16928 section 3 (window and sinks); the ring: ours.
    """
    written_BHD, written_BH = check_decode_inputs("attend_slots", q_BHD, k_BWKD, v_BWKD, plan, lengths_B, out_BHD, lse_BH, impl)
    if impl == "triton" or (impl == "auto" and q_BHD.is_cuda):
        from rtpurbo.kernels.sparse_attention import kernel

        kernel.describe(plan, q_BHD, k_BWKD, v_BWKD, lengths_B, None, None, scale, written_BHD, written_BH).run()
        return written_BHD, written_BH
    filled_BW = torch.arange(k_BWKD.shape[1], device=q_BHD.device) < lengths_B[:, None]
    attend_visible(q_BHD, k_BWKD, v_BWKD, plan, filled_BW, scale, written_BHD, written_BH)
    return written_BHD, written_BH


def attend_window(
    q_BHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    *,
    plan: AttendPlan,
    lengths_B: torch.Tensor,
    window: int,
    sinks: int,
    scale: float,
    out_BHD: torch.Tensor | None = None,
    lse_BH: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax over positions j < length with length - j <= window or j < sinks of scale * q . k, times v.

    For local heads whose KV group keeps its full cache: they read its window in place. Other arguments and results as in
    `attend_slots`; k_BSKD, v_BSKD: cache by position, of at least the length; rows outside window and sinks are not read.

    Raises ValueError for shapes that do not fit. Source: arXiv 2605.16928 section 3 (window and sinks).
    """
    if window < 1 or sinks < 0:
        raise ValueError(f"attend_window: window {window} must be >= 1 and sinks {sinks} >= 0")
    written_BHD, written_BH = check_decode_inputs("attend_window", q_BHD, k_BSKD, v_BSKD, plan, lengths_B, out_BHD, lse_BH, impl)
    if impl == "triton" or (impl == "auto" and q_BHD.is_cuda):
        from rtpurbo.kernels.sparse_attention import kernel

        kernel.describe(plan, q_BHD, k_BSKD, v_BSKD, lengths_B, None, None, scale, written_BHD, written_BH, window, sinks).run()
        return written_BHD, written_BH
    position_S = torch.arange(k_BSKD.shape[1], device=q_BHD.device)
    length_B1 = lengths_B[:, None]
    visible_BS = (position_S < length_B1) & ((position_S >= length_B1 - window) | (position_S < sinks))
    attend_visible(q_BHD, k_BSKD, v_BSKD, plan, visible_BS, scale, written_BHD, written_BH)
    return written_BHD, written_BH


def attend_visible(
    q_BHD: torch.Tensor,
    k_BWKD: torch.Tensor,
    v_BWKD: torch.Tensor,
    plan: AttendPlan,
    visible_BW: torch.Tensor,
    scale: float,
    out_BHD: torch.Tensor,
    lse_BH: torch.Tensor,
) -> None:
    """Eager attention of the plan's heads over the visible rows of the cache, written into out and lse."""
    hidden = ~visible_BW[:, :, None, None]
    head_H = torch.tensor([head for job in plan.head_J for head in job], device=q_BHD.device)
    kv_H = torch.tensor([kv for job, kv in zip(plan.head_J, plan.kv_J, strict=True) for _ in job], device=q_BHD.device)
    out_BTHD, lse_BHT = masked_attention(
        q_BHD[:, None].index_select(2, head_H),
        k_BWKD.masked_fill(hidden, 0).index_select(2, kv_H),
        v_BWKD.masked_fill(hidden, 0).index_select(2, kv_H),
        visible_BW[:, None, None],
        scale,
        1,
    )
    out_BHD[:, head_H] = out_BTHD[:, 0]
    lse_BH[:, head_H] = lse_BHT[..., 0]
