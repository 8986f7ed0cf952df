"""select_blocks: dynamic top-p over blocks of keys by a histogram of block maxima, without a sort.

score_and_select: the decode form, fused with the index scores in one launch; it returns ids instead of a mask.
"""

# B batch  H retrieval query heads  T query tokens  S cached tokens  I index-key sets  R index dim  N blocks
import torch

from rtpurbo.kernels.block_scores import block_scores
from rtpurbo.kernels.block_selection import cuda, reference
from rtpurbo.kernels.block_selection.plan import SelectionPlan, plan_selection
from rtpurbo.kernels.block_selection.reference import mask_to_ids, mask_to_words, words_to_mask

__all__ = ["SelectionPlan", "mask_to_ids", "mask_to_words", "plan_selection", "score_and_select", "select_blocks", "words_to_mask"]


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


def score_and_select(
    index_q_BHR: torch.Tensor,
    index_k_BSIR: torch.Tensor,
    *,
    plan: SelectionPlan,
    lengths_B: torch.Tensor,
    scale: float,
    top_p: float,
    sinks: int,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`block_scores` of one query token and `select_blocks` of the result: one launch, no sort, no host synchronisation.

    On a GPU masses are taken from fp32 scores (the reference: fp64), so a decision within ~1e-6 of a bin edge or of
    top_p * total may differ from the reference; equal inputs always give equal sets.

    Args:
        index_q_BHR: index queries of the retrieval heads, in the order of the plan's key_set_H; fp32, or bf16. Rounded to bf16
            where the keys are narrower than fp32: the matrix unit multiplies 16 bits. "cuda" rounds dimensions below 2^-31 of a
            query's largest to 2^-39 of it where the keys are fp8.
        index_k_BSIR: cached index keys, fp32, bf16 or fp8 e4m3, any strides with a contiguous last axis;
            S <= the plan's capacity. Rows at or beyond a sequence's length may hold anything.
        plan: from `plan_selection`; B <= its batch.
        lengths_B: int32, cached tokens of every sequence, the query's own included; read on the device.
        scale: logit scale (manifest `indexer.scale`).
        top_p: > 0; >= 1 selects every block.
        sinks: tokens whose block(s) are forced, like the newest two blocks.
        impl: "auto" (on a GPU "cuda" where the tensors allow it and `cuda.is_faster` says so, else "triton"; on a CPU the reference),
            "cuda" (in CUDA C++), "triton" or "reference".

    Returns ids int32 [B, H, N], ascending, and count int32 [B, H]; places at or beyond the count are unspecified. A plan with
    masks holds the same sets as bits afterwards, up to the word of a sequence's last block.
    Raises ValueError for inputs that do not fit the plan. Source: arXiv 2605.16928 section 3.4; parts, plans: ours.
    """
    B, H, R = index_q_BHR.shape
    if len(plan.key_set_H) != H or plan.batch < B:
        raise ValueError(
            f"score_and_select: index_q {tuple(index_q_BHR.shape)}, the plan is for a batch of {plan.batch} and {len(plan.key_set_H)} heads"
        )
    if index_k_BSIR.shape[0] != B or index_k_BSIR.shape[2:] != (plan.num_sets, R) or index_k_BSIR.stride(3) != 1:
        raise ValueError(
            f"score_and_select: index_k {tuple(index_k_BSIR.shape)} does not fit {plan.num_sets} key sets of index_q "
            f"{tuple(index_q_BHR.shape)} (last axis contiguous)"
        )
    if index_k_BSIR.shape[1] > plan.capacity_blocks * plan.block_size or lengths_B.shape != (B,):
        raise ValueError(
            f"score_and_select: {index_k_BSIR.shape[1]} tokens or lengths {tuple(lengths_B.shape)}, the plan holds "
            f"{plan.capacity_blocks} blocks of {plan.block_size} for {B} sequences"
        )
    if not top_p > 0 or lengths_B.dtype != torch.int32 or index_q_BHR.stride(2) != 1:
        raise ValueError(f"score_and_select: top_p {top_p} must be > 0, lengths {lengths_B.dtype} int32, index_q contiguous")
    if impl not in ("auto", "cuda", "triton", "reference"):
        raise ValueError(f"score_and_select: impl {impl!r} is not one of auto, cuda, triton, reference")
    if impl == "cuda" and (plan.cuda is None or not index_q_BHR.is_cuda):
        raise ValueError(
            "score_and_select: impl 'cuda' cannot run: it needs compute capability 9.0 or later, and a plan with cuda=True for blocks of "
            "64, ascending key sets and no masks"
        )
    capability = torch.cuda.get_device_capability(index_q_BHR.device) if index_q_BHR.is_cuda else (0, 0)
    if plan.cuda is not None and (impl == "cuda" or (impl == "auto" and cuda.is_faster(capability, plan.batch, index_k_BSIR, top_p))):
        obstacle = cuda.index_obstacle(capability, index_q_BHR, index_k_BSIR)
        if obstacle is not None and impl == "cuda":
            raise ValueError(f"score_and_select: impl 'cuda' cannot run: {obstacle}")
        if obstacle is None:
            return cuda.launch(plan.cuda, index_q_BHR, index_k_BSIR, lengths_B, scale, top_p, sinks)
    if impl == "triton" or (impl == "auto" and index_q_BHR.is_cuda):
        from rtpurbo.kernels.block_selection import kernel

        return kernel.launch(plan, index_q_BHR, index_k_BSIR, lengths_B, scale, top_p, sinks)
    key_set_H = torch.tensor(plan.key_set_H, device=index_q_BHR.device)
    max_BHTN, sum_BHTN = block_scores(
        index_q_BHR[:, None], index_k_BSIR, key_set_H=key_set_H, visible_BT=lengths_B[:, None], scale=scale,
        block_size=plan.block_size,
    )  # fmt: skip
    mask_BHTN = select_blocks(max_BHTN, sum_BHTN, top_p=top_p, sinks=sinks, block_size=plan.block_size)
    if plan.mask_BHW is not None:
        words_BHW = mask_to_words(mask_BHTN[:, :, 0])
        plan.mask_BHW[:B, :, : words_BHW.shape[2]] = words_BHW
    return mask_to_ids(mask_BHTN[:, :, 0])
