"""Calibration: retrieval scores of every query head on needle documents, layer by layer, and the roles that follow."""

# B batch (1)  T tokens  n needle tokens  L layers  H query heads  K kv heads  D head dim
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

from rtpurbo.converter.attention import IMPLEMENTATION, dense_attention
from rtpurbo.converter.checkpoint import Checkpoint, load_embedding, load_rotary, stream_layers
from rtpurbo.converter.needle import NeedleDocument
from rtpurbo.converter.recipe import Recipe
from rtpurbo.converter.work import write_tensors
from rtpurbo.manifests.architectures import PreRopeTap


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """scores_NLH: retrieval score per document, layer and query head, in [0, 1]. The moments are those of the pre-RoPE queries
    and keys over all documents: query_moment_LHDD = E[q q^T], key_covariance_LKDD = E[k k^T] - E[k] E[k]^T, fp32."""

    scores_NLH: torch.Tensor
    query_moment_LHDD: torch.Tensor
    key_covariance_LKDD: torch.Tensor

    @property
    def scores_LH(self) -> torch.Tensor:
        """Mean over documents."""
        return self.scores_NLH.mean(dim=0)

    def save(self, path: Path) -> None:
        """Write as safetensors; the file appears complete or not at all."""
        write_tensors(path, {name: getattr(self, name) for name in self.__dataclass_fields__})

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Read what `save` wrote."""
        return cls(**load_file(path))


def calibrate(
    checkpoint: Checkpoint,
    documents: Sequence[NeedleDocument],
    *,
    dtype: torch.dtype,
    device: str,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> Calibration:
    """R_h = mean over tokens t of the later needle of sum over tokens j of the earlier needle of A_h(t, j), per document.

    One layer's weights are in memory at a time; all documents' hidden states pass through it before the next is read. Attention
    weights exist only for the needle's rows. `on_layer` is told each finished layer. Source: arXiv 2605.16928 section 3.1.
    """
    embedding = load_embedding(checkpoint, dtype=dtype, device=device)
    rotary = load_rotary(checkpoint, device=device)
    hidden = []
    with torch.inference_mode():
        for document in documents:
            ids = torch.tensor([document.token_ids], device=device)
            hidden.append(embedding(ids).to("cpu"))
        del embedding
        scores, query_moments, key_covariances = [], [], []
        for i, layer in stream_layers(checkpoint, dtype=dtype, device=device, attn_implementation=IMPLEMENTATION):
            probe = _LayerProbe(i)
            holder = SimpleNamespace(model=SimpleNamespace(layers=[layer]))
            with PreRopeTap(holder, checkpoint.architecture) as tap:
                for n, document in enumerate(documents):
                    x = hidden[n].to(device)
                    position_ids = torch.arange(x.shape[1], device=device)[None]
                    probe.document = document
                    out = layer(
                        x,
                        position_embeddings=rotary(x, position_ids),
                        position_ids=position_ids,
                        attention_mask=None,
                        rtpurbo=probe,
                    )
                    hidden[n] = (out[0] if isinstance(out, tuple) else out).to("cpu")
                    probe.add_moments(*tap.pop(i))
            scores.append(torch.stack(probe.scores).cpu())
            query_moment, key_covariance = probe.moments()
            query_moments.append(query_moment.cpu())
            key_covariances.append(key_covariance.cpu())
            on_layer(i)
    return Calibration(
        scores_NLH=torch.stack(scores, dim=1),
        query_moment_LHDD=torch.stack(query_moments),
        key_covariance_LKDD=torch.stack(key_covariances),
    )


class _LayerProbe:
    """Dense attention of one layer that also records needle scores and pre-RoPE moments."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.document: NeedleDocument | None = None
        self.scores: list[torch.Tensor] = []
        self._sums: list[torch.Tensor] | None = None
        self._tokens = 0

    def __call__(self, layer: int, q_BHTD: torch.Tensor, k_BKTD: torch.Tensor, v_BKTD: torch.Tensor, scale: float) -> torch.Tensor:
        assert layer == self.layer
        assert self.document is not None
        self.scores.append(needle_scores(q_BHTD[0], k_BKTD[0], self.document, scale))
        return dense_attention(layer, q_BHTD, k_BKTD, v_BKTD, scale)

    def add_moments(self, q_BTHD: torch.Tensor, k_BTKD: torch.Tensor) -> None:
        q, k = q_BTHD[0].float(), k_BTKD[0].float()
        sums = [torch.einsum("thd,the->hde", q, q), torch.einsum("tkd,tke->kde", k, k), k.sum(dim=0)]
        self._sums = sums if self._sums is None else [a + b for a, b in zip(self._sums, sums, strict=True)]
        self._tokens += q.shape[0]

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._sums is not None
        query, key, mean = (s / self._tokens for s in self._sums)
        return query, key - mean[:, :, None] * mean[:, None, :]


def needle_scores(q_HTD: torch.Tensor, k_KTD: torch.Tensor, document: NeedleDocument, scale: float) -> torch.Tensor:
    """R_h of one document, fp32 [H]; softmax rows only for the later needle's tokens, memory H x needle x T."""
    H, T, _ = q_HTD.shape
    rows = torch.arange(document.later, document.later + document.needle, device=q_HTD.device)
    k_HTD = k_KTD.repeat_interleave(H // k_KTD.shape[0], dim=0)
    logits_HnT = torch.matmul(q_HTD[:, rows], k_HTD.transpose(1, 2)).float() * scale
    future = torch.arange(T, device=q_HTD.device) > rows[:, None]
    attention_HnT = logits_HnT.masked_fill(future, float("-inf")).softmax(dim=-1)
    earlier = attention_HnT[:, :, document.earlier : document.earlier + document.needle]
    return earlier.sum(dim=-1).mean(dim=-1).clamp(0.0, 1.0)


def choose_roles(scores_LH: Sequence[Sequence[float]], recipe: Recipe, group_size: int) -> list[list[int]]:
    """Retrieval query heads per layer, ascending; ranks all layers together, no quota a layer.

    head: the round(ratio * L * H) query heads with the highest scores. group: the round(ratio * L * K) KV groups with the highest
    sum of scores; inside them every head with score >= group_threshold retrieves. Ties go to the lower layer and head.
    Source: arXiv 2605.16928 section 3.1; groups: ours.
    """
    num_heads = len(scores_LH[0])
    if recipe.granularity == "head":
        flat = [(-score, layer, h) for layer, row in enumerate(scores_LH) for h, score in enumerate(row)]
        chosen = [(layer, h) for _, layer, h in sorted(flat)[: round(recipe.retrieval_ratio * len(flat))]]
    else:
        groups = [
            (-sum(row[g * group_size : (g + 1) * group_size]), layer, g)
            for layer, row in enumerate(scores_LH)
            for g in range(num_heads // group_size)
        ]
        chosen = [
            (layer, h)
            for _, layer, g in sorted(groups)[: round(recipe.retrieval_ratio * len(groups))]
            for h in range(g * group_size, (g + 1) * group_size)
            if scores_LH[layer][h] >= recipe.group_threshold
        ]
    roles: list[list[int]] = [[] for _ in scores_LH]
    for layer, h in chosen:
        roles[layer].append(h)
    return [sorted(heads) for heads in roles]


def rank_stability(scores_NLH: torch.Tensor, num_top: int) -> dict[str, float]:
    """How alike the documents rank the heads: mean pairwise Spearman correlation, and mean share of common heads in the top.

    With one document both are 1 by definition. `num_top` is clamped to 1 ... number of heads.
    """
    flat_Nh = scores_NLH.flatten(1).double()
    num_documents, num_heads = flat_Nh.shape
    num_top = max(1, min(num_top, num_heads))
    ranks_Nh = flat_Nh.argsort(dim=1).argsort(dim=1).double()
    tops = [set(row.argsort(descending=True)[:num_top].tolist()) for row in flat_Nh]
    spearman, overlap = [], []
    for a in range(num_documents):
        for b in range(a + 1, num_documents):
            spearman.append(torch.corrcoef(torch.stack([ranks_Nh[a], ranks_Nh[b]]))[0, 1].item())
            overlap.append(len(tops[a] & tops[b]) / num_top)
    mean = (lambda values: sum(values) / len(values)) if spearman else (lambda values: 1.0)
    return {"spearman": round(mean(spearman), 6), "top_overlap": round(mean(overlap), 6), "num_top": num_top}
