"""Eager definition of block_scores: indexer logits reduced to (maximum, sum of exponentials) per block of keys."""

# B batch  T query tokens  S cached tokens  H retrieval query heads  I index-key sets (H, or one per KV group)
# R index dim  N blocks
import torch


def block_scores(
    index_q_BTHR: torch.Tensor,
    index_k_BSIR: torch.Tensor,
    key_set_H: torch.Tensor,
    visible_BT: torch.Tensor,
    scale: float,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.block_scores.block_scores`."""
    B, T, H, _ = index_q_BTHR.shape
    S = index_k_BSIR.shape[1]
    blocks = -(-S // block_size)
    index_k_BSHR = index_k_BSIR.index_select(2, key_set_H)
    if index_k_BSIR.element_size() < 4:
        index_q_BTHR = index_q_BTHR.to(torch.bfloat16)
    logits_BHTS = torch.einsum("bthr,bshr->bhts", index_q_BTHR.float(), index_k_BSHR.float()) * scale
    visible_B1TS = torch.arange(S, device=logits_BHTS.device) < visible_BT.long()[:, None, :, None]
    logits_BHTS = logits_BHTS.masked_fill(~visible_B1TS, float("-inf"))
    logits_BHTS = torch.nn.functional.pad(logits_BHTS, (0, blocks * block_size - S), value=float("-inf"))
    logits_BHTNs = logits_BHTS.unflatten(-1, (blocks, block_size))
    max_BHTN = logits_BHTNs.amax(dim=-1)
    sum_BHTN = torch.exp(logits_BHTNs - max_BHTN.masked_fill(max_BHTN == float("-inf"), 0.0)[..., None]).sum(dim=-1)
    return max_BHTN, sum_BHTN
