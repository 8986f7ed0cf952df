"""Load an artifact: check manifest, digests, geometry and indexer, then the model with its heads in run-time order."""

import glob
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from rtpurbo.manifests.architectures import architecture_of, head_dim_of, key_value_heads_of
from rtpurbo.manifests.manifest import INDEXER_NAME, MANIFEST_NAME, Manifest, verify_files
from rtpurbo.runtime.cache import require_memory
from rtpurbo.runtime.checkpoint import read_weights, stored_dtype
from rtpurbo.runtime.engine import Runtime
from rtpurbo.runtime.layout import LayerLayout, Roles, layout_of, with_roles
from rtpurbo.runtime.model import Model, fill_random
from rtpurbo.runtime.plans import plan_layers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INDEX_DTYPES = (torch.float32, torch.bfloat16)


def load(
    source: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    roles: Roles = "manifest",
    revision: str | None = None,
    top_p: float | None = None,
) -> Runtime:
    """Load an artifact into a Runtime.

    Args:
        source: the artifact's folder, or a Hub id "user/repo" (then `revision` may name a branch, tag or commit).
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        roles: "manifest", or an ablation: "all-local", "all-retrieval" (see layout.with_roles). Prompts below the manifest's
            dense_below stay dense in every one of them.
        top_p: replaces the manifest's; 1 means that retrieval heads attend densely.

    Raises ValueError, in one sentence, for everything that does not fit: an unknown source, a file that differs from its digest,
    a config or an indexer that does not match the manifest, a device that is not there, not enough memory.
    """
    where = device_of(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, wanted auto, {', '.join(DTYPES)}")
    folder = artifact_folder(source, revision)
    artifact = Manifest.load(folder / MANIFEST_NAME)
    manifest = with_roles(artifact, roles, top_p)
    verify_files(folder, artifact)
    config = read_config(folder, artifact)
    weights = read_indexer(folder, artifact)
    _check_weight_memory(folder, artifact, config, dtype, where)
    tokenizer = load_tokenizer(folder)
    layouts = tuple(layout_of(manifest, i) for i in range(len(manifest.layers)))
    model = load_weights(folder, layouts, where, dtype)
    used = weights if manifest.top_p < 1 and manifest.layers == artifact.layers else {}
    return Runtime(model=model, tokenizer=tokenizer, manifest=manifest, plans=plan_layers(model, layouts, used))


def random_runtime(
    config: Any, manifest: Manifest, device: torch.device, dtype: torch.dtype, seed: int, *, index_std: float = 0.1
) -> Runtime:
    """A Runtime with random weights made on the device, for measurements: no tokenizer, no end-of-sequence token.

    config: transformers' config of the model. Its weights are initialised as transformers does; index projections are normal with
    std index_std. Raises ValueError when config and manifest differ in geometry, or the memory is not there.
    """
    check_geometry(config.to_dict(), manifest, "config")
    layouts = tuple(layout_of(manifest, i) for i in range(len(manifest.layers)))
    model = Model(config, device=device, dtype=dtype)
    fill_random(model, seed)
    model.generation_config.eos_token_id = None
    generator = torch.Generator(device).manual_seed(seed + 1)
    shapes = manifest.index_shapes() if manifest.top_p < 1 else {}
    index = {name: index_std * torch.randn(shape, generator=generator, device=device) for name, shape in shapes.items()}
    return Runtime(model=model, tokenizer=None, manifest=manifest, plans=plan_layers(model, layouts, index))


def device_of(device: str) -> torch.device:
    """The device of a name, or ValueError if the name is unknown or this machine lacks the device."""
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device is {device!r}, wanted auto, cpu, cuda or cuda:N")
    if device == "cpu":
        return torch.device("cpu")
    index, count = int(device.partition(":")[2] or 0), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        raise ValueError(f"device {device} is not there: this machine offers {count} CUDA devices")
    return torch.device("cuda", index)


def artifact_folder(source: str | Path, revision: str | None = None) -> Path:
    """The folder of a local artifact, or of a downloaded Hub snapshot; ValueError with the reason when there is neither."""
    if not str(source):
        raise ValueError("the artifact's name is empty, wanted a folder or a Hub id user/repo")
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{source} is a folder, and revision {revision!r} needs a Hub repository")
        return folder
    if folder.exists():
        raise ValueError(f"{source} is a file, wanted an artifact's folder or a Hub id user/repo")
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", str(source)):
        raise ValueError(f"{source}: there is no such folder, and it is not a Hub id of the form user/repo")
    return _download(str(source), revision)


def read_config(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """config.json, compared with the manifest's geometry; every file that is loaded must be listed with a digest."""
    path = folder / "config.json"
    for name in ["config.json", *sorted(p.name for p in folder.glob("*.safetensors"))]:
        if name not in manifest.files:
            raise ValueError(f"{folder / MANIFEST_NAME}: files has no digest for {name}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: wanted a JSON object")
    check_geometry(config, manifest, str(path))
    return config


def check_geometry(config: dict[str, Any], manifest: Manifest, source: str) -> None:
    """ValueError, naming `source` and the key, unless the config is supported and has the manifest's geometry."""
    architecture_of(config, source)
    found = {
        **{key: config[key] for key in ("model_type", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")},
        "num_key_value_heads": key_value_heads_of(config),
        "head_dim": head_dim_of(config),
    }
    for key, wanted in asdict(manifest.model).items():
        if found[key] != wanted:
            raise ValueError(f"{source}: {key} is {found[key]!r}, but {MANIFEST_NAME} says {wanted!r}")


def read_indexer(folder: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    """The tensors of indexer.safetensors; ValueError unless names, shapes, dtype and finiteness are as the manifest says."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    shapes, path = manifest.index_shapes(), folder / INDEXER_NAME
    if not shapes:
        return {}
    if not path.is_file():
        raise ValueError(f"{path}: missing, but {MANIFEST_NAME} has {manifest.num_retrieval_heads} retrieval heads")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    if odd := sorted(shapes.keys() ^ tensors.keys()):
        state = "missing" if odd[0] in shapes else "not expected"
        raise ValueError(f"{path}: tensor {odd[0]} is {state} ({MANIFEST_NAME} wants {len(shapes)} tensors, found {len(tensors)})")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{path}: {name} has shape {list(tensor.shape)}, wanted {list(shape)}")
        if tensor.dtype not in INDEX_DTYPES:
            raise ValueError(f"{path}: {name} is {tensor.dtype}, wanted torch.float32 or torch.bfloat16")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path}: {name} has values that are not finite")
    return tensors


def load_weights(folder: Path, layouts: tuple[LayerLayout, ...], device: torch.device, dtype: str) -> Model:
    """The model of a folder with its heads in run-time order, read straight to the device; ValueError for whatever does not fit."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = Model(config, device=device, dtype=stored_dtype(folder, config) if dtype == "auto" else DTYPES[dtype])
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"{folder}: the model cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    read_weights(model, folder, layouts)
    return model


def load_tokenizer(folder: Path) -> Any | None:
    """The folder's tokenizer, or None if it has none (token ids still work)."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: the tokenizer cannot be loaded ({' '.join(str(error).split())[:300]})") from error


def _check_weight_memory(folder: Path, manifest: Manifest, config: dict[str, Any], dtype: str, device: torch.device) -> None:
    """Refuse before loading when the weights do not fit on the device; they are read there tensor by tensor."""
    stored = sum(entry.size_bytes for name, entry in manifest.files.items() if name.endswith(".safetensors"))
    kept = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."), None)
    if dtype != "auto" and isinstance(kept, torch.dtype):
        stored = stored * DTYPES[dtype].itemsize // kept.itemsize
    require_memory(stored, device, f"{folder.name}: the model")


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    name = f"{repo} (revision {revision})" if revision else repo
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[MANIFEST_NAME]))
        if not (folder / MANIFEST_NAME).is_file():
            raise ValueError(f"{name}: {MANIFEST_NAME}: cannot be read (the Hub repository has no such file: it is not a converted model)")
        # What the manifest lists, at the same commit; everything else in the repository stays there.
        listed = [glob.escape(file) for file in Manifest.load(folder / MANIFEST_NAME).files]
        return Path(snapshot_download(repo, revision=folder.name, allow_patterns=[MANIFEST_NAME, *listed]))
    except errors.GatedRepoError as error:
        raise ValueError(f"{name}: the Hub repository is gated; accept its terms and log in with `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(f"{name}: neither a folder nor a Hub repository that is public or open to your token") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{repo}: the Hub repository has no revision {revision}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ValueError(f"{name}: no such folder, and the Hub cannot be reached") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise ValueError(f"{name}: download from the Hub failed ({' '.join(str(error).split())[:200]})") from error
