"""Modules with weights from a checkpoint: the whole model, or one decoder layer at a time for models larger than the memory."""

import copy
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rtpurbo.converter.quiet import quiet_transformers
from rtpurbo.converter.safetensors_format import read_tensor
from rtpurbo.converter.shards import EMBEDDING, Checkpoint, transformers_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(checkpoint: Checkpoint, *, dtype: torch.dtype, device: str, attn_implementation: str) -> "PreTrainedModel":
    """The whole model in eval mode, built from checkpoint.config, which may differ from the folder's (RoPE scaling).

    ValueError before anything is read when the device has less free memory than the weights in `dtype` plus one layer
    (transformers fuses the experts of a layer in a copy), and when transformers misses or does not know a tensor.
    """
    _check_memory(checkpoint, dtype, device)
    # With accelerate, transformers puts every tensor on the device as it is read; without, the CPU holds the model once.
    direct = torch.device(device).type != "cpu" and importlib.util.find_spec("accelerate") is not None
    load: Any = _model_class(checkpoint).from_pretrained
    with quiet_transformers():
        model, info = load(
            checkpoint.folder,
            config=_config(checkpoint, attn_implementation),
            dtype=dtype,
            attn_implementation=attn_implementation,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **({"device_map": {"": device}} if direct else {}),
        )
    _check_loaded(str(checkpoint.folder), info)
    return model.to(device).eval()


def stream_layers(checkpoint: Checkpoint, *, dtype: torch.dtype, device: str, attn_implementation: str) -> Iterator[tuple[int, nn.Module]]:
    """(index, decoder layer) for every layer in turn, in eval mode, read when the iterator reaches it.

    A layer is called as the model calls it: layer(hidden, position_embeddings=rotary(hidden, position_ids), attention_mask=...),
    with load_rotary for `rotary`. Memory: one layer, twice for a mixture of experts while its experts are fused, as long as the
    caller keeps no reference to the layers before. A layer knows its own index and the whole model's config.
    """
    full = _config(checkpoint, attn_implementation)
    for index in range(full.num_hidden_layers):
        yield index, _load_layer(checkpoint, full, index, dtype, device)


def load_embedding(checkpoint: Checkpoint, *, dtype: torch.dtype, device: str) -> nn.Embedding:
    """The token embedding [vocabulary, hidden], in eval mode."""
    weight = read_tensor(checkpoint.tensors[EMBEDDING]).to(device=device, dtype=dtype)
    return nn.Embedding.from_pretrained(weight, freeze=False).eval()


def load_rotary(checkpoint: Checkpoint, *, device: str) -> nn.Module:
    """The model's own rotary module: (hidden, position_ids [B, T]) -> cos, sin [B, T, D], scaling factors included."""
    config = _config(checkpoint, "eager")
    with torch.device("meta"):
        empty = _model_class(checkpoint)(_with(config, _one_layer(config, 0)))
    return type(empty.model.rotary_emb)(config=config).to(device).eval()


def available_memory_bytes(device: str = "cpu") -> int:
    """Bytes that can be allocated now: free memory of a CUDA device, or of the host within the limit of its control group."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) << 10
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # File pages that nobody used lately are given back under pressure.
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
        available = min(available, max(0, int(text) - used))
    return available


def _config(checkpoint: Checkpoint, attn_implementation: str) -> Any:
    config = transformers_config(checkpoint.config, checkpoint.id)
    config._attn_implementation = attn_implementation
    return config


def _model_class(checkpoint: Checkpoint) -> Any:
    import transformers

    return getattr(transformers, checkpoint.architecture.class_name)


def _check_memory(checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> None:
    sizes: dict[str, int] = {}
    for name, info in checkpoint.tensors.items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        sizes[layer] = sizes.get(layer, 0) + info.nbytes // info.dtype.itemsize * dtype.itemsize
    needed = sum(sizes.values()) + max(size for layer, size in sizes.items() if layer)
    available = available_memory_bytes(device)
    if needed > available:
        raise ValueError(
            f"{checkpoint.id}: needs {needed} bytes ({needed / 2**30:.1f} GiB) in {dtype} on {device}, "
            f"available are {available} bytes ({available / 2**30:.1f} GiB)"
        )


def _check_loaded(source: str, info: dict[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = sorted(str(key) for key in info.get(kind) or () if not str(key).endswith("rotary_emb.inv_freq"))
        if found:
            raise ValueError(f"{source}: transformers reports {len(found)} {kind.replace('_', ' ')}, the first is {found[0]}")


def _is_sparse(config: Any, index: int) -> bool:
    """Whether layer `index` of a mixture of experts has experts (transformers' rule)."""
    return index not in config.mlp_only_layers and (index + 1) % config.decoder_sparse_step == 0


def _one_layer(full: Any, index: int) -> dict[str, Any]:
    """What differs in the config of a model that has only layer `index`, and one word."""
    changes: dict[str, Any] = {"num_hidden_layers": 1, "vocab_size": 1, "pad_token_id": None, "tie_word_embeddings": True}
    if getattr(full, "layer_types", None):
        changes["layer_types"] = full.layer_types[index : index + 1]
    if hasattr(full, "mlp_only_layers"):
        changes |= {"mlp_only_layers": [] if _is_sparse(full, index) else [0], "decoder_sparse_step": 1}
    return changes


def _with(config: Any, changes: dict[str, Any]) -> Any:
    changed = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(changed, key, value)
    return changed


def _load_layer(checkpoint: Checkpoint, full: Any, index: int, dtype: torch.dtype, device: str) -> nn.Module:
    prefix = f"model.layers.{index}."
    changes = _one_layer(full, index)
    state = {
        f"model.layers.0.{name.removeprefix(prefix)}": read_tensor(info)
        for name, info in checkpoint.tensors.items()
        if name.startswith(prefix)
    }
    state[EMBEDDING] = torch.zeros(1, full.hidden_size, dtype=dtype)
    state["model.norm.weight"] = torch.ones(full.hidden_size, dtype=dtype)
    # transformers itself names and fuses the tensors, so its models may change their layout without a change here.
    load: Any = _model_class(checkpoint).from_pretrained
    with quiet_transformers():
        model, info = load(
            None,
            config=_with(full, changes),
            state_dict=state,
            dtype=dtype,
            attn_implementation=full._attn_implementation,
            output_loading_info=True,
        )
    state.clear()
    _check_loaded(f"{checkpoint.folder}, layer {index}", info)
    layer = model.model.layers[0]
    layer.self_attn.layer_idx = index
    for key in changes:
        setattr(layer.self_attn.config, key, getattr(full, key))
    return layer.to(device).eval()
