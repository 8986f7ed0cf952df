"""What a sparse prefill keeps of one layer's real attention: density, index mass, true mass and output error, on captured tensors.

`measure` takes the queries, keys, values and index projections of a layer's retrieval heads over one prompt and compares the poolings
of `select_prefill`. It works block of queries by block of queries, so that no T x T matrix exists.
"""

# T tokens of the prompt  H retrieval query heads  K kv heads  D head dim  I index-key sets  R index dim  Q query blocks  N key blocks
from collections.abc import Sequence

import torch

from rtpurbo.kernels.prefill_selection import POOLINGS, select_prefill
from rtpurbo.kernels.sparse_attention.prefill_reference import listed_blocks

# Query blocks with fewer candidates are dense whatever is selected: they are left out of the densities and masses.
MIN_CANDIDATES = 16


def measure(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    index_q_THR: torch.Tensor,
    index_k_TIR: torch.Tensor,
    *,
    kv_heads: Sequence[int],
    key_sets: Sequence[int],
    scale: float,
    index_scale: float,
    top_p: float,
    sinks: int,
    block: int = 128,
    poolings: Sequence[str] = POOLINGS,
) -> dict[str, dict[str, float]]:
    """Per pooling, over all heads and the blocks of queries with at least MIN_CANDIDATES candidate key blocks:

    density: listed over candidate blocks. index_mass, true_mass: mean share of the indexer's
    token-level softmax and of the attention's softmax (scale * q . k) that lies in the listed blocks; worst_true_mass: its 1st percentile
    over queries and heads. output_error: norm(sparse - dense) / norm(dense) of the heads' outputs; worst_output_error: the largest of a
    head. oracle_density: candidate blocks that would hold top_p of the true mass, averaged over a block's queries.

    Args:
        q_THD, k_TKD, v_TKD: post-RoPE, any float dtype and device; q has the retrieval heads only.
        index_q_THR, index_k_TIR: index queries of these heads and index keys.
        kv_heads, key_sets: for each head of q the KV head and the index-key set that it reads.
        scale, index_scale, top_p, sinks, block: see `attend_prefill` and `select_prefill`.
    """
    T, H, _ = q_THD.shape
    device = q_THD.device
    key_set_H = torch.tensor(list(key_sets), dtype=torch.int32, device=device)
    lengths_B, counts_B = (torch.tensor([x], dtype=torch.int32, device=device) for x in (0, T))
    k_THD, v_THD = (x[:, list(kv_heads)].float() for x in (k_TKD, v_TKD))
    index_k_THR = index_k_TIR[:, list(key_sets)].float()
    blocks = -(-T // block)
    chosen = {}
    for pooling in poolings:
        ids_BHQN, count_BHQ = select_prefill(
            index_q_THR[None], index_k_TIR[None], key_set_H=key_set_H, lengths_B=lengths_B, counts_B=counts_B, scale=index_scale,
            top_p=top_p, sinks=sinks, block=block, pooling=pooling,
        )  # fmt: skip
        chosen[pooling] = listed_blocks(ids_BHQN, count_BHQ, blocks)[0]
    sums = {pooling: _Sums(H) for pooling in poolings}
    for n in range(MIN_CANDIDATES - 1, blocks):
        rows = slice(n * block, min((n + 1) * block, T))
        causal_tS = torch.arange(rows.stop, device=device) <= torch.arange(rows.start, rows.stop, device=device)[:, None]
        logits_HtS = torch.einsum("thd,shd->hts", q_THD[rows].float(), k_THD[: rows.stop]) * scale
        index_HtS = torch.einsum("thr,shr->hts", index_q_THR[rows].float(), index_k_THR[: rows.stop]) * index_scale
        true_HtS, index_HtS = (x.masked_fill(~causal_tS, float("-inf")).softmax(-1) for x in (logits_HtS, index_HtS))
        dense_tHD = torch.einsum("hts,shd->thd", true_HtS, v_THD[: rows.stop])
        oracle = _oracle(true_HtS, block, top_p)
        for pooling in poolings:
            listed_HN = chosen[pooling][:, n, : n + 1]
            seen_H1S = listed_HN.repeat_interleave(block, dim=1)[:, None, : rows.stop]
            kept_HtS = true_HtS * seen_H1S
            kept_Ht = kept_HtS.sum(-1)
            sparse_tHD = torch.einsum("hts,shd->thd", kept_HtS / kept_Ht[..., None], v_THD[: rows.stop])
            sums[pooling].add(listed_HN, oracle, (index_HtS * seen_H1S).sum(-1), kept_Ht, sparse_tHD, dense_tHD)
    return {pooling: total.result() for pooling, total in sums.items()}


def _oracle(true_HtS: torch.Tensor, block: int, top_p: float) -> float:
    """Share of the candidate blocks that the shortest list needs to hold top_p of the true mass, mean over heads."""
    H, t, S = true_HtS.shape
    blocks = -(-S // block)
    mass_HN = torch.nn.functional.pad(true_HtS.mean(1), (0, blocks * block - S)).view(H, blocks, block).sum(-1)
    ranked_HN = mass_HN.sort(dim=-1, descending=True).values
    return float(((ranked_HN.cumsum(-1) - ranked_HN) < top_p).sum(-1).float().mean() / blocks)


class _Sums:
    """Running totals over the query blocks of one pooling."""

    def __init__(self, heads: int) -> None:
        self.listed = self.candidates = self.blocks = 0
        self.oracle = 0.0
        self.index: list[torch.Tensor] = []
        self.true: list[torch.Tensor] = []
        self.error_H = torch.zeros(heads, dtype=torch.float64)
        self.norm_H = torch.zeros(heads, dtype=torch.float64)

    def add(self, listed_HN, oracle, index_Ht, true_Ht, sparse_tHD, dense_tHD) -> None:
        self.listed += int(listed_HN.sum())
        self.candidates += listed_HN.numel()
        self.blocks += 1
        self.oracle += oracle
        self.index.append(index_Ht.flatten().cpu())
        self.true.append(true_Ht.flatten().cpu())
        self.error_H += (sparse_tHD - dense_tHD).double().pow(2).sum((0, 2)).cpu()
        self.norm_H += dense_tHD.double().pow(2).sum((0, 2)).cpu()

    def result(self) -> dict[str, float]:
        if not self.blocks:
            raise ValueError(f"prefill_quality: the prompt has fewer than {MIN_CANDIDATES} blocks of keys")
        true = torch.cat(self.true)
        # torch.quantile refuses more than 2^24 elements.
        worst = true.kthvalue(max(1, len(true) // 100)).values
        return {
            "density": self.listed / self.candidates,
            "oracle_density": self.oracle / self.blocks,
            "index_mass": float(torch.cat(self.index).mean()),
            "true_mass": float(true.mean()),
            "worst_true_mass": float(worst),
            "output_error": float((self.error_H.sum() / self.norm_H.sum()).sqrt()),
            "worst_output_error": float((self.error_H / self.norm_H).max().sqrt()),
        }
