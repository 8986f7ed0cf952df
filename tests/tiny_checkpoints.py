"""Tiny random checkpoints of the five supported families, written as transformers writes them."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
VOCABULARY = 64
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    # 12 experts, so that the order of numbers is not the order of strings; a dense layer between two sparse ones.
    "qwen3_moe": {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "mlp_only_layers": [1]},
}


def tiny_checkpoint(folder: Path, family: str, *, max_shard_size: str = "1GB", dtype: str = "float32", **changes: Any) -> Path:
    """Save a model with 3 layers of 4 query and 2 KV heads of 16 dimensions into `folder`; `changes` goes over the config."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**shape, **CHANGES.get(family, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    for name, parameter in model.named_parameters():
        # Norms and biases of a fresh model are all ones and zeros; then mixed-up tensors would go unnoticed.
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object on disk; None removes a key."""
    body = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in body.items() if key not in changes or value is not None}))


def rewrite_header(path: Path, edit: Any) -> None:
    """Change the header of a safetensors file in place of its own: edit(header dict), the data stays."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
