"""rope_append: from a layer's fused projections to rotated queries and keys, with the cache written on the way, in one launch."""

# B batch  T chunk tokens  M (H + 2 K) D  H query heads  K kv heads  D head dim  E half the head dim  S cached tokens
# W ring slots (sinks + window)  P retrieval heads  I index-key sets  R index dim
import torch

from rtpurbo.kernels.append import reference
from rtpurbo.kernels.append.plan import AppendPlan, plan_append

__all__ = ["AppendPlan", "plan_append", "rope_append"]


def rope_append(
    qkv_BTM: torch.Tensor,
    *,
    plan: AppendPlan,
    cos_SE: torch.Tensor,
    sin_SE: torch.Tensor,
    lengths_B: torch.Tensor,
    counts_B: torch.Tensor,
    k_BSKD: torch.Tensor | None = None,
    v_BSKD: torch.Tensor | None = None,
    index_k_BSIR: torch.Tensor | None = None,
    ring_k_BWKD: torch.Tensor | None = None,
    ring_v_BWKD: torch.Tensor | None = None,
    window: int = 1,
    sinks: int = 0,
    index_queries: bool = False,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """q, k = RMS-normed where the plan has norms; index_q = W^Q q, index_k = W^K k; then (x1, x2) -> (x1 c - x2 s, x2 c + x1 s).

    Args:
        qkv_BTM: contiguous; q, k, v heads side by side. In a chunk q and k are changed in place. Row t < counts_B[b] of sequence b has
            position lengths_B[b] + t; the other rows are neither read nor written.
        plan: from `plan_append`.
        cos_SE, sin_SE: the model's rotary tables by position, first halves (both halves are equal), attention factor included.
        lengths_B, counts_B: int32, read on the device: tokens cached before, valid rows of the chunk.
        k_BSKD, v_BSKD: cache by position of the first KV groups, written at the rows' positions.
        index_k_BSIR: cache of the index keys, written too; fp32, bf16 or fp8 e4m3 (values beyond its range saturate).
        ring_k_BWKD, ring_v_BWKD: rings of the other groups (see kernels.local_attention.ring_positions). Give them only when the
            chunk's own attention does not need what the write replaces: for one token.
        window, sinks: of the rings.
        index_queries: return index_q.
        impl: "auto" (Triton on a GPU, else the reference), "triton" or "reference".

    Returns (q [B, T, H, D], k [B, T, K, D], v [B, T, K, D], index_q fp32 [B, T, P, R] or None). Of a chunk q, k and v are views of qkv,
    whose rows beyond counts_B stay as they are; of one token they may be a new tensor, in which such rows are finite, as in index_q.
    fp32 arithmetic, one rounding at each store.
    Raises ValueError for shapes that do not fit. The caller keeps lengths + counts within S. Source: docs/method.md, Attention, Indexer;
    one launch: ours.
    """
    H, K, D = plan.num_heads, plan.num_groups, plan.head_dim
    B, T, M = qkv_BTM.shape
    if M != (H + 2 * K) * D or not qkv_BTM.is_contiguous():
        raise ValueError(f"rope_append: qkv {tuple(qkv_BTM.shape)}, wanted contiguous [B, T, {(H + 2 * K) * D}]")
    if cos_SE.shape != sin_SE.shape or cos_SE.shape[1:] != (D // 2,) or not (cos_SE.is_contiguous() and sin_SE.is_contiguous()):
        raise ValueError(f"rope_append: cos {tuple(cos_SE.shape)} and sin {tuple(sin_SE.shape)}, wanted contiguous [S, {D // 2}]")
    for name, x in (("lengths", lengths_B), ("counts", counts_B)):
        if x.shape != (B,) or x.dtype != torch.int32:
            raise ValueError(f"rope_append: {name} {tuple(x.shape)} {x.dtype}, wanted int32 {(B,)}")
    _check_cache("cache", k_BSKD, v_BSKD, B, D)
    _check_cache("ring", ring_k_BWKD, ring_v_BWKD, B, D)
    retained = 0 if k_BSKD is None else k_BSKD.shape[2]
    local = 0 if ring_k_BWKD is None else ring_k_BWKD.shape[2]
    if retained + local > K or (ring_k_BWKD is not None and (retained + local < K or ring_k_BWKD.shape[1] != sinks + window)):
        raise ValueError(
            f"rope_append: a cache of {retained} and rings of {local} groups, wanted all {K} with rings of {sinks + window} slots, "
            f"or at most {K} without rings"
        )
    _check_index(plan, index_k_BSIR, index_queries, B)
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"rope_append: impl {impl!r} is not one of auto, triton, reference")
    stores = (k_BSKD, v_BSKD, index_k_BSIR, ring_k_BWKD, ring_v_BWKD)
    if impl == "triton" or (impl == "auto" and qkv_BTM.is_cuda):
        from rtpurbo.kernels.append import kernel

        index_q_BTPR = None
        if index_queries and plan.index_q_PRD is not None:
            index_q_BTPR = torch.empty(*qkv_BTM.shape[:2], *plan.index_q_PRD.shape[:2], dtype=torch.float32, device=qkv_BTM.device)
        if qkv_BTM.numel():
            early_launch = qkv_BTM.is_cuda and torch.cuda.get_device_capability(qkv_BTM.device) >= (9, 0)
            # Beside the heads, not after them, the sets of index keys are projected: with eight sets that is most of the time of one token.
            out_BTM = torch.empty_like(qkv_BTM) if T == 1 and index_k_BSIR is not None else qkv_BTM
            kernel.describe(
                qkv_BTM, plan, cos_SE, sin_SE, lengths_B, counts_B, *stores, window, sinks, index_q_BTPR, out_BTM, early_launch=early_launch
            ).run()
            qkv_BTM = out_BTM
    else:
        index_q_BTPR = reference.rope_append(qkv_BTM, plan, cos_SE, sin_SE, lengths_B, counts_B, *stores, window, sinks, index_queries)
    q_BTHD, k_BTKD, v_BTKD = qkv_BTM.unflatten(2, (-1, D)).split((H, K, K), dim=2)
    return q_BTHD, k_BTKD, v_BTKD, index_q_BTPR


def _check_cache(name: str, k: torch.Tensor | None, v: torch.Tensor | None, batch: int, head_dim: int) -> None:
    if k is None and v is None:
        return
    if k is None or v is None or k.shape != v.shape or k.stride() != v.stride():
        raise ValueError(f"rope_append: give k and v of the {name} together, with equal shapes and strides")
    if k.shape[0] != batch or k.shape[3] != head_dim or k.stride()[2:] != (head_dim, 1):
        raise ValueError(
            f"rope_append: {name} {tuple(k.shape)} with strides {k.stride()}, wanted [{batch}, tokens, groups, {head_dim}] with the "
            f"groups of a token side by side"
        )


def _check_index(plan: AppendPlan, index_k_BSIR: torch.Tensor | None, index_queries: bool, batch: int) -> None:
    if index_queries and plan.index_q_PRD is None:
        raise ValueError("rope_append: index queries need a plan with index projections")
    if index_k_BSIR is None:
        return
    if plan.index_k_IRD is None:
        raise ValueError("rope_append: index keys need a plan with index projections")
    I, R, _ = plan.index_k_IRD.shape  # noqa: E741
    if index_k_BSIR.shape[0] != batch or index_k_BSIR.shape[2:] != (I, R) or index_k_BSIR.stride(3) != 1:
        raise ValueError(f"rope_append: index keys {tuple(index_k_BSIR.shape)}, wanted [{batch}, tokens, {I}, {R}], last axis contiguous")
