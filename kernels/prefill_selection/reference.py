"""Eager definition of select_prefill: pooled index logits, and the histogram top-p of block_selection over them."""

# B batch  T chunk tokens  S cached tokens  H retrieval query heads  I index-key sets  R index dim  Q query blocks  N key blocks
import torch

from rtpurbo.kernels.block_selection.reference import NUM_BINS, block_bin, block_mass, mask_to_ids, mass_needed

POOLINGS = ("mean", "max")


def pool_blocks(x_BSIR: torch.Tensor, filled_B: torch.Tensor, block: int, pooling: str) -> torch.Tensor:
    """Mean or maximum (of each dimension) of rows n * block ... n * block + block - 1 below filled_B; fp32 [B, N, I, R], 0 where none."""
    B, S, sets, R = x_BSIR.shape
    N = -(-S // block)
    filled_BS = torch.arange(N * block, device=x_BSIR.device) < filled_B[:, None]
    x_BSIR = torch.nn.functional.pad(x_BSIR.float(), (0, 0, 0, 0, 0, N * block - S))
    filled_BNb11 = filled_BS.view(B, N, block, 1, 1)
    x_BNbIR = x_BSIR.view(B, N, block, sets, R)
    if pooling == "mean":
        sum_BNIR = x_BNbIR.masked_fill(~filled_BNb11, 0.0).sum(2)
        return sum_BNIR / filled_BNb11.sum(2).clamp(min=1)
    largest_BNIR = x_BNbIR.masked_fill(~filled_BNb11, float("-inf")).amax(2)
    return largest_BNIR.masked_fill(~filled_BNb11.any(2), 0.0)


def pooled_logits(
    q_BQHR: torch.Tensor,
    k_BNIR: torch.Tensor,
    key_set_H: torch.Tensor,
    lengths_B: torch.Tensor,
    counts_B: torch.Tensor,
    scale: float,
    sinks: int,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled logits fp32 [B, H, Q, N], -inf for blocks that are no candidates, and which of them are forced."""
    Q, N = q_BQHR.shape[1], k_BNIR.shape[1]
    start_BQ = torch.arange(Q, device=q_BQHR.device) * block + lengths_B.long()[:, None]
    last_BQ = torch.minimum(start_BQ + block, (lengths_B + counts_B).long()[:, None]) - 1
    first_BQ1, last_BQ1 = (start_BQ // block)[..., None], (last_BQ // block)[..., None]
    block_N = torch.arange(N, device=q_BQHR.device)
    candidate_BQN = (block_N <= last_BQ1) & (last_BQ >= start_BQ)[..., None]
    forced_BQN = candidate_BQN & ((block_N < -(-sinks // block)) | (block_N >= first_BQ1 - 1))
    logits_BHQN = torch.einsum("bqhr,bnhr->bhqn", q_BQHR, k_BNIR.index_select(2, key_set_H)) * scale
    return logits_BHQN.masked_fill(~candidate_BQN[:, None], float("-inf")), forced_BQN[:, None].expand_as(logits_BHQN)


def select_logits(logits_BHQN: torch.Tensor, forced_BHQN: torch.Tensor, top_p: float) -> torch.Tensor:
    """Mask bool [B, H, Q, N]: forced blocks, and whole bins from the top until the mass reaches top_p * total."""
    candidate = logits_BHQN > float("-inf")
    if top_p >= 1.0:
        return candidate
    mass = block_mass(logits_BHQN, candidate.float())
    bins = block_bin(logits_BHQN)
    free_mass = torch.where(forced_BHQN, 0, mass)
    histogram = torch.zeros(*mass.shape[:-1], NUM_BINS, dtype=torch.int64, device=mass.device).scatter_add_(-1, bins, free_mass)
    forced_mass = torch.where(forced_BHQN, mass, 0).sum(dim=-1, keepdim=True)
    before_bin = forced_mass + histogram.cumsum(dim=-1) - histogram
    bin_taken = before_bin < mass_needed(mass.sum(dim=-1, keepdim=True), top_p)
    return candidate & (forced_BHQN | bin_taken.gather(-1, bins))


def select_prefill(
    index_q_BTHR: torch.Tensor,
    index_k_BSIR: torch.Tensor,
    key_set_H: torch.Tensor,
    lengths_B: torch.Tensor,
    counts_B: torch.Tensor,
    scale: float,
    top_p: float,
    sinks: int,
    block: int,
    pooling: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.prefill_selection.select_prefill`."""
    q_BQHR = pool_blocks(index_q_BTHR, counts_B, block, pooling)
    k_BNIR = pool_blocks(index_k_BSIR, lengths_B + counts_B, block, pooling)
    logits_BHQN, forced_BHQN = pooled_logits(q_BQHR, k_BNIR, key_set_H, lengths_B, counts_B, scale, sinks, block)
    return mask_to_ids(select_logits(logits_BHQN, forced_BHQN, top_p))
