"""Models as the converter opens them: a name becomes a checked folder on disk; plus digests and RoPE scaling of its config."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from rtpurbo.converter.catalog import ResolvedModel, resolve_model
from rtpurbo.converter.demo_model import DEMO_ID, build_demo, demo_config
from rtpurbo.converter.download import download_checkpoint, download_config
from rtpurbo.converter.materialize import available_memory_bytes, load_embedding, load_model, load_rotary, stream_layers
from rtpurbo.converter.safetensors_format import TensorInfo, read_tensor
from rtpurbo.converter.shards import LOCAL_KEYS, Checkpoint, read_checkpoint, read_config, transformers_config
from rtpurbo.manifests.architectures import rope_type_of

__all__ = [
    "Checkpoint",
    "ResolvedModel",
    "TensorInfo",
    "available_memory_bytes",
    "config_digest",
    "config_with_rope_scaling",
    "load_embedding",
    "load_model",
    "load_rotary",
    "model_config",
    "open_checkpoint",
    "read_tensor",
    "resolve_model",
    "stream_layers",
    "tokenizer_digest",
]


def open_checkpoint(model: str, *, work: Path, revision: str | None = None) -> Checkpoint:
    """Resolve `model` (see resolve_model), fetch it where needed and check it by its headers (see read_checkpoint).

    A Hub id is downloaded into the Hub's cache at `revision` (branch, tag or commit; default: main). "demo" is built once in
    work/"base". A folder is read in place. ValueError with one sentence for every failure.
    """
    resolved = resolve_model(model)
    if revision is not None and resolved.kind != "hub":
        raise ValueError(f"revision is {revision!r}, but {model!r} is a {resolved.kind}: only Hub ids have revisions")
    if resolved.kind == "hub":
        folder, commit = download_checkpoint(resolved.target, revision)
        return read_checkpoint(folder, resolved.target, commit)
    if resolved.kind == "demo":
        folder = work / "base"
        return read_checkpoint(folder, DEMO_ID, build_demo(folder))
    folder = Path(resolved.target)
    return read_checkpoint(folder, folder.resolve().name or "model", None)


def model_config(model: str, *, revision: str | None = None) -> dict[str, Any]:
    """config.json of a model without its weights: what `rtpurbo plan` needs. ValueError as open_checkpoint.

    Of a Hub id only that file is fetched; the demo's comes from the metadata of its GGUF.
    """
    resolved = resolve_model(model)
    if resolved.kind == "hub":
        return download_config(resolved.target, revision)
    if revision is not None:
        raise ValueError(f"revision is {revision!r}, but {model!r} is a {resolved.kind}: only Hub ids have revisions")
    return demo_config() if resolved.kind == "demo" else read_config(Path(resolved.target))


def config_with_rope_scaling(config: dict[str, Any], spec: str) -> dict[str, Any]:
    """A copy of `config` whose context is stretched by "yarn:FACTOR" or "linear:FACTOR", FACTOR > 1.

    rope_parameters gets rope_type, factor, rope_theta and (yarn, whose formula needs it) original_max_position_embeddings;
    max_position_embeddings is multiplied. llama3 scaling is part of a trained model and cannot be added. ValueError for a bad
    spec and for models that already have a scaling.
    """
    kind, _, number = spec.partition(":")
    try:
        factor = float(number)
    except ValueError:
        factor = math.nan
    if kind not in ("yarn", "linear") or not (math.isfinite(factor) and factor > 1):
        raise ValueError(f"RoPE scaling is {spec!r}, wanted yarn:FACTOR or linear:FACTOR with FACTOR > 1, for example yarn:4")
    if (present := rope_type_of(config)) != "default":
        raise ValueError(f"RoPE scaling is {spec!r}, but the model already has {present!r} scaling, wanted a model without")
    original = config["max_position_embeddings"]
    rope: dict[str, Any] = {"rope_type": kind, "factor": factor}
    rope["rope_theta"] = transformers_config(config).rope_parameters["rope_theta"]
    if kind == "yarn":
        rope["original_max_position_embeddings"] = original
    kept = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_theta")}
    scaled = {**kept, "rope_parameters": rope, "max_position_embeddings": int(original * factor)}
    transformers_config(scaled)
    return scaled


def config_digest(config: dict[str, Any]) -> str:
    """sha256 (hex) of a config in canonical JSON (sorted keys, no white space).

    Local names and the key that an artifact adds are left out, so an artifact's config.json has the digest of its source.
    """
    body = {key: value for key, value in config.items() if key not in (*LOCAL_KEYS, "rtpurbo")}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def tokenizer_digest(folder: Path) -> str | None:
    """sha256 (hex) of tokenizer.json, else of tokenizer.model, else of vocab.json followed by merges.txt; None without any."""
    for names in (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt")):
        if all((folder / name).is_file() for name in names):
            return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()
    return None
