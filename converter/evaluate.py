"""Held-out measurements: what the indexer keeps, and how the sparse model compares with the original."""

# B batch (1)  A answer tokens  T tokens  n sampled rows  H retrieval query heads  D head dim
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rtpurbo.converter.attention import AttentionContext, SparseAttention, SparseSpec, dense_attention, index_projections
from rtpurbo.converter.data import Document
from rtpurbo.converter.distill import answer_logits, read_teacher
from rtpurbo.converter.indexer import Indexer
from rtpurbo.converter.losses import distillation_kl, mass_on_teacher
from rtpurbo.converter.needle import NeedleQuestion
from rtpurbo.kernels.block_scores.reference import block_scores
from rtpurbo.kernels.block_selection import select_blocks
from rtpurbo.manifests.architectures import Architecture, PreRopeTap

TOKEN_BUDGET = 0.05
_ROWS = 64


def evaluate_indexers(
    model: Any, architecture: Architecture, spec: SparseSpec, indexers: Mapping[str, Indexer], documents: Sequence[Document]
) -> dict[str, dict[str, Any]]:
    """For each named indexer, and the oracle (the attention itself), on 64 query rows in the second half of each document:

    kl, kl_without_sinks: KL(attention || indexer), nats; mass_5_percent(_without_sinks): true attention mass on the 5 % of tokens
    that the indexer ranks first; top_p_mass, top_p_tokens: true mass kept, and share of tokens read, by the real block selection.
    Each is a mean over rows, documents and heads; `heads` lists the six in this order for each "layer.head".
    """
    device = next(model.parameters()).device
    moved = {name: {k: v.to(device) for k, v in indexer.items()} for name, indexer in indexers.items()}
    rows: dict[str, dict[str, list[list[float]]]] = {name: defaultdict(list) for name in (*indexers, "oracle")}

    def attend(layer: int, q_BHTD: torch.Tensor, k_BKTD: torch.Tensor, v_BKTD: torch.Tensor, scale: float) -> torch.Tensor:
        q_pre, k_pre = tap.pop(layer)
        heads = list(spec.retrieval_heads[layer])
        if heads:
            T = q_BHTD.shape[2]
            row_n = torch.linspace(T // 2, T - 1, min(_ROWS, T - T // 2), device=device).long()
            kv = [h // (q_BHTD.shape[1] // k_BKTD.shape[1]) for h in heads]
            future = torch.arange(T, device=device) > row_n[:, None]
            logits = torch.matmul(q_BHTD[0, heads][:, row_n].float(), k_BKTD[0, kv].float().transpose(1, 2)) * scale
            full = logits.masked_fill(future, float("-inf")).log_softmax(dim=-1)
            for name in rows:
                if name == "oracle":
                    index, selected = full, _nucleus(full, spec.top_p)
                else:
                    index_q, index_k = index_projections(moved[name], layer, q_pre[:, row_n], k_pre, heads, kv, list(spec.key_sets[layer]))
                    key_set_H = torch.tensor(spec.key_sets[layer], device=device)
                    maxima, sums = block_scores(index_q, index_k, key_set_H, row_n[None] + 1, spec.index_scale, spec.block_size)
                    blocks = select_blocks(maxima, sums, top_p=spec.top_p, sinks=spec.sinks, block_size=spec.block_size)
                    selected = blocks[0][..., torch.arange(T, device=device) // spec.block_size] & ~future
                    keys = index_k[0].transpose(0, 1)[key_set_H]
                    index = torch.matmul(index_q[0].transpose(0, 1), keys.transpose(1, 2)) * spec.index_scale
                    index = index.masked_fill(future, float("-inf")).log_softmax(dim=-1)
                measures = _measure(full, index, selected, row_n, spec.sinks)
                for n, h in enumerate(heads):
                    rows[name][f"{layer}.{h}"].append([m[n].item() for m in measures])
        return dense_attention(layer, q_BHTD, k_BKTD, v_BKTD, scale)

    with torch.no_grad(), PreRopeTap(model, architecture) as tap:
        for document in documents:
            ids = torch.from_numpy(document.token_ids.astype("int64")).to(device)[None]
            model.model(input_ids=ids, use_cache=False, rtpurbo=attend)
    return {name: _summary(by_head) for name, by_head in rows.items()}


_MEASURES = ("kl", "kl_without_sinks", "mass_5_percent", "mass_5_percent_without_sinks", "top_p_mass", "top_p_tokens")


def _measure(full: torch.Tensor, index: torch.Tensor, selected: torch.Tensor, row_n: torch.Tensor, sinks: int) -> list[torch.Tensor]:
    """The six measures per head [H], from log-softmax rows [H, n, T]."""
    future = torch.arange(full.shape[-1], device=full.device) > row_n[:, None]
    is_sink = torch.arange(full.shape[-1], device=full.device) < sinks
    bare_full = full.masked_fill(is_sink, float("-inf")).log_softmax(dim=-1)
    bare_index = index.masked_fill(is_sink, float("-inf")).log_softmax(dim=-1)
    measures = [_kl(full, index, future), _kl(bare_full, bare_index, future | is_sink)]
    for a_full, a_index, hidden in ((full, index, future), (bare_full, bare_index, future | is_sink)):
        budget_n = torch.ceil(TOKEN_BUDGET * (~hidden).sum(dim=-1)).long()
        order = a_index.argsort(dim=-1, descending=True)
        mass = a_full.exp().gather(-1, order).cumsum(dim=-1)
        last = (budget_n - 1).clamp_min(0)[None, :, None].expand(mass.shape[0], -1, 1)
        measures.append(mass.gather(-1, last)[..., 0].mean(dim=-1))
    measures.append((full.exp() * selected).sum(dim=-1).mean(dim=-1))
    measures.append((selected.sum(dim=-1) / (row_n + 1)).mean(dim=-1))
    return measures


def _nucleus(full: torch.Tensor, top_p: float) -> torch.Tensor:
    """The fewest tokens whose true mass reaches top_p: what a perfect indexer without blocks would keep."""
    order = full.argsort(dim=-1, descending=True)
    mass = full.exp().gather(-1, order)
    return torch.zeros_like(full, dtype=torch.bool).scatter(-1, order, mass.cumsum(dim=-1) - mass < top_p)


def _kl(full: torch.Tensor, index: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    return (full.exp() * (full - index).masked_fill(hidden, 0.0)).sum(dim=-1).mean(dim=-1)


def _summary(by_head: Mapping[str, list[list[float]]]) -> dict[str, Any]:
    per_head = {head: torch.tensor(values, dtype=torch.float64).mean(dim=0) for head, values in by_head.items()}
    if not per_head:
        return {}
    mean = torch.stack(list(per_head.values())).mean(dim=0)
    summary: dict[str, Any] = {name: round(value, 5) for name, value in zip(_MEASURES, mean.tolist(), strict=True)}
    summary["heads"] = {head: [round(value, 5) for value in values.tolist()] for head, values in per_head.items()}
    return summary


def evaluate_model(
    model: Any,
    architecture: Architecture,
    spec: SparseSpec | None,
    indexer: Indexer,
    documents: Sequence[Document],
    teacher: Path,
    questions: Sequence[NeedleQuestion],
    dtype: torch.dtype,
) -> dict[str, float]:
    """Held-out quality of the model, sparse with `spec` or dense without.

    distillation_loss: KL on the teacher's top logits; mass_on_teacher_ids; perplexity: exp(mean negative log likelihood) of the answer
    tokens (decode pattern); needle_accuracy: share of questions whose every answer token is the arg-max given the ones before it,
    which is exact match of greedy decoding. NaN never passes: a non-finite value is an error of ours.
    """
    device = next(model.parameters()).device
    indexer = {name: tensor.to(device) for name, tensor in indexer.items()}
    losses, masses, log_likelihoods, hits = [], [], [], []
    with torch.no_grad():
        for n, document in enumerate(documents):
            logits_AV = _logits(model, architecture, spec, indexer, document, dtype)
            answer = read_teacher(teacher, n, device)
            losses.append(distillation_kl(logits_AV, answer.ids_AJ, answer.logits_AJ).item())
            masses.append(mass_on_teacher(logits_AV, answer.ids_AJ).item())
            targets = torch.from_numpy(document.token_ids[document.answer_start :].astype("int64")).to(device)
            log_likelihoods.append(logits_AV.log_softmax(dim=-1).gather(-1, targets[:, None]).mean().item())
        for question in questions:
            document = _question_document(question)
            predicted = _logits(model, architecture, spec, indexer, document, dtype).argmax(dim=-1).tolist()
            hits.append(predicted == list(question.answer))
    result = {
        "distillation_loss": _mean(losses),
        "mass_on_teacher_ids": _mean(masses),
        "perplexity": math.exp(-_mean(log_likelihoods)),
    }
    if hits:
        result["needle_accuracy"] = _mean([float(hit) for hit in hits])
    assert all(math.isfinite(value) for value in result.values()), result
    return {name: round(value, 5) for name, value in result.items()}


def _logits(
    model: Any, architecture: Architecture, spec: SparseSpec | None, indexer: Indexer, document: Document, dtype: torch.dtype
) -> torch.Tensor:
    if spec is None:
        return answer_logits(model, document, dense_attention, dtype)
    with PreRopeTap(model, architecture) as tap:
        assert document.answer_start is not None
        attention: AttentionContext = SparseAttention(spec, indexer, tap, document.answer_start)
        return answer_logits(model, document, attention, dtype)


def routing_choices(
    model: Any,
    architecture: Architecture,
    spec: SparseSpec | None,
    indexer: Indexer,
    documents: Sequence[Document],
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Experts chosen for every answer token, bool [answer tokens, experts], by "document.layer"; empty for models without routers."""
    if architecture.num_experts_key is None:
        return {}
    device = next(model.parameters()).device
    indexer = {name: tensor.to(device) for name, tensor in indexer.items()}
    choices: dict[str, torch.Tensor] = {}
    for n, document in enumerate(documents):
        num_answers = len(document) - (document.answer_start or 0)

        def keep(key: str, num_answers: int = num_answers) -> Any:
            def hook(module: Any, _inputs: Any, output: Any) -> None:
                # The router returns (logits, weights of the chosen experts, their indices).
                indices = output[2]
                chosen = torch.zeros(indices.shape[0], module.num_experts, dtype=torch.bool, device=indices.device)
                choices[key] = chosen.scatter(1, indices, True)[-num_answers:].cpu()

            return hook

        gates = [(i, layer.mlp.gate) for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "gate")]
        handles = [gate.register_forward_hook(keep(f"{n}.{i}")) for i, gate in gates]
        try:
            with torch.no_grad():
                _logits(model, architecture, spec, indexer, document, dtype)
        finally:
            for handle in handles:
                handle.remove()
    return choices


def routing_agreement(teacher: Mapping[str, torch.Tensor], student: Mapping[str, torch.Tensor]) -> float:
    """Mean share of the teacher's experts that the student chooses too, over answer tokens and layers; in [0, 1]."""
    shared = sum((teacher[key] & student[key]).sum().item() for key in teacher)
    return round(shared / sum(chosen.sum().item() for chosen in teacher.values()), 5)


def _question_document(question: NeedleQuestion) -> Document:
    ids = np.array(question.prompt + question.answer, dtype=np.int32)
    return Document(token_ids=ids, answer_start=len(question.prompt), key="needle")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
