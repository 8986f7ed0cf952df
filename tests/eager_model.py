"""An independent definition of a converted model: one whole forward pass with explicit N x N masks per head, no cache.

It shares no code with runtime/ or kernels/: masks come from position matrices, index queries and keys are recomputed from the
attention modules' inputs, and blocks are selected by plain loops in fp64. It also writes tiny artifacts for the tests.
"""

# N tokens  H query heads  D head dim
import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rtpurbo.manifests.manifest import (
    INDEXER_NAME,
    MANIFEST_NAME,
    BaseModel,
    Indexer,
    Manifest,
    ModelShape,
    file_digest,
    roles_from_heads,
)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
VOCABULARY = 101
# Index logits reach 50; fp32 sums in another order differ by this much (about 10 roundings of that size).
SCORE_ROUNDING = 5e-5


@dataclass
class EagerTrace:
    """What decode queries selected, and what another implementation did.

    blocks: (kept, visible) of each layer, retrieval head and decode query. other: (layer, head, position) -> blocks that the
    implementation under test kept. Where rounding decides on which side of a bin's edge a block falls, its choice is adopted, so
    that logits can be compared; `adopted` counts those. Every other difference stays and shows in the logits.
    """

    blocks: list[tuple[int, int]] = field(default_factory=list)
    other: dict[tuple[int, int, int], set[int]] = field(default_factory=dict)
    adopted: int = 0

    @property
    def kept_share(self) -> float:
        return sum(k for k, _ in self.blocks) / sum(n for _, n in self.blocks)


def eager_logits(
    folder: Path, manifest: Manifest, token_ids: list[int], prompt: int, *, dense: bool = False, trace: EagerTrace | None = None
) -> torch.Tensor:
    """Logits [N, V] of one sequence whose first `prompt` tokens follow the prefill pattern, the others the decode pattern."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager_masks", dtype=torch.float32)
    index = load_file(folder / INDEXER_NAME) if (folder / INDEXER_NAME).exists() else {}
    inputs: dict[int, torch.Tensor] = {}

    def remember(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[module.layer_idx] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(remember, with_kwargs=True)
    job = {"manifest": manifest, "index": index, "inputs": inputs, "prompt": prompt, "dense": dense, "trace": trace}
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([token_ids]), use_cache=False, eager_masks=job).logits[0]


def _attend(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _mask: Any, *, scaling: float, **kwargs: Any) -> Any:
    job = kwargs["eager_masks"]
    visible_HNN = _visible(module, job, q.shape[2])
    group = q.shape[1] // k.shape[1]
    logits_HNN = (q[0] @ k[0].repeat_interleave(group, 0).transpose(1, 2)) * scaling
    logits_HNN = logits_HNN.masked_fill(~visible_HNN, -torch.inf)
    out_HND = torch.softmax(logits_HNN, dim=-1) @ v[0].repeat_interleave(group, 0)
    return out_HND.transpose(0, 1)[None], None


AttentionInterface.register("eager_masks", _attend)


def _visible(module: Any, job: dict[str, Any], tokens: int) -> torch.Tensor:
    manifest: Manifest = job["manifest"]
    layer, shape = module.layer_idx, manifest.model
    i, j = np.arange(tokens)[:, None], np.arange(tokens)[None, :]
    causal = j <= i
    local = causal & ((i - j < manifest.sliding_window) | (j < manifest.sinks))
    roles = manifest.layers[layer]
    masks = []
    for head in range(shape.num_attention_heads):
        if job["dense"]:
            masks.append(causal)
        elif head in roles.retrieval_heads:
            masks.append(causal & _selected(module, job, head, tokens) if manifest.top_p < 1 else causal)
        else:
            masks.append(local)
    return torch.from_numpy(np.stack(masks))


def _selected(module: Any, job: dict[str, Any], head: int, tokens: int) -> np.ndarray:
    """Bool [N, N]: keys whose block the head selects; all of them for queries of the prompt."""
    manifest: Manifest = job["manifest"]
    layer, block = module.layer_idx, manifest.decode_block
    query, key = _index_vectors(module, job, head)
    selected = np.ones((tokens, tokens), dtype=bool)
    for i in range(job["prompt"], tokens):
        scores = key[: i + 1] @ query[i] * manifest.indexer.scale
        kept = histogram_selection(scores, block, manifest.top_p, manifest.sinks)
        if job["trace"] is not None:
            kept = _adopt(job["trace"], (layer, head, i), kept, scores, manifest)
            job["trace"].blocks.append((len(kept), -(-(i + 1) // block)))
        selected[i] = np.isin(np.arange(tokens) // block, sorted(kept))
    return selected


def _adopt(trace: EagerTrace, key: tuple[int, int, int], kept: set[int], scores: np.ndarray, manifest: Manifest) -> set[int]:
    """The other implementation's blocks if moving scores by rounding errors, one way or the other, leads to them."""
    other = trace.other.get(key, kept)
    if other == kept:
        return kept
    block, rng = manifest.decode_block, np.random.default_rng(0)
    for _ in range(64):
        moved = scores + rng.choice([-SCORE_ROUNDING, SCORE_ROUNDING], size=scores.shape)
        if histogram_selection(moved, block, manifest.top_p, manifest.sinks) == other:
            trace.adopted += 1
            return other
    return kept


def histogram_selection(scores: np.ndarray, block: int, top_p: float, sinks: int) -> set[int]:
    """Blocks by the normative rule: whole bins of 1/8 nat of the block maxima, forced blocks first, fixed-point masses."""
    blocks = [scores[start : start + block] for start in range(0, len(scores), block)]
    top = max(b.max() for b in blocks)
    mass = [round(2**32 * math.exp(b.max() - top) * float(np.exp(b - b.max()).sum())) for b in blocks]
    bins = [min(255, math.floor(8 * (top - b.max()))) for b in blocks]
    needed = math.ceil(top_p * sum(mass))
    kept = {n for n in range(len(blocks)) if n * block < sinks or n >= len(blocks) - 2}
    for bin_ in range(256):
        if sum(mass[n] for n in kept) >= needed:
            break
        kept |= {n for n in range(len(blocks)) if bins[n] == bin_}
    return kept


def _index_vectors(module: Any, job: dict[str, Any], head: int) -> tuple[np.ndarray, np.ndarray]:
    """Index queries and keys [N, R] of a head in fp64, from the attention module's input."""
    manifest: Manifest = job["manifest"]
    layer, dim, group = module.layer_idx, module.head_dim, head // manifest.model.group_size
    roles, hidden = manifest.layers[layer], job["inputs"][layer][0]
    q_ND = linear(hidden, module.q_proj.weight, module.q_proj.bias)[:, head * dim : (head + 1) * dim]
    k_ND = linear(hidden, module.k_proj.weight, module.k_proj.bias)[:, group * dim : (group + 1) * dim]
    if hasattr(module, "q_norm"):
        q_ND, k_ND = module.q_norm(q_ND), module.k_norm(k_ND)
    row = roles.retrieval_heads.index(head)
    key_row = row if manifest.indexer.keys == "head" else roles.retained_groups.index(group)
    query = q_ND.double() @ job["index"][f"layers.{layer}.index_q"][row].double().T
    key = k_ND.double() @ job["index"][f"layers.{layer}.index_k"][key_row].double().T
    return query.numpy(), key.to(getattr(torch, manifest.indexer.key_dtype)).double().numpy()


def tiny_config(family: str, *, heads: int = 8, groups: int = 2, head_dim: int = 16, layers: int = 3, **changes: Any) -> Any:
    """A config of the family with hidden size 48 (not heads * head_dim) and vocabulary 101."""
    values: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "mistral":
        values["sliding_window"] = None
    if family == "qwen3_moe":
        values |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    return CONFIG_MAPPING[family](**(values | changes))


def save_artifact(
    folder: Path,
    config: PretrainedConfig,
    retrieval: list[list[int]],
    *,
    seed: int = 0,
    keys: str = "head",
    key_dtype: str = "float32",
    index_dim: int = 4,
    peak: float = 4.0,
    index_peak: float = 12.0,
    **fields: Any,
) -> Manifest:
    """Write a tiny random model with peaked attention, a peaked indexer and a manifest; `fields` replace manifest fields.

    peak and index_peak are the standard deviations that attention logits (before RoPE) and index logits are scaled to.
    """
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif name.endswith("proj.weight") or "experts" in name:
            torch.nn.init.normal_(parameter, std=1.0 / math.sqrt(parameter.shape[-1]))
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.3)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    shape = _shape_of(config, model)
    manifest = Manifest(
        **{
            "base_model": BaseModel(id="tiny", revision=None, config_sha256="0" * 64, tokenizer_sha256=None),
            "model": shape,
            "granularity": "head",
            "group_threshold": 0.0,
            "layers": roles_from_heads([[0.5] * shape.num_attention_heads] * len(retrieval), retrieval, shape.group_size),
            "sliding_window": 32,
            "sinks": 4,
            "indexer": Indexer(dim=index_dim, keys=keys, scale=0.25, key_dtype=key_dtype),  # pyright: ignore[reportArgumentType]
            "top_p": 0.9,
            "decode_block": 16,
            "prefill_block": 32,
            "prefill_pattern": "dense",
            "dense_below": 0,
            **fields,
        }
    )
    index = _peaked_weights(model, manifest, peak, index_peak)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    # transformers 5 writes num_experts as num_local_experts; checkpoints on the Hub, and artifacts, have the former.
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"num_local_experts"', '"num_experts"'))
    if index:
        save_file(index, folder / INDEXER_NAME)
    return write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest with the digests of the files that are there now."""
    names = sorted(p.name for p in folder.iterdir() if p.name != MANIFEST_NAME)
    manifest = dataclasses.replace(manifest, files={name: file_digest(folder / name) for name in names})
    manifest.save(folder / MANIFEST_NAME)
    return manifest


def _shape_of(config: Any, model: Any) -> ModelShape:
    return ModelShape(
        model_type=config.model_type,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=model.model.layers[0].self_attn.head_dim,
        max_position_embeddings=config.max_position_embeddings,
    )


def _peaked_weights(model: Any, manifest: Manifest, peak: float, index_peak: float) -> dict[str, torch.Tensor]:
    """Scale queries until attention logits have std `peak`, and correlated index weights until theirs have `index_peak`."""
    index = {name: torch.randn(shape) for name, shape in manifest.index_shapes().items()}
    inputs: dict[int, torch.Tensor] = {}
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.update({module.layer_idx: kwargs["hidden_states"]}), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    tokens = torch.randint(VOCABULARY, (1, 64))
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        with torch.no_grad():
            model(input_ids=tokens)
            hidden, dim = inputs[i][0], attention.head_dim
            q = linear(hidden, attention.q_proj.weight, attention.q_proj.bias).unflatten(-1, (-1, dim))
            k = linear(hidden, attention.k_proj.weight, attention.k_proj.bias).unflatten(-1, (-1, dim))
            if hasattr(attention, "q_norm"):
                q, k = attention.q_norm(q), attention.k_norm(k)
            group = manifest.model.group_size
            logits = torch.einsum("thd,shd->hts", q, k.repeat_interleave(group, 1)) * attention.scaling
            factor = peak / float(logits.std())
            if hasattr(attention, "q_norm"):
                attention.q_norm.weight *= factor
            else:
                attention.q_proj.weight *= factor
                if attention.q_proj.bias is not None:
                    attention.q_proj.bias *= factor
            for row, head in enumerate(manifest.layers[i].retrieval_heads):
                key_row = manifest.key_sets(i)[row]
                index_q, index_k = index[f"layers.{i}.index_q"], index[f"layers.{i}.index_k"]
                index_q[row] = index_k[key_row] + 0.3 * index_q[row]
                scores = (q[:, head] * factor @ index_q[row].T) @ (k[:, head // group] @ index_k[key_row].T).T
                index_q[row] *= index_peak / float(scores.std() * manifest.indexer.scale)
    for handle in handles:
        handle.remove()
    return index
