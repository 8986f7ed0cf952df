"""Eager definition of attend_prefill: causal attention of a chunk over a cache by position, all of it or listed blocks."""

# B batch  T chunk tokens  S cached tokens  K kv heads  G query heads per kv head  D head dim  H = K * G  Q query blocks  N key blocks
import torch

# Elements of the largest matrix of logits: 64 MiB in fp32.
LOGITS = 1 << 24


def attend_prefill(
    q_BTKGD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    lengths_B: torch.Tensor,
    counts_B: torch.Tensor,
    ids_BHQN: torch.Tensor | None,
    count_BHQ: torch.Tensor | None,
    scale: float,
    block: int,
    out_BTKGD: torch.Tensor,
    lse_BHT: torch.Tensor | None,
) -> None:
    """See `kernels.sparse_attention.attend_prefill`; works through the queries in whole blocks, so that no T x S matrix exists."""
    B, T, K, G, _ = q_BTKGD.shape
    S = k_BSKD.shape[1]
    position_S = torch.arange(S, device=q_BTKGD.device)
    # A row that was not written may hold anything, NaN included: it must not reach the sum even with weight zero.
    empty_BS11 = (position_S >= (lengths_B + counts_B).long()[:, None])[:, :, None, None]
    k_BSKD, v_BSKD = k_BSKD.masked_fill(empty_BS11, 0), v_BSKD.masked_fill(empty_BS11, 0)
    step = max(1, LOGITS // (B * K * G * S * block)) * block
    for start in range(0, T, step):
        rows = slice(start, min(start + step, T))
        offset_t = torch.arange(rows.start, rows.stop, device=q_BTKGD.device)
        valid_Bt1 = (offset_t < counts_B[:, None])[..., None]
        visible_BtS = (position_S <= (lengths_B.long()[:, None] + offset_t)[..., None]) & valid_Bt1
        visible_BKGtS = visible_BtS[:, None, None]
        if ids_BHQN is not None and count_BHQ is not None:
            listed = slice(start // block, -(-rows.stop // block))
            chosen_BHqN = listed_blocks(ids_BHQN[:, :, listed], count_BHQ[:, :, listed], -(-S // block))
            chosen_BKGqN = chosen_BHqN.unflatten(1, (K, G))
            chosen_BKGtN = chosen_BKGqN.index_select(3, (offset_t - start) // block)
            visible_BKGtS = visible_BKGtS & chosen_BKGtN.index_select(4, position_S // block)
        logits_BKGtS = torch.einsum("btkgd,bskd->bkgts", q_BTKGD[:, rows], k_BSKD).float() * scale
        logits_BKGtS = logits_BKGtS.masked_fill(~visible_BKGtS, float("-inf"))
        lse_BKGt = torch.logsumexp(logits_BKGtS, dim=-1)
        weights_BKGtS = torch.exp(logits_BKGtS - lse_BKGt.masked_fill(lse_BKGt == float("-inf"), 0.0)[..., None])
        out_BTKGD[:, rows] = torch.einsum("bkgts,bskd->btkgd", weights_BKGtS.to(v_BSKD.dtype), v_BSKD)
        if lse_BHT is not None:
            lse_BHT[:, :, rows] = lse_BKGt.flatten(1, 2)


def listed_blocks(ids_BHQN: torch.Tensor, count_BHQ: torch.Tensor, blocks: int) -> torch.Tensor:
    """Bool [B, H, Q, blocks]: the blocks that the first `count` ids name; places beyond the count may hold anything."""
    listed = torch.arange(ids_BHQN.shape[-1], device=ids_BHQN.device) < count_BHQ[..., None]
    place = torch.where(listed, ids_BHQN, blocks).long()
    mask = torch.zeros(*count_BHQ.shape, blocks + 1, dtype=torch.bool, device=ids_BHQN.device)
    return mask.scatter(-1, place, True)[..., :blocks]
