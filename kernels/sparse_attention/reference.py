"""Eager definition of attend_blocks: attention of each head over its own selected blocks of keys."""

# B batch  T query tokens  S cached tokens  H retrieval query heads  K kv heads  D head dim  N blocks
import torch


def attend_blocks(
    q_BTHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    kv_head_H: torch.Tensor,
    visible_BT: torch.Tensor,
    selected_BHTN: torch.Tensor,
    scale: float,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.sparse_attention.attend_blocks`."""
    S = k_BSKD.shape[1]
    position_S = torch.arange(S, device=q_BTHD.device)
    stored = (position_S < visible_BT.long().amax(dim=1)[:, None])[:, :, None, None]
    k_BSHD = k_BSKD.index_select(2, kv_head_H).masked_fill(~stored, 0)
    v_BSHD = v_BSKD.index_select(2, kv_head_H).masked_fill(~stored, 0)
    visible_BHTS = (position_S < visible_BT.long()[:, None, :, None]) & selected_BHTN[..., position_S // block_size]
    logits_BHTS = torch.einsum("bthd,bshd->bhts", q_BTHD, k_BSHD).float() * scale
    logits_BHTS = logits_BHTS.masked_fill(~visible_BHTS, float("-inf"))
    lse_BHT = torch.logsumexp(logits_BHTS, dim=-1)
    weights_BHTS = torch.exp(logits_BHTS - lse_BHT.masked_fill(lse_BHT == float("-inf"), 0.0)[..., None])
    return torch.einsum("bhts,bshd->bthd", weights_BHTS.to(v_BSHD.dtype), v_BSHD), lse_BHT
