"""Stage 2: the sparse model learns from the original's cached top logits; the indexer is frozen, selection carries no gradient."""

# B batch (1)  T tokens  A answer tokens  J top logits  V vocabulary
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rtpurbo.converter.attention import AttentionContext, SparseAttention, SparseSpec, dense_attention
from rtpurbo.converter.data import Document, data_digest
from rtpurbo.converter.indexer import Indexer
from rtpurbo.converter.losses import distillation_kl, mass_on_teacher
from rtpurbo.converter.recipe import Recipe
from rtpurbo.converter.schedule import document_at, learning_rate
from rtpurbo.converter.work import (
    StepLog,
    WorkFolder,
    binding_digest,
    load_training_state,
    readable,
    save_training_state,
    write_tensors,
    write_text,
)
from rtpurbo.manifests.architectures import Architecture, PreRopeTap

_ATTENTION = (".q_proj.", ".k_proj.", ".v_proj.", ".o_proj.", ".q_norm.", ".k_norm.")
_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
# Routers and experts of a mixture keep the teacher's routing and 95 % of the memory: frozen under every choice of `train`.
_FROZEN = (".mlp.gate.", ".mlp.experts.")


@dataclass(frozen=True, kw_only=True)
class TeacherLogits:
    """The original model's top logits where the next token is an answer token: ids int64 [A, J], logits fp32 [A, J]."""

    ids_AJ: torch.Tensor
    logits_AJ: torch.Tensor


def answer_logits(model: Any, document: Document, attention: AttentionContext, dtype: torch.dtype) -> torch.Tensor:
    """Logits [A, V] that predict the answer tokens: those at positions answer_start - 1 ... T - 2 (the logit at t predicts t + 1)."""
    assert document.answer_start is not None
    device = next(model.parameters()).device
    ids = torch.from_numpy(document.token_ids.astype("int64")).to(device)[None]
    num_rows = len(document) - document.answer_start + 1
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        out = model(input_ids=ids, use_cache=False, logits_to_keep=num_rows, rtpurbo=attention)
    return out.logits[0, :-1].float()


def cache_teacher(
    model: Any,
    documents: Sequence[Document],
    folder: Path,
    *,
    top_k: int,
    dtype: torch.dtype,
    inputs: str,
    on_document: Callable[[int], None] = lambda n: None,
) -> None:
    """Write each document's TeacherLogits once, as `{n:05d}.safetensors`; files that are there are kept.

    `inputs` (a digest of the model) and the data are recorded in `teacher.json`; a cache of anything else is refused.
    """
    folder.mkdir(exist_ok=True)
    binding = binding_digest(inputs, data_digest(documents), top_k, str(dtype))
    record = folder / "teacher.json"
    found = WorkFolder(folder).read(record.name)
    if found not in (None, {"binding": binding}):
        raise ValueError(f"{folder}: holds the logits of another model or other data; remove the folder to compute them again")
    write_text(record, json.dumps({"binding": binding}))
    for n, document in enumerate(documents):
        path = folder / f"{n:05d}.safetensors"
        if not path.exists():
            with torch.no_grad():
                logits_AV = answer_logits(model, document, dense_attention, dtype)
            logits, ids = logits_AV.topk(min(top_k, logits_AV.shape[-1]), dim=-1)
            write_tensors(path, {"ids": ids.int().cpu(), "logits": logits.cpu()})
        on_document(n)


def read_teacher(folder: Path, n: int, device: torch.device | str) -> TeacherLogits:
    """TeacherLogits of document n."""
    path = folder / f"{n:05d}.safetensors"
    with readable(path, "compute it again"):
        tensors = load_file(path, device=str(device))
    return TeacherLogits(ids_AJ=tensors["ids"].long(), logits_AJ=tensors["logits"])


def distill(
    model: Any,
    architecture: Architecture,
    spec: SparseSpec,
    indexer: Indexer,
    documents: Sequence[Document],
    teacher: Path,
    recipe: Recipe,
    work: WorkFolder,
    *,
    inputs: str,
    on_step: Callable[[Mapping[str, Any]], None] = lambda record: None,
) -> dict[str, torch.Tensor]:
    """Minimise the mean over answer tokens of KL(teacher's top logits || student), `distill_batch` documents a step, by AdamW.

    Warm-up, then a constant learning rate. Trains fp32 copies of the weights that `recipe.train` names under autocast of
    `recipe.dtype`. State is saved every `checkpoint_every` steps and bound to its inputs. The model is changed in place; returns
    the changed weights by their names in the checkpoint. Source: arXiv 2605.16928 section 4 stage 2.
    """
    device, dtype = next(model.parameters()).device, getattr(torch, recipe.dtype)
    indexer = {name: tensor.to(device) for name, tensor in indexer.items()}
    with trainable_weights(model, recipe) as parameters:
        optimizer = torch.optim.AdamW(list(parameters.values()), lr=recipe.distill_learning_rate, weight_decay=recipe.weight_decay)
        state_path = work.path("distill-state.safetensors")
        binding = binding_digest(inputs, data_digest(documents), recipe.provenance(), "distill")
        first = load_training_state(state_path, parameters, optimizer, binding)
        log = StepLog(work.path("distill.jsonl"), first)
        model.train()
        _recompute_activations(model, True)
        for step in range(first, recipe.distill_steps):
            rate = learning_rate(step, recipe.distill_learning_rate, recipe.distill_warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            losses, masses, tokens = [], [], 0
            for place in range(recipe.distill_batch):
                n = document_at(step * recipe.distill_batch + place, len(documents), recipe.seed)
                answer = read_teacher(teacher, n, device)
                assert documents[n].answer_start is not None
                with PreRopeTap(model, architecture) as tap:
                    attention = SparseAttention(spec, indexer, tap, documents[n].answer_start or 0)
                    logits_AV = answer_logits(model, documents[n], attention, dtype)
                    loss = distillation_kl(logits_AV, answer.ids_AJ, answer.logits_AJ)
                    # Inside the tap: checkpointed layers run again during the backward pass and need its hooks.
                    (loss / recipe.distill_batch).backward()
                losses.append(loss.item())
                masses.append(mass_on_teacher(logits_AV.detach(), answer.ids_AJ).item())
                tokens += logits_AV.shape[0]
            norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), recipe.gradient_clip)
            optimizer.step()
            record = {
                "step": step,
                "loss": round(sum(losses) / len(losses), 6),
                "mass_on_teacher_ids": round(sum(masses) / len(masses), 6),
                "answer_tokens": tokens,
                "gradient_norm": round(norm.item(), 6),
                "learning_rate": rate,
            }
            log.append(record)
            on_step(record)
            if (step + 1) % recipe.checkpoint_every == 0:
                save_training_state(state_path, parameters, optimizer, step + 1, binding)
        _recompute_activations(model, False)
        model.eval()
    return {name: model.get_parameter(name).detach() for name in student_names(model, recipe)}


def _recompute_activations(model: Any, on: bool) -> None:
    """Keep only each layer's input for the backward pass, or everything again; transformers renamed the methods within version 5."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{kind}_checkpointing_disable")()


@contextmanager
def trainable_weights(model: Any, recipe: Recipe) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Freeze everything but what `recipe.train` names and hand it out in fp32; at the end the weights take the model's dtype again.

    all: every weight but routers and experts. attention: projections and q/k norms. lora: rank `lora_rank` factors on the
    projections (peft), scaled by alpha = 2 * rank, merged at the end.
    """
    model.requires_grad_(False)
    if recipe.train == "lora":
        yield from _lora(model, recipe)
        return
    dtypes = {name: model.get_parameter(name).dtype for name in student_names(model, recipe)}
    parameters = {}
    for name in dtypes:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.float()
        parameters[name] = parameter.requires_grad_()
    yield parameters
    model.requires_grad_(False)
    for name, dtype in dtypes.items():
        parameters[name].data = parameters[name].data.to(dtype)


def student_names(model: Any, recipe: Recipe) -> list[str]:
    """Names of the weights that `recipe.train` changes, as in the checkpoint; tied weights appear once."""
    names = [name for name, _ in model.named_parameters() if not any(part in f".{name}" for part in _FROZEN)]
    if recipe.train == "all":
        return names
    if recipe.train == "attention":
        return [name for name in names if any(part in name for part in _ATTENTION)]
    return [name for name in names if name.endswith(".weight") and any(f".{target}." in name for target in _LORA_TARGETS)]


def _lora(model: Any, recipe: Recipe) -> Iterator[dict[str, torch.nn.Parameter]]:
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise ValueError("--train lora needs the package peft: install it with `pip install rtpurbo[lora]`") from error

    torch.manual_seed(recipe.seed)  # peft draws the A factors from the global generator
    config = LoraConfig(r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, target_modules=list(_LORA_TARGETS))
    inject_adapter_in_model(config, model)
    parameters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_()
    yield parameters
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            merged: Any = module
            merged.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, merged.get_base_layer())
    model.requires_grad_(False)
