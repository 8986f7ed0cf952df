"""attend_slots: decode attention of one token over the filled slots of a cache (the ring of local heads, or a dense cache)."""

# B batch  W slots  H query heads  K kv heads  D head dim
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

        kernel.launch(plan, q_BHD, k_BWKD, v_BWKD, lengths_B, None, None, scale, written_BHD, written_BH)
        return written_BHD, written_BH
    filled_BW = torch.arange(k_BWKD.shape[1], device=q_BHD.device) < lengths_B[:, None]
    empty = ~filled_BW[:, :, None, None]
    head_H = torch.tensor([head for job in plan.head_J for head in job], device=q_BHD.device)
    kv_H = torch.tensor([kv for job, kv in zip(plan.head_J, plan.kv_J, strict=True) for _ in job], device=q_BHD.device)
    out_BTHD, lse_BHT = masked_attention(
        q_BHD[:, None].index_select(2, head_H),
        k_BWKD.masked_fill(empty, 0).index_select(2, kv_H),
        v_BWKD.masked_fill(empty, 0).index_select(2, kv_H),
        filled_BW[:, None, None],
        scale,
        1,
    )
    written_BHD[:, head_H] = out_BTHD[:, 0]
    written_BH[:, head_H] = lse_BHT[..., 0]
    return written_BHD, written_BH
