"""Artifacts with random weights in the shapes of real models, for the engine's times and memory."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rtpurbo.converter.checkpoint import open_checkpoint
from rtpurbo.converter.package import write_artifact
from rtpurbo.manifests.manifest import BaseModel, Indexer, Manifest, ModelShape, roles_from_heads

SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "head_dim": 64, "vocab_size": 49152, "max_position_embeddings": 65536, "tie_word_embeddings": True,
}  # fmt: skip
# Two layers of Qwen3-Coder-30B-A3B: its widths, heads and experts.
QWEN3_30B = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 262144, "tie_word_embeddings": False, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
}  # fmt: skip


def shapes() -> dict[str, tuple[str, dict[str, Any], list[list[int]], int]]:
    """Name -> (family, config, retrieval heads a layer, window): SmolLM2's roles sit in its later layers, as measured ones do."""
    later = [[0, 1, 2] if layer in range(17, 26) else [] for layer in range(30)]
    return {
        "smollm2": ("llama", SMOLLM2, later, 512),
        "qwen3-30b-slice": ("qwen3_moe", QWEN3_30B, [[0, 1, 2, 3, 4], list(range(8))], 8192),
    }


def write_shape(name: str, folder: Path) -> Path:
    """The artifact of a shape at `folder / name`, with peaked queries and keys so that a selection keeps part of the blocks."""
    family, values, retrieval, window = shapes()[name]
    torch.manual_seed(0)
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = CONFIG_MAPPING[family](**{**values, **special, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for key, parameter in model.named_parameters():
        if "q_proj" in key or "q_norm" in key:
            parameter.data *= 4
    made = folder / f"{name}-checkpoint"
    model.save_pretrained(made)
    text = (made / "config.json").read_text()
    (made / "config.json").write_text(text.replace('"num_local_experts"', '"num_experts"'))
    del model
    heads, groups = values["num_attention_heads"], values["num_key_value_heads"]
    manifest = Manifest(
        base_model=BaseModel(id=name, revision=None, config_sha256="0" * 64, tokenizer_sha256=None),
        model=ModelShape(
            model_type=family, **{key: values[key] for key in (field.name for field in dataclasses.fields(ModelShape)) if key in values}
        ),
        granularity="head", group_threshold=0.0, layers=roles_from_heads([[0.5] * heads] * len(retrieval), retrieval, heads // groups),
        sliding_window=window, sinks=4, indexer=Indexer(dim=16, keys="head", scale=values["head_dim"] ** -0.5), top_p=0.9,
        decode_block=64, prefill_block=128, prefill_pattern="dense", dense_below=0,
    )  # fmt: skip
    indexer = {key: torch.randn(shape) * 2 / shape[2] ** 0.5 for key, shape in manifest.index_shapes().items()}
    checkpoint = open_checkpoint(str(made), work=folder / f"{name}-work")
    write_artifact(folder / name, checkpoint, manifest, indexer=indexer, student={}, recipe_toml="", metrics={})
    return folder / name
