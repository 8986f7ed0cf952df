"""select_blocks: dynamic top-p over blocks of keys by a histogram of block maxima, without a sort."""

# B batch  H retrieval query heads  T query tokens  N blocks
import torch
from rtpurbo.kernels.block_selection import reference
from rtpurbo.kernels.block_selection.reference import mask_to_ids

__all__ = ["mask_to_ids", "select_blocks"]


def select_blocks(
    max_BHTN: torch.Tensor,
    sum_BHTN: torch.Tensor,
    *,
    top_p: float,
    sinks: int,
    block_size: int = 64,
    impl: str = "auto",
) -> torch.Tensor:
    """Blocks whose share of the indexer's softmax mass reaches top_p, per head and query.

    mass_b = round(2^32 * l_b * exp(m_b - M)), M = max m_b; bin_b = min(255, floor(8 (M - m_b))). The sinks' blocks and the
    newest two are always in and count towards top_p; whole bins are taken from bin 0 until mass >= top_p * total. The
    result holds the exact set (shortest prefix in m_b descending, index ascending) and exceeds it by at most the rest of one
    bin. top_p >= 1 selects every valid block. Integer sums: the set does not depend on the order of additions.

    Args:
        max_BHTN, sum_BHTN: fp32 output of `block_scores`; a block with sum 0 has no visible key and is never selected.
        top_p: in (0, 1].
        sinks: tokens whose block(s) are forced.
        block_size: keys per block.
        impl: "auto" or "reference".

    Returns bool [B, H, T, N]; `mask_to_ids` turns one query's rows into ids and counts.
    Raises ValueError for shapes or a top_p that do not fit. Source: arXiv 2605.16928 section 3.4; fixed point, forced blocks: ours.
    """
    if max_BHTN.shape != sum_BHTN.shape:
        raise ValueError(f"select_blocks: max {tuple(max_BHTN.shape)} and sum {tuple(sum_BHTN.shape)} differ")
    if not top_p > 0:
        raise ValueError(f"select_blocks: top_p {top_p} must be > 0")
    if impl not in ("auto", "reference"):
        raise ValueError(f"select_blocks: impl {impl!r} is not one of auto, reference")
    return reference.select_blocks(max_BHTN, sum_BHTN, top_p, sinks, block_size)
