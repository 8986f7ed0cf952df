"""What a decode step of the retrieval heads keeps on real queries and keys: blocks, true attention mass and output error."""

# n query rows  T tokens  H retrieval query heads  D head dim  R index dim  N blocks
from collections.abc import Sequence
from typing import Any

import torch

from rtpurbo.benchmarks.long_context_capture import Captured
from rtpurbo.kernels.block_scores import block_scores
from rtpurbo.kernels.block_selection import plan_selection, score_and_select
from rtpurbo.kernels.block_selection.reference import select_blocks_exact
from rtpurbo.manifests.manifest import Manifest

# selected: score_and_select. exact: the shortest prefix of blocks by the same index scores, without histogram bins.
# block_oracle, token_oracle: the fewest blocks or tokens whose true attention mass reaches top_p, nothing forced.
SETS = ("selected", "exact", "block_oracle", "token_oracle")
MEASURES = ("blocks", "tokens", "token_share", "mass", "output_error")
STRONG = 0.1


@torch.no_grad()
def measure(captured: Captured, manifest: Manifest, rows: Sequence[int]) -> dict[str, torch.Tensor]:
    """For every set of SETS, fp64 [H, n, measures] of decode steps at the given positions of the document, each on all tokens up to it.

    blocks: blocks with a key of the set. tokens, token_share: keys read, and their share of those visible. mass: true attention mass of
    the set. output_error: |o_set - o_dense| / |o_dense|, both outputs in fp32, the softmax renormalised over the set.
    """
    row_n = torch.tensor(list(rows), device=captured.q_THD.device)
    T, block = captured.k_TKD.shape[0], manifest.decode_block
    k_HTD = captured.k_TKD[:, list(captured.kv_heads)].transpose(0, 1).float()
    v_HTD = captured.v_TKD[:, list(captured.kv_heads)].transpose(0, 1).float()
    logits_HnT = torch.matmul(captured.q_THD[row_n].transpose(0, 1).float(), k_HTD.transpose(1, 2)) * captured.scale
    visible_nT = torch.arange(T, device=row_n.device) <= row_n[:, None]
    full_HnT = logits_HnT.masked_fill(~visible_nT, float("-inf")).softmax(dim=-1)
    dense_HnD = torch.matmul(full_HnT, v_HTD)
    block_T = torch.arange(T, device=row_n.device) // block
    by_block_HnN = torch.zeros(*full_HnT.shape[:2], int(block_T[-1]) + 1, device=row_n.device).index_add_(2, block_T, full_HnT)
    sets = {
        "selected": selected_blocks(captured, manifest, row_n)[..., block_T],
        "exact": exact_blocks(captured, manifest, row_n)[..., block_T],
        "block_oracle": nucleus(by_block_HnN, manifest.top_p)[..., block_T],
        "token_oracle": nucleus(full_HnT, manifest.top_p),
    }
    result = {}
    for name in SETS:
        kept_HnT = sets[name] & visible_nT
        weights_HnT = full_HnT * kept_HnT
        mass_Hn = weights_HnT.sum(dim=-1)
        out_HnD = torch.matmul(weights_HnT, v_HTD) / mass_Hn[..., None]
        error_Hn = (out_HnD - dense_HnD).norm(dim=-1) / dense_HnD.norm(dim=-1)
        tokens_Hn = kept_HnT.sum(dim=-1)
        in_block_HnN = torch.zeros_like(by_block_HnN).index_add_(2, block_T, kept_HnT.float())
        columns = ((in_block_HnN > 0).sum(dim=-1), tokens_Hn, tokens_Hn / (row_n + 1), mass_Hn, error_Hn)
        result[name] = torch.stack([column.double() for column in columns], dim=-1).cpu()
    return result


def selected_blocks(captured: Captured, manifest: Manifest, row_n: torch.Tensor) -> torch.Tensor:
    """Blocks that one launch of score_and_select picks, every row a sequence of a batch over the same keys: bool [H, n, N]."""
    n, T = len(row_n), captured.index_k_TIR.shape[0]
    plan = plan_selection(
        captured.key_sets,
        num_sets=captured.index_k_TIR.shape[1],
        batch=n,
        capacity=T,
        device=row_n.device,
        block_size=manifest.decode_block,
    )
    ids_nHN, count_nH = score_and_select(
        captured.index_q_THR[row_n].contiguous(),
        captured.index_k_TIR.expand(n, -1, -1, -1),
        plan=plan,
        lengths_B=(row_n + 1).int(),
        scale=manifest.indexer.scale,
        top_p=manifest.top_p,
        sinks=manifest.sinks,
    )
    N = -(-T // manifest.decode_block)
    listed_nHN = torch.arange(ids_nHN.shape[2], device=row_n.device) < count_nH[..., None]
    mask_nHN = torch.zeros(n, len(captured.heads), N + 1, dtype=torch.bool, device=row_n.device)
    return mask_nHN.scatter_(2, torch.where(listed_nHN, ids_nHN, N).long(), True)[..., :N].transpose(0, 1)


def exact_blocks(captured: Captured, manifest: Manifest, row_n: torch.Tensor) -> torch.Tensor:
    """The exact top-p set of blocks by the same index scores: bool [H, n, N]."""
    maxima, sums = block_scores(
        captured.index_q_THR[None, row_n],
        captured.index_k_TIR[None],
        key_set_H=torch.tensor(captured.key_sets, device=row_n.device),
        visible_BT=row_n[None] + 1,
        scale=manifest.indexer.scale,
        block_size=manifest.decode_block,
    )
    return select_blocks_exact(maxima, sums, manifest.top_p, manifest.sinks, manifest.decode_block)[0]


def nucleus(mass: torch.Tensor, top_p: float) -> torch.Tensor:
    """The fewest entries of the last axis whose sum reaches top_p, as a mask."""
    sorted_mass, order = mass.sort(dim=-1, descending=True)
    return torch.zeros_like(mass, dtype=torch.bool).scatter(-1, order, sorted_mass.cumsum(dim=-1) - sorted_mass < top_p)


def summary(captured: Captured, manifest: Manifest, result: dict[str, torch.Tensor], kinds: dict[str, slice]) -> list[dict[str, Any]]:
    """One record a head, kind of row and set: the mean of every measure over the rows, and the largest output error."""
    scores = manifest.layers[captured.layer].scores
    records = []
    for n, head in enumerate(captured.heads):
        for kind, rows in kinds.items():
            for name in SETS:
                values = result[name][n, rows]
                record = {"layer": captured.layer, "head": head, "score": scores[head], "rows": kind, "set": name}
                record |= {measure: round(value, 5) for measure, value in zip(MEASURES, values.mean(dim=0).tolist(), strict=True)}
                records.append({**record, "output_error_max": round(values[:, -1].max().item(), 5)})
    return records


def table(records: Sequence[dict[str, Any]]) -> str:
    """Means over the heads, with the lowest and highest head in brackets, for each length, kind of row and set.

    First all retrieval heads, then those whose retrieval score is at least STRONG: others came in with their KV group.
    """
    parts = [f"All {_num_heads(records)} retrieval heads.\n\n{_table(records)}"]
    if strong := [record for record in records if record["score"] >= STRONG]:
        parts.append(f"The {_num_heads(strong)} of them with a retrieval score of at least {STRONG}.\n\n{_table(strong)}")
    return "\n".join(parts)


def _num_heads(records: Sequence[dict[str, Any]]) -> int:
    return len({(record["layer"], record["head"]) for record in records})


def _table(records: Sequence[dict[str, Any]]) -> str:
    lines = ["| tokens | rows | set | " + " | ".join(MEASURES) + " |", "|---|---|---|" + "---|" * len(MEASURES)]
    for key in dict.fromkeys((r["length"], r["rows"], r["set"]) for r in records):
        group = [r for r in records if (r["length"], r["rows"], r["set"]) == key]
        cells = []
        for name in MEASURES:
            values = [r[name] for r in group]
            cells.append(f"{sum(values) / len(values):.3g} ({min(values):.2g} ... {max(values):.2g})")
        lines.append("| " + " | ".join([*map(str, key), *cells]) + " |")
    return "\n".join(lines) + "\n"
