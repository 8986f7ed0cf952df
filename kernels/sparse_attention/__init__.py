"""attend_blocks: full-dimension attention of retrieval heads over the blocks that the indexer selected.

attend_selected: the decode form, one query token over lists of block ids; attend_grouped: the heads of a KV group together, which read
a block that several of them selected once.
"""

# B batch  T query tokens  S cached tokens  H retrieval query heads  K kv heads  D head dim  N blocks
# J jobs (here: retrieval heads)
import torch

from rtpurbo.kernels.block_selection.reference import words_to_mask
from rtpurbo.kernels.sparse_attention import reference
from rtpurbo.kernels.sparse_attention.plan import AttendPlan, plan_attention
from rtpurbo.kernels.sparse_attention.prefill import attend_prefill, choose_prefill_impl

__all__ = [
    "AttendPlan",
    "attend_blocks",
    "attend_grouped",
    "attend_prefill",
    "attend_selected",
    "choose_prefill_impl",
    "plan_attention",
]


def attend_blocks(
    q_BTHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    *,
    kv_head_H: torch.Tensor,
    visible_BT: torch.Tensor,
    selected_BHTN: torch.Tensor,
    scale: float,
    block_size: int = 64,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax over { j < visible, block(j) selected } of scale * q . k, times v; each head on its own set.

    Args:
        q_BTHD: post-RoPE queries of the retrieval heads.
        k_BSKD, v_BSKD: cache by position, post-RoPE; rows at or beyond `visible` may hold anything.
        kv_head_H: int64, the KV head each query head reads (0 <= kv_head < K).
        visible_BT: int, keys that query t sees: positions 0 ... visible - 1.
        selected_BHTN: bool, N = ceil(S / block_size).
        scale: logit scale, usually head_dim ** -0.5.
        impl: "auto" or "reference".

    Returns out [B, T, H, D] in q's dtype and lse fp32 [B, H, T]; a query without visible key gives 0 and -inf.
    Raises ValueError for shapes that do not fit. Source: arXiv 2605.16928 section 3.4.
    """
    B, T, H, D = q_BTHD.shape
    S = k_BSKD.shape[1]
    if k_BSKD.shape != v_BSKD.shape or k_BSKD.shape[0] != B or k_BSKD.shape[3] != D or kv_head_H.shape != (H,):
        raise ValueError(f"attend_blocks: q {tuple(q_BTHD.shape)}, k {tuple(k_BSKD.shape)}, v {tuple(v_BSKD.shape)} do not fit")
    if selected_BHTN.shape != (B, H, T, -(-S // block_size)) or visible_BT.shape != (B, T):
        raise ValueError(
            f"attend_blocks: selected {tuple(selected_BHTN.shape)} or visible {tuple(visible_BT.shape)} does not fit "
            f"q {tuple(q_BTHD.shape)} and {S} cached tokens in blocks of {block_size}"
        )
    if impl not in ("auto", "reference"):
        raise ValueError(f"attend_blocks: impl {impl!r} is not one of auto, reference")
    return reference.attend_blocks(q_BTHD, k_BSKD, v_BSKD, kv_head_H, visible_BT, selected_BHTN, scale, block_size)


def attend_selected(
    q_BHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    *,
    plan: AttendPlan,
    lengths_B: torch.Tensor,
    ids_BJN: torch.Tensor,
    count_BJ: torch.Tensor,
    scale: float,
    out_BHD: torch.Tensor | None = None,
    lse_BH: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode: softmax over the tokens of the selected blocks of scale * q . k, times v; each head on its own list.

    The lists of all heads are cut into equal chunks over the GPU; a head's parts are merged in the order of its list,
    so equal inputs give equal bits.

    Args:
        q_BHD: post-RoPE queries of the token; may hold other heads too, which are not read.
        k_BSKD, v_BSKD: cache by position, post-RoPE, last axis contiguous; rows at or beyond a length may hold anything.
        plan: from `plan_attention` with one head a job: job j is the head (row of q and out) of list j.
        lengths_B: int32, cached tokens, the query's own included.
        ids_BJN, count_BJ: int32, from `score_and_select`: ids ascending, each block starts before the length.
        scale: logit scale, usually head_dim ** -0.5.
        out_BHD, lse_BH: written for the plan's heads only (default: new tensors, other heads 0).
        impl: "auto" (Triton on a GPU, else the reference), "triton" or "reference".

    Returns (out [B, H, D] in q's dtype, lse fp32 [B, H], natural log); a head with count 0 gives 0 and -inf.
    Raises ValueError for shapes that do not fit. Source: arXiv 2605.16928 section 3.4; equal chunks: ours.
    """
    J = len(plan.head_J)
    if any(len(job) != 1 for job in plan.head_J):
        raise ValueError("attend_selected: the plan must have one head a job")
    if ids_BJN.shape[:2] != (q_BHD.shape[0], J) or count_BJ.shape != ids_BJN.shape[:2]:
        raise ValueError(f"attend_selected: ids {tuple(ids_BJN.shape)} or count {tuple(count_BJ.shape)}, the plan has {J} lists")
    out_BHD, lse_BH = check_decode_inputs("attend_selected", q_BHD, k_BSKD, v_BSKD, plan, lengths_B, out_BHD, lse_BH, impl)
    if impl == "triton" or (impl == "auto" and q_BHD.is_cuda):
        from rtpurbo.kernels.sparse_attention import kernel

        if not (ids_BJN.is_contiguous() and count_BJ.is_contiguous()) or ids_BJN.dtype != torch.int32:
            raise ValueError("attend_selected: ids and count must be contiguous int32")
        kernel.describe(plan, q_BHD, k_BSKD, v_BSKD, lengths_B, ids_BJN, count_BJ, scale, out_BHD, lse_BH).run()
        return out_BHD, lse_BH
    N = -(-k_BSKD.shape[1] // plan.block_size)
    listed_BJN = torch.arange(ids_BJN.shape[2], device=q_BHD.device) < count_BJ[..., None]
    # Unused places may hold anything: they go to a column of their own.
    place_BJN = torch.where(listed_BJN, ids_BJN, N).long()
    selected_BJN = torch.zeros(*ids_BJN.shape[:2], N + 1, dtype=torch.bool, device=q_BHD.device)
    selected_BJN = selected_BJN.scatter(2, place_BJN, True)[..., :N]
    _attend_eagerly(q_BHD, k_BSKD, v_BSKD, plan, lengths_B, selected_BJN, scale, out_BHD, lse_BH)
    return out_BHD, lse_BH


def attend_grouped(
    q_BHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    *,
    plan: AttendPlan,
    lengths_B: torch.Tensor,
    mask_BHW: torch.Tensor,
    scale: float,
    out_BHD: torch.Tensor | None = None,
    lse_BH: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_selected` for heads that share a KV head: each block that any head of a job selected is read once.

    Every head still attends to its own set: a block counts for the heads whose bit is set. Blocks read: the union of a job's
    sets, at most those of the cache, where `attend_selected` reads their sum.

    Args:
        q_BHD, k_BSKD, v_BSKD, lengths_B, scale, out_BHD, lse_BH, impl: as in `attend_selected`.
        plan: from `plan_attention` with the heads of a KV group as one job (at most 16), and union_blocks.
        mask_BHW: int32, one bit a block (`SelectionPlan.mask_BHW`), rows in the order of the plan's heads; bits at or beyond the
            block that holds the newest token are not read.

    Returns and raises as `attend_selected`. Source: arXiv 2605.16928 section 3.4; the union: ours.
    """
    H = sum(len(job) for job in plan.head_J)
    if plan.list_BJN is None or plan.list_BJN.shape[2] * plan.block_size < k_BSKD.shape[1]:
        raise ValueError(f"attend_grouped: the plan's union_blocks do not hold {k_BSKD.shape[1]} tokens in blocks of {plan.block_size}")
    if mask_BHW.shape[:2] != (q_BHD.shape[0], H) or mask_BHW.shape[2] * 32 * plan.block_size < k_BSKD.shape[1]:
        raise ValueError(f"attend_grouped: mask {tuple(mask_BHW.shape)}, the plan has {H} heads and the cache {k_BSKD.shape[1]} tokens")
    out_BHD, lse_BH = check_decode_inputs("attend_grouped", q_BHD, k_BSKD, v_BSKD, plan, lengths_B, out_BHD, lse_BH, impl)
    if impl == "triton" or (impl == "auto" and q_BHD.is_cuda):
        from rtpurbo.kernels.sparse_attention import kernel

        if not mask_BHW.is_contiguous() or mask_BHW.dtype != torch.int32:
            raise ValueError("attend_grouped: the mask must be contiguous int32")
        kernel.describe(plan, q_BHD, k_BSKD, v_BSKD, lengths_B, None, None, scale, out_BHD, lse_BH, mask_BHW=mask_BHW).run()
        return out_BHD, lse_BH
    selected_BHN = words_to_mask(mask_BHW, -(-k_BSKD.shape[1] // plan.block_size))
    _attend_eagerly(q_BHD, k_BSKD, v_BSKD, plan, lengths_B, selected_BHN, scale, out_BHD, lse_BH)
    return out_BHD, lse_BH


def _attend_eagerly(
    q_BHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    plan: AttendPlan,
    lengths_B: torch.Tensor,
    selected_BHN: torch.Tensor,
    scale: float,
    out_BHD: torch.Tensor,
    lse_BH: torch.Tensor,
) -> None:
    """`attend_blocks` for the plan's heads, in its order, written into out and lse."""
    head_H = torch.tensor([head for job in plan.head_J for head in job], device=q_BHD.device)
    kv_H = torch.tensor([kv for job, kv in zip(plan.head_J, plan.kv_J, strict=True) for _ in job], device=q_BHD.device)
    out_BTHD, lse_BHT = attend_blocks(
        q_BHD[:, None].index_select(2, head_H), k_BSKD, v_BSKD, kv_head_H=kv_H, visible_BT=lengths_B[:, None],
        selected_BHTN=selected_BHN[:, :, None], scale=scale, block_size=plan.block_size,
    )  # fmt: skip
    out_BHD[:, head_H] = out_BTHD[:, 0]
    lse_BH[:, head_H] = lse_BHT[..., 0]


def check_decode_inputs(
    name: str,
    q_BHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    plan: AttendPlan,
    lengths_B: torch.Tensor,
    out_BHD: torch.Tensor | None,
    lse_BH: torch.Tensor | None,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes, strides and dtypes that both decode attentions share; returns out and lse, allocated where not given."""
    B, H, D = q_BHD.shape
    if k_BSKD.shape != v_BSKD.shape or k_BSKD.shape[0] != B or k_BSKD.shape[3] != D or plan.acc_BLGD.shape[3] != D:
        raise ValueError(f"{name}: q {tuple(q_BHD.shape)}, k {tuple(k_BSKD.shape)}, v {tuple(v_BSKD.shape)} do not fit")
    if k_BSKD.stride(3) != 1 or v_BSKD.stride(3) != 1 or q_BHD.stride(2) != 1:
        raise ValueError(f"{name}: the last axis of q, k and v must be contiguous")
    if plan.counters.shape[0] < B or max(max(job) for job in plan.head_J) >= H or max(plan.kv_J) >= k_BSKD.shape[2]:
        raise ValueError(f"{name}: q {tuple(q_BHD.shape)} or {k_BSKD.shape[2]} KV heads do not fit the plan's jobs {plan.head_J}")
    if lengths_B.shape != (B,) or lengths_B.dtype != torch.int32:
        raise ValueError(f"{name}: lengths {tuple(lengths_B.shape)} {lengths_B.dtype}, wanted int32 {(B,)}")
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"{name}: impl {impl!r} is not one of auto, triton, reference")
    if out_BHD is None:
        out_BHD = torch.zeros_like(q_BHD)
    if lse_BH is None:
        lse_BH = torch.zeros(B, H, dtype=torch.float32, device=q_BHD.device)
    if out_BHD.shape != q_BHD.shape or out_BHD.stride(2) != 1 or lse_BH.shape != (B, H) or not lse_BH.is_contiguous():
        raise ValueError(f"{name}: out {tuple(out_BHD.shape)} or lse {tuple(lse_BH.shape)} does not fit q {tuple(q_BHD.shape)}")
    return out_BHD, lse_BH
