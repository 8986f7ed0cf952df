"""select_prefill: dynamic top-p over blocks of keys for blocks of queries, from pooled index queries and keys."""

# B batch  T chunk tokens  S cached tokens  H retrieval query heads  I index-key sets  R index dim  Q query blocks  N key blocks
import torch

from rtpurbo.kernels.prefill_selection import reference
from rtpurbo.kernels.prefill_selection.reference import POOLINGS

__all__ = ["POOLINGS", "select_prefill"]


def select_prefill(
    index_q_BTHR: torch.Tensor,
    index_k_BSIR: torch.Tensor,
    *,
    key_set_H: torch.Tensor,
    lengths_B: torch.Tensor,
    counts_B: torch.Tensor,
    scale: float,
    top_p: float,
    sinks: int,
    block: int = 128,
    pooling: str = "mean",
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key blocks whose share of the pooled softmax reaches top_p, for every head and block of queries of a chunk.

    q_n = pool of the valid index queries of rows n * block ... of the chunk, k_m = pool of the index keys of positions m * block ...
    that are cached (the chunk's included). Key block m is a candidate of query block n when it starts at or before the newest of its
    queries. Pooled logit s(n, m) = scale * q_n . k_m; mass = round(2^32 exp(s - M)), M = max s; bin = min(255, floor(8 (M - s))). The
    blocks of the sinks, those that hold the positions of the queries and the one before are always in and count towards top_p;
    whole bins are taken from bin 0 until mass >= top_p * total. top_p >= 1 selects every candidate. Integer sums.

    Args:
        index_q_BTHR: index queries of the retrieval heads, any float dtype; row t of sequence b is position lengths_B[b] + t.
        index_k_BSIR: index keys by position, the chunk's already written; rows at or beyond lengths + counts may hold anything.
        key_set_H: int32 or int64 on the device, which set each head reads.
        lengths_B, counts_B: int32, tokens before the chunk and valid rows of it, read on the device.
        scale: logit scale (manifest `indexer.scale`).
        top_p: > 0.
        sinks: tokens whose blocks are forced.
        block: queries and keys per block.
        pooling: "mean", or "max" of each index dimension by itself.
        impl: "auto" (Triton on a GPU, else the reference), "triton" or "reference". On a GPU pooled values and masses are sums and
            exponentials in fp32, so a decision within ~1e-6 of a bin edge may differ from the reference; equal inputs give equal lists.

    Returns ids int32 [B, H, Q, N], ascending, Q = ceil(T / block), N = ceil(S / block), and count int32 [B, H, Q] (0 for a block
    without valid query); places at or beyond the count are unspecified.
    Raises ValueError for inputs that do not fit. Source: ours; the histogram is that of arXiv 2605.16928 section 3.4.
    """
    B, T, H, R = index_q_BTHR.shape
    if index_k_BSIR.shape[0] != B or index_k_BSIR.shape[3] != R or key_set_H.shape != (H,):
        raise ValueError(
            f"select_prefill: index_q {tuple(index_q_BTHR.shape)}, index_k {tuple(index_k_BSIR.shape)} and "
            f"key_set {tuple(key_set_H.shape)} do not fit"
        )
    if lengths_B.shape != (B,) or counts_B.shape != (B,):
        raise ValueError(f"select_prefill: lengths {tuple(lengths_B.shape)} or counts {tuple(counts_B.shape)}, wanted {(B,)}")
    if not top_p > 0 or pooling not in POOLINGS or block < 1:
        raise ValueError(f"select_prefill: top_p {top_p} must be > 0, pooling {pooling!r} one of {POOLINGS}, block {block} >= 1")
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"select_prefill: impl {impl!r} is not one of auto, triton, reference")
    if impl == "triton" or (impl == "auto" and index_q_BTHR.is_cuda):
        from rtpurbo.kernels.prefill_selection import kernel

        if -(-index_k_BSIR.shape[1] // block) > kernel.MAX_BLOCKS:
            raise ValueError(f"select_prefill: {index_k_BSIR.shape[1]} keys in blocks of {block}, at most {kernel.MAX_BLOCKS} blocks")
        select = kernel.select_prefill
    else:
        select = reference.select_prefill
    return select(index_q_BTHR, index_k_BSIR, key_set_H, lengths_B, counts_B, scale, top_p, sinks, block, pooling)
