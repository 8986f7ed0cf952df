"""Stage 1: train the indexer so that its softmax follows the full attention of each retrieval head; the model is frozen."""

# B batch (1)  T tokens  H retrieval query heads  D head dim
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rtpurbo.converter.attention import SparseSpec, dense_attention, index_projections
from rtpurbo.converter.data import Document, data_digest
from rtpurbo.converter.indexer import Indexer
from rtpurbo.converter.losses import indexer_kl
from rtpurbo.converter.recipe import Recipe
from rtpurbo.converter.schedule import document_at, learning_rate
from rtpurbo.converter.work import StepLog, WorkFolder, binding_digest, load_training_state, save_training_state
from rtpurbo.manifests.architectures import Architecture, PreRopeTap


def align(
    model: Any,
    architecture: Architecture,
    spec: SparseSpec,
    initial: Indexer,
    documents: Sequence[Document],
    recipe: Recipe,
    work: WorkFolder,
    *,
    stage: str = "indexer",
    inputs: str,
    on_step: Callable[[Mapping[str, Any]], None] = lambda record: None,
) -> Indexer:
    """Minimise sum over retrieval heads of KL(full attention || indexer), one document a step, by AdamW.

    Learning rate: warm-up, then cosine to zero; weight decay and gradient clip from the recipe. State is saved every
    `checkpoint_every` steps as `{stage}-state.safetensors` and bound to `inputs` (a digest of the model) and the data; steps are logged
    to `{stage}.jsonl` without wall-clock times. Returns the trained indexer on the CPU, fp32. Source: arXiv 2605.16928 section 4.
    """
    device = next(model.parameters()).device
    parameters = {name: tensor.to(device, torch.float32).clone().requires_grad_() for name, tensor in initial.items()}
    if not parameters or recipe.indexer_steps == 0:
        return {name: tensor.detach().cpu() for name, tensor in parameters.items()}
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=recipe.indexer_learning_rate, weight_decay=recipe.weight_decay)
    state_path = work.path(f"{stage}-state.safetensors")
    binding = binding_digest(inputs, data_digest(documents), recipe.provenance())
    first = load_training_state(state_path, parameters, optimizer, binding)
    log = StepLog(work.path(f"{stage}.jsonl"), first)
    for step in range(first, recipe.indexer_steps):
        rate = learning_rate(step, recipe.indexer_learning_rate, recipe.indexer_warmup, cosine_steps=recipe.indexer_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        document = documents[document_at(step, len(documents), recipe.seed)]
        optimizer.zero_grad(set_to_none=True)
        losses_H = indexer_gradients(model, architecture, spec, parameters, document)
        norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), recipe.gradient_clip)
        optimizer.step()
        record = {
            "step": step,
            "document": document.key,
            "tokens": len(document),
            "kl": round(losses_H.mean().item(), 6),
            "kl_worst_head": round(losses_H.max().item(), 6),
            "gradient_norm": round(norm.item(), 6),
            "learning_rate": rate,
        }
        log.append(record)
        on_step(record)
        if (step + 1) % recipe.checkpoint_every == 0:
            save_training_state(state_path, parameters, optimizer, step + 1, binding)
    return {name: parameter.detach().cpu() for name, parameter in parameters.items()}


def indexer_gradients(model: Any, architecture: Architecture, spec: SparseSpec, parameters: Indexer, document: Document) -> torch.Tensor:
    """Add one document's gradients to `parameters` and return the KL of every retrieval head, fp32, layer by layer.

    Each layer's loss is differentiated as soon as its queries and keys exist, so nothing but the running hidden state is kept.
    """
    device = next(model.parameters()).device
    losses: list[torch.Tensor] = []

    def attend(layer: int, q_BHTD: torch.Tensor, k_BKTD: torch.Tensor, v_BKTD: torch.Tensor, scale: float) -> torch.Tensor:
        q_pre_BTHD, k_pre_BTKD = tap.pop(layer)
        heads = list(spec.retrieval_heads[layer])
        if heads:
            kv = [h // (q_BHTD.shape[1] // k_BKTD.shape[1]) for h in heads]
            key_sets = list(spec.key_sets[layer])
            with torch.enable_grad():
                index_q, index_k = index_projections(parameters, layer, q_pre_BTHD, k_pre_BTKD, heads, kv, key_sets)
                loss_H = indexer_kl(
                    index_q[0].transpose(0, 1),
                    index_k[0].transpose(0, 1)[key_sets],
                    q_BHTD[0, heads],
                    k_BKTD[0, kv],
                    scale=scale,
                    index_scale=spec.index_scale,
                )
                loss_H.sum().backward()
            losses.append(loss_H.detach())
        return dense_attention(layer, q_BHTD, k_BKTD, v_BKTD, scale)

    with torch.no_grad(), PreRopeTap(model, architecture) as tap:
        ids = torch.from_numpy(document.token_ids.astype("int64")).to(device)[None]
        model.model(input_ids=ids, use_cache=False, rtpurbo=attend)
    return torch.cat(losses)
