"""Which tensor goes where in an artifact: a fixed order, experts side by side, and shards of a bounded size."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rtpurbo.converter.safetensors_format import ALIGNMENT, TensorInfo
from rtpurbo.converter.shards import EMBEDDING, INDEX, LM_HEAD, SINGLE

_QKV = re.compile(r"self_attn\.([qkv])_proj\.(weight|bias)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
# Which stack a projection belongs to, and its place among the tensors of one expert there.
_PROJECTIONS = {"gate_proj": ("gate_up", 0), "up_proj": ("gate_up", 1), "down_proj": ("down", 0)}


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One weight file and its tensors in the order of their data."""

    name: str
    tensors: tuple[str, ...]


def plan_shards(tensors: Mapping[str, TensorInfo], max_shard_bytes: int) -> list[Shard]:
    """Shards of at most `max_shard_bytes` of data, named as transformers names them.

    Order: embedding, layers by number, norm, lm_head. The experts of a layer lie side by side by number in two stacks, which can be read
    as the fused tensors of transformers: gate_proj and up_proj of each expert [E, 2 F, hidden], then all down_proj [E, hidden, F].
    Elsewhere in a layer q_proj, k_proj and v_proj follow each other, as do gate_proj and up_proj, so that they can be read as one matrix.
    A stack, like a single tensor, is never split, so one that is larger than the limit has a shard of its own.
    The format allows no gaps; tensors whose size is no multiple of 8 bytes therefore come last, and all others begin at a multiple of 8.
    ValueError when the experts of one stack differ in dtype or shape.
    """
    assert max_shard_bytes > 0, max_shard_bytes
    shards: list[list[str]] = []
    room = 0
    for names in _stacks(tensors):
        size = sum(tensors[name].nbytes for name in names)
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1] += names
        room -= size
    if len(shards) == 1:
        return [Shard(name=SINGLE, tensors=tuple(shards[0]))]
    return [Shard(name=f"model-{i:05d}-of-{len(shards):05d}.safetensors", tensors=tuple(names)) for i, names in enumerate(shards, 1)]


def shard_index(shards: list[Shard], tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, Any]]:
    """{INDEX: its JSON object} when there are several shards, else nothing."""
    if len(shards) == 1:
        return {}
    weight_map = {name: shard.name for shard in shards for name in shard.tensors}
    size = sum(info.nbytes for info in tensors.values())
    return {INDEX: {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}}


def _stacks(tensors: Mapping[str, TensorInfo]) -> Iterator[list[str]]:
    """Names in the order on disk, in groups that may not be split."""
    ordered = sorted(tensors, key=lambda name: (_misaligned(tensors[name]), *_place(name)))
    for _, group in groupby(ordered, key=_stack_of):
        names = list(group)
        first = tensors[names[0]]
        for name in names:
            if (tensors[name].dtype, tensors[name].shape) != (first.dtype, first.shape):
                raise ValueError(
                    f"{tensors[name].file}: {name} is {tensors[name].dtype} {list(tensors[name].shape)}, "
                    f"wanted {first.dtype} {list(first.shape)} as {names[0]}: the experts of a layer must be equal in size"
                )
        yield names


def _stack_of(name: str) -> tuple[str, ...]:
    expert = _EXPERT.fullmatch(name)
    return (expert[1], _PROJECTIONS[expert[3]][0]) if expert else (name,)


def _misaligned(info: TensorInfo) -> int:
    """0 for sizes that keep the next tensor aligned, else a rank that puts wide dtypes first."""
    return 0 if info.nbytes % ALIGNMENT == 0 else 1 + ALIGNMENT - info.dtype.itemsize


def _place(name: str) -> tuple[int, int, int, str, int]:
    if expert := _EXPERT.fullmatch(name):
        stack, part = _PROJECTIONS[expert[3]]
        return (1, int(expert[1]), 1 + (stack == "down"), "", 2 * int(expert[2]) + part)
    if layer := _LAYER.fullmatch(name):
        if qkv := _QKV.fullmatch(layer[2]):
            return (1, int(layer[1]), 0, f"self_attn.qkv_proj.{qkv[2]}", "qkv".index(qkv[1]))
        return (1, int(layer[1]), 0, layer[2], 0)
    return ({EMBEDDING: 0, LM_HEAD: 3}.get(name, 2), 0, 0, name, 0)
