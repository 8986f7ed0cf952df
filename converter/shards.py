"""A checkpoint folder read by its headers: config.json, safetensors shards, and the comparison of both."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rtpurbo.converter.safetensors_format import TensorInfo, read_bytes, read_header, unique_keys
from rtpurbo.manifests.architectures import Architecture, architecture_of

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = 256 << 20
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Where a config was loaded from: names of somebody's machine.
LOCAL_KEYS = ("_name_or_path", "_model_name_or_path", "name_or_path", "tokenizer_file", "is_local", "local_files_only")
# Tables that early exporters saved although the model computes them itself.
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model on disk whose headers were checked.

    folder: where it lies. id: Hub id or the folder's name, never a path. revision: commit of the Hub, digest of the demo's GGUF,
    or None. config: see read_config; `dataclasses.replace` gives a checkpoint with another one. tensors: name -> place
    on disk, exactly the tensors that the architecture wants, without a second copy of a tied lm_head.
    """

    folder: Path
    id: str
    revision: str | None
    config: dict[str, Any]
    architecture: Architecture
    tensors: dict[str, TensorInfo]

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(info.nbytes for info in self.tensors.values())


def read_checkpoint(folder: Path, id: str, revision: str | None) -> Checkpoint:
    """Check `folder` by its headers, without reading the weights.

    ValueError names file, key, found and wanted: no or corrupt config.json, an unsupported model (see architecture_of), weights
    only as pickle, a missing, truncated or corrupt shard, an index that disagrees with its shards, tensors that are missing,
    superfluous, of another shape than config.json says or of an unsupported dtype.
    """
    config = read_config(folder)
    architecture = architecture_of(config, str(folder / CONFIG))
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder / 'adapter_config.json'}: is an adapter beside the weights; merge it into the model and save that")
    tensors = _read_shards(folder)
    tensors = {name: info for name, info in tensors.items() if not _IGNORED.fullmatch(name)}
    hf_config = transformers_config(config, str(folder / CONFIG))
    tied = bool(hf_config.tie_word_embeddings)
    _compare(folder, tensors, expected_tensors(hf_config, str(folder / CONFIG)), tied)
    if tied and LM_HEAD in tensors:
        if any(a != b for a, b in zip(read_bytes(tensors[LM_HEAD]), read_bytes(tensors[EMBEDDING]), strict=False)):
            raise ValueError(
                f"{folder / CONFIG}: tie_word_embeddings is true, wanted false: {LM_HEAD} differs from {EMBEDDING} in the weights"
            )
        del tensors[LM_HEAD]
    return Checkpoint(
        folder=folder, id=id, revision=revision, config=config, architecture=architecture, tensors=dict(sorted(tensors.items()))
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json with the key names of the Hub: transformers 5 writes num_experts as num_local_experts."""
    config = read_json(folder / CONFIG, f"{folder}: is not a model folder: it has no {CONFIG}")
    return {("num_experts" if key == "num_local_experts" else key): value for key, value in config.items()}


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """A JSON object from a file; ValueError with the sentence `missing` when there is none, or with what is wrong with it."""
    try:
        size = path.stat().st_size
        raw = path.read_bytes() if size <= MAX_JSON_BYTES else b""
    except FileNotFoundError as error:
        raise ValueError(missing) from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: {size} bytes, wanted at most {MAX_JSON_BYTES}")
    try:
        body = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(body, dict):
        raise ValueError(f"{path}: holds {type(body).__name__}, wanted a JSON object")
    return body


def transformers_config(config: dict[str, Any], source: str = CONFIG) -> Any:
    """The transformers configuration object of a raw config.json; ValueError when transformers does not accept a value."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict({k: v for k, v in config.items() if k != "_name_or_path"})
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{source}: transformers does not accept it: {' '.join(str(error).split())[:300]}") from error


def expected_tensors(hf_config: Any, source: str = CONFIG) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint with this configuration, one tensor per expert, lm_head included.

    From an empty model on the meta device, so the rules of transformers hold; its fused expert stacks are taken apart again:
    gate_up_proj [E, 2I, hidden] -> experts.{e}.gate_proj, up_proj [I, hidden]; down_proj [E, hidden, I] -> experts.{e}.down_proj.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            state = AutoModelForCausalLM.from_config(hf_config).state_dict()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{source}: transformers cannot build the model: {' '.join(str(error).split())[:300]}") from error
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".experts.")
        if leaf == "gate_up_proj":
            experts, double, width = tensor.shape
            parts = {"gate_proj": (double // 2, width), "up_proj": (double // 2, width)}
        elif leaf == "down_proj" and stem:
            experts, *shape = tensor.shape
            parts = {"down_proj": tuple(shape)}
        else:
            shapes[name] = tuple(tensor.shape)
            continue
        shapes |= {f"{stem}.experts.{e}.{part}.weight": shape for e in range(experts) for part, shape in parts.items()}
    return shapes


def _read_shards(folder: Path) -> dict[str, TensorInfo]:
    # The order in which transformers looks: the single file first.
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        found = f"only {pickles[0]}: pickle can run code when it is read" if pickles else "neither"
        raise ValueError(f"{folder}: has {found}, wanted {SINGLE} or {INDEX}")
    index = read_json(folder / INDEX, "")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX}: weight_map is {str(weight_map)[:80]}, wanted tensor names -> files")
    tensors: dict[str, TensorInfo] = {}
    for name in sorted(set(map(str, weight_map.values()))):
        if name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise ValueError(f"{folder / INDEX}: weight_map has the file {name!r}, wanted a .safetensors file of the same folder")
        if not (folder / name).is_file():
            count = sum(file == name for file in weight_map.values())
            raise ValueError(f"{folder / name}: missing, but {INDEX} has {count} tensors in it")
        header = read_header(folder / name)
        for key in header:
            if weight_map.get(key) != name:
                raise ValueError(f"{folder / name}: has the tensor {key}, but {INDEX} says {weight_map.get(key)!r}")
        tensors |= header
    for key, name in weight_map.items():
        if key not in tensors:
            raise ValueError(f"{folder / name}: has no tensor {key}, but {INDEX} says so")
    return tensors


def _compare(folder: Path, found: dict[str, TensorInfo], wanted: dict[str, tuple[int, ...]], tied: bool) -> None:
    required = {name for name in wanted if not (tied and name == LM_HEAD)}
    if missing := sorted(required - found.keys()):
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}, wanted by {CONFIG}")
    if unknown := sorted(found.keys() - wanted.keys()):
        raise ValueError(
            f"{found[unknown[0]].file}: {len(unknown)} tensors do not belong to the model of {CONFIG}, the first is {unknown[0]}"
        )
    for name, info in found.items():
        if info.shape != wanted[name]:
            raise ValueError(f"{info.file}: {name} has shape {list(info.shape)}, wanted {list(wanted[name])} by {CONFIG}")
        if info.dtype not in WEIGHT_DTYPES:
            raise ValueError(f"{info.file}: {name} has dtype {info.dtype}, wanted bfloat16, float16, float32 or float64")
