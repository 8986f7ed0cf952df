"""Eager definition of select_blocks: histogram top-p over block masses, in fixed-point integers; and the exact oracle."""

# B batch  H retrieval query heads  T query tokens  N blocks
import torch

NUM_BINS = 256
BINS_PER_NAT = 8
# Masses are integers in units of 2^-32 of exp(M): 2^15 blocks of 64 keys stay below 2^53, exact in fp64 as well.
MASS_ONE = float(1 << 32)


def block_mass(max_N: torch.Tensor, sum_N: torch.Tensor) -> torch.Tensor:
    """round(l_b * exp(m_b - max m) * 2^32) as int64 along the last axis; 0 for blocks without visible key."""
    top = max_N.amax(dim=-1, keepdim=True)
    relative = torch.exp((max_N - top).double()) * sum_N.double()
    return torch.where(sum_N > 0, torch.round(relative * MASS_ONE), 0.0).long()


def block_bin(max_N: torch.Tensor) -> torch.Tensor:
    """min(255, floor(8 * (max m - m_b))) as int64; bin 255 is open-ended (and holds blocks without visible key)."""
    top = max_N.amax(dim=-1, keepdim=True)
    distance = torch.clamp((top - max_N) * BINS_PER_NAT, max=float(NUM_BINS - 1))
    return torch.nan_to_num(distance, nan=float(NUM_BINS - 1)).floor().long()


def forced_blocks(valid_N: torch.Tensor, sinks: int, block_size: int) -> torch.Tensor:
    """Blocks that hold the sinks, and the newest two valid blocks, as bool along the last axis."""
    blocks = valid_N.shape[-1]
    block_N = torch.arange(blocks, device=valid_N.device)
    num_valid = valid_N.sum(dim=-1, keepdim=True)
    sink_blocks = -(-sinks // block_size)
    return valid_N & ((block_N < sink_blocks) | (block_N >= num_valid - 2))


def mass_needed(total: torch.Tensor, top_p: float) -> torch.Tensor:
    """ceil(top_p * total) in fp64, as int64."""
    return torch.ceil(total.double() * top_p).long()


def select_blocks(max_BHTN: torch.Tensor, sum_BHTN: torch.Tensor, top_p: float, sinks: int, block_size: int) -> torch.Tensor:
    """Histogram selection as a mask bool [B, H, T, N]: whole bins from the top until the mass reaches top_p * total."""
    valid = sum_BHTN > 0
    if top_p >= 1.0:
        return valid
    mass = block_mass(max_BHTN, sum_BHTN)
    forced = forced_blocks(valid, sinks, block_size)
    bins = block_bin(max_BHTN)
    free_mass = torch.where(forced, 0, mass)
    histogram = torch.zeros(*mass.shape[:-1], NUM_BINS, dtype=torch.int64, device=mass.device)
    histogram.scatter_add_(-1, bins, free_mass)
    forced_mass = torch.where(forced, mass, 0).sum(dim=-1, keepdim=True)
    needed = mass_needed(mass.sum(dim=-1, keepdim=True), top_p)
    mass_before_bin = forced_mass + histogram.cumsum(dim=-1) - histogram
    bin_taken = mass_before_bin < needed
    return valid & (forced | bin_taken.gather(-1, bins))


def select_blocks_exact(max_BHTN: torch.Tensor, sum_BHTN: torch.Tensor, top_p: float, sinks: int, block_size: int) -> torch.Tensor:
    """The exact set: forced blocks, then the shortest prefix in (m_b descending, index ascending) that reaches the mass."""
    valid = sum_BHTN > 0
    if top_p >= 1.0:
        return valid
    mass = block_mass(max_BHTN, sum_BHTN)
    forced = forced_blocks(valid, sinks, block_size)
    order = torch.sort(max_BHTN, dim=-1, descending=True, stable=True).indices
    free_sorted = torch.where(forced, 0, mass).gather(-1, order)
    forced_mass = torch.where(forced, mass, 0).sum(dim=-1, keepdim=True)
    before = forced_mass + free_sorted.cumsum(dim=-1) - free_sorted
    needed = mass_needed(mass.sum(dim=-1, keepdim=True), top_p)
    taken = torch.zeros_like(valid).scatter(-1, order, before < needed)
    return valid & (forced | taken)


def mask_to_ids(mask_BHN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Block ids ascending, int32 [B, H, N] (unused places -1), and their count, int32 [B, H]."""
    blocks = mask_BHN.shape[-1]
    block_N = torch.arange(blocks, device=mask_BHN.device)
    ids = torch.where(mask_BHN, block_N, blocks).sort(dim=-1).values
    return torch.where(ids < blocks, ids, -1).int(), mask_BHN.sum(dim=-1).int()


def mask_to_words(mask_BHN: torch.Tensor) -> torch.Tensor:
    """One bit a block: int32 [B, H, ceil(N / 32)], block n in bit n mod 32 of word n // 32."""
    bits_BHWy = torch.nn.functional.pad(mask_BHN, (0, -mask_BHN.shape[-1] % 32)).unflatten(-1, (-1, 32)).long()
    words_BHW = (bits_BHWy << torch.arange(32, device=mask_BHN.device)).sum(-1)
    return torch.where(words_BHW >= 1 << 31, words_BHW - (1 << 32), words_BHW).int()


def words_to_mask(words_BHW: torch.Tensor, blocks: int) -> torch.Tensor:
    """The bool [B, H, N] of `mask_to_words`."""
    return ((words_BHW[..., None] >> torch.arange(32, device=words_BHW.device)) & 1).flatten(-2)[..., :blocks].bool()
