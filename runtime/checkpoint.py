"""Reading a checkpoint's shards straight into a Model: every tensor goes to its place on the device, heads reordered on the way."""

# V vocabulary  C hidden  M (H + 2 K) D  D head dim  F MLP width  G 2 F  E experts
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rtpurbo.runtime.layout import LayerLayout
from rtpurbo.runtime.model import Experts, Layer, Mlp, Model

INDEX_NAME = "model.safetensors.index.json"
# Tensors that old checkpoints carry and that follow from the config.
DERIVED = ("rotary_emb.inv_freq",)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a checkpoint's tensor goes. heads: order of its heads of `head_dim` rows (or columns) on arrival."""

    target: torch.Tensor
    heads: tuple[int, ...] | None = None
    head_dim: int = 1
    columns: bool = False

    def fill(self, tensor: torch.Tensor) -> None:
        """Copy the tensor into its place."""
        if self.heads is None and tensor.dtype == self.target.dtype:
            self.target.copy_(tensor)
            return
        # Converted and reordered where that is fast.
        tensor = tensor.to(self.target.device)
        if self.heads is None:
            self.target.copy_(tensor)
            return
        axis = int(self.columns)
        order = torch.tensor(self.heads, device=tensor.device)
        self.target.copy_(tensor.unflatten(axis, (-1, self.head_dim)).index_select(axis, order).flatten(axis, axis + 1))


@torch.no_grad()
def read_weights(model: Model, folder: Path, layouts: tuple[LayerLayout, ...]) -> None:
    """Fill the model from the folder's shards, one tensor at a time.

    Raises ValueError when a shard cannot be read, and for the first tensor that is missing, unexpected or of another shape.
    """
    shards = shards_of(folder)
    try:
        names = {name for shard in shards for name in _names(shard)}
        places = places_of(model, layouts, names)
        known = {name for name in names if not name.endswith(DERIVED)}
        if model.head_VC is model.embed_VC:
            known.discard("lm_head.weight")
        for kind, wrong in (("missing", places.keys() - known), ("unexpected", known - places.keys())):
            if wrong:
                raise ValueError(f"{folder}: {len(wrong)} weights are {kind}, the first is {min(wrong)}")
        for shard in shards:
            with safe_open(shard, framework="pt") as file:
                for name in sorted(places.keys() & set(file.keys())):
                    found, place = file.get_slice(name).get_shape(), places[name]
                    if found != list(place.target.shape):
                        raise ValueError(f"{folder}: {name} has shape {found}, wanted {list(place.target.shape)}")
                    place.fill(file.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder}: the model cannot be loaded ({' '.join(str(error).split())[:300]})") from error


def shards_of(folder: Path) -> list[Path]:
    """The weight files: those that the index names, or model.safetensors."""
    index = folder / INDEX_NAME
    if not index.is_file():
        return [folder / "model.safetensors"]
    try:
        return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of shards ({error})") from error


def stored_dtype(folder: Path, config: Any) -> torch.dtype:
    """The dtype that the config names, or that of the checkpoint's first tensor."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    shard = shards_of(folder)[0]
    try:
        with safe_open(shard, framework="pt") as file:
            return file.get_tensor(next(iter(file.keys()))).dtype
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder}: the model cannot be loaded ({' '.join(str(error).split())[:300]})") from error


def places_of(model: Model, layouts: tuple[LayerLayout, ...], names: set[str]) -> dict[str, Place]:
    """Checkpoint name -> place, for every tensor that the model needs; `names` decides how experts are stored."""
    places = {
        "model.embed_tokens.weight": Place(target=model.embed_VC),
        "model.norm.weight": Place(target=model.norm_C),
    }
    if model.head_VC is not model.embed_VC:
        places["lm_head.weight"] = Place(target=model.head_VC)
    for i, (layer, layout) in enumerate(zip(model.layers, layouts, strict=True)):
        prefix = f"model.layers.{i}."
        for name, place in (*_attention(layer, layout, model.head_dim), *_norms(layer), *_mlp(layer.mlp, f"{prefix}mlp.", names)):
            places[prefix + name] = place
    return places


def _attention(layer: Layer, layout: LayerLayout, head_dim: int) -> Iterator[tuple[str, Place]]:
    orders = {"q": layout.head_order, "k": layout.group_order, "v": layout.group_order}
    rows = [len(order) * head_dim for order in orders.values()]
    for kind, tensor in (("weight", layer.qkv_MC), ("bias", layer.qkv_bias_M)):
        if tensor is not None:
            for (name, order), part in zip(orders.items(), tensor.split(rows), strict=True):
                yield f"self_attn.{name}_proj.{kind}", Place(target=part, heads=order, head_dim=head_dim)
    yield "self_attn.o_proj.weight", Place(target=layer.o_CM, heads=layout.head_order, head_dim=head_dim, columns=True)
    if layer.o_bias_C is not None:
        yield "self_attn.o_proj.bias", Place(target=layer.o_bias_C)


def _norms(layer: Layer) -> Iterator[tuple[str, Place]]:
    yield "input_layernorm.weight", Place(target=layer.input_norm_C)
    yield "post_attention_layernorm.weight", Place(target=layer.post_norm_C)
    for name, tensor in (("q_norm", layer.q_norm_D), ("k_norm", layer.k_norm_D)):
        if tensor is not None:
            yield f"self_attn.{name}.weight", Place(target=tensor)


def _mlp(mlp: Mlp | Experts, prefix: str, names: set[str]) -> Iterator[tuple[str, Place]]:
    if isinstance(mlp, Mlp):
        for kind, gate_up, down in (("weight", mlp.gate_up_GC, mlp.down_CF), ("bias", mlp.gate_up_bias_G, mlp.down_bias_C)):
            if gate_up is not None and down is not None:
                gate, up = gate_up.chunk(2)
                for name, target in (("gate", gate), ("up", up), ("down", down)):
                    yield f"mlp.{name}_proj.{kind}", Place(target=target)
        return
    yield "mlp.gate.weight", Place(target=mlp.router_EC)
    if f"{prefix}experts.gate_up_proj" in names:
        yield "mlp.experts.gate_up_proj", Place(target=mlp.gate_up_EGC)
        yield "mlp.experts.down_proj", Place(target=mlp.down_ECF)
        return
    for e, (gate_up_GC, down_CF) in enumerate(zip(mlp.gate_up_EGC, mlp.down_ECF, strict=True)):
        gate, up = gate_up_GC.chunk(2)
        for name, target in (("gate", gate), ("up", up), ("down", down_CF)):
            yield f"mlp.experts.{e}.{name}_proj.weight", Place(target=target)


def _names(shard: Path) -> list[str]:
    with safe_open(shard, framework="pt") as file:
        return list(file.keys())
