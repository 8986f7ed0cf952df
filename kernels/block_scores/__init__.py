"""block_scores: 16-dim indexer logits over the cached tokens, reduced per block of keys."""

# B batch  T query tokens  S cached tokens  H retrieval query heads  I index-key sets  R index dim  N blocks
import torch

from rtpurbo.kernels.block_scores import reference

__all__ = ["block_scores"]


def block_scores(
    index_q_BTHR: torch.Tensor,
    index_k_BSIR: torch.Tensor,
    *,
    key_set_H: torch.Tensor,
    visible_BT: torch.Tensor,
    scale: float,
    block_size: int = 64,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """m_b = max over block b of s(t, j) and l_b = sum over block b of exp(s(t, j) - m_b), s = scale * index_q . index_k.

    Args:
        index_q_BTHR: index queries of the retrieval heads, no RoPE; rounded to bf16 where the keys are narrower than fp32.
        index_k_BSIR: cached index keys; I = H sets of keys, or fewer when heads share one.
        key_set_H: int64, which set each head reads (0 <= key_set < I).
        visible_BT: int, keys that query t sees: positions 0 ... visible - 1.
        scale: logit scale (manifest `indexer.scale`).
        block_size: keys per block; N = ceil(S / block_size), the last one may be partial.
        impl: "auto" or "reference".

    Returns fp32 (max [B, H, T, N], sum [B, H, T, N]); a block without visible key has max -inf and sum 0.
    Raises ValueError for shapes that do not fit. Source: arXiv 2605.16928 section 3.3.
    """
    if index_q_BTHR.shape[0] != index_k_BSIR.shape[0] or index_q_BTHR.shape[3] != index_k_BSIR.shape[3]:
        raise ValueError(f"block_scores: index_q {tuple(index_q_BTHR.shape)} and index_k {tuple(index_k_BSIR.shape)} do not fit")
    if key_set_H.shape != (index_q_BTHR.shape[2],) or visible_BT.shape != index_q_BTHR.shape[:2]:
        raise ValueError(
            f"block_scores: key_set {tuple(key_set_H.shape)} or visible {tuple(visible_BT.shape)} does not fit "
            f"index_q {tuple(index_q_BTHR.shape)}"
        )
    if impl not in ("auto", "reference"):
        raise ValueError(f"block_scores: impl {impl!r} is not one of auto, reference")
    return reference.block_scores(index_q_BTHR, index_k_BSIR, key_set_H, visible_BT, scale, block_size)
