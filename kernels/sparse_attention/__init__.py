"""attend_blocks: full-dimension attention of retrieval heads over the blocks that the indexer selected."""

# B batch  T query tokens  S cached tokens  H retrieval query heads  K kv heads  D head dim  N blocks
import torch
from rtpurbo.kernels.sparse_attention import reference

__all__ = ["attend_blocks"]


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
