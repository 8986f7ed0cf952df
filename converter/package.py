"""Writes an artifact: a Hugging Face checkpoint that loads dense anywhere, plus manifest, indexer, recipe and metrics."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtpurbo.converter.layout import plan_shards, shard_index
from rtpurbo.converter.safetensors_format import TensorInfo, header_bytes, read_bytes, tensor_bytes, write_file
from rtpurbo.converter.shards import CONFIG, LOCAL_KEYS, Checkpoint, read_json
from rtpurbo.manifests.manifest import INDEXER_NAME, MANIFEST_NAME, SCHEMA_VERSION, FileDigest, Manifest
from rtpurbo.manifests.output import appearing, check_space, refuse_existing, sync

RECIPE_NAME = "recipe.toml"
METRICS_NAME = "metrics.json"
# A recipe can hold local paths and a README is edited by hand, so neither is part of what the manifest vouches for.
UNDIGESTED = (RECIPE_NAME, "README.md")
MAX_SHARD_BYTES = 5_000_000_000

_COPIED_JSON = ("generation_config.json", "tokenizer_config.json")
_COPIED = (
    *("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md"),
)
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def write_artifact(
    out: Path,
    checkpoint: Checkpoint,
    manifest: Manifest,
    *,
    indexer: Mapping[str, Tensor],
    student: Mapping[str, Callable[[], Tensor]],
    recipe_toml: str,
    metrics: Mapping[str, Any],
    extra_files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Manifest:
    """Write the artifact to `out`, which appears by one rename when complete; the manifest with `files` filled in.

    indexer: tensors of manifest.index_shapes(). student: checkpoint tensor name -> reader of the distilled weight, in any floating
    dtype, cast to the source's; every other tensor is copied from the source, byte by byte. extra_files: file name -> content.
    Weights: see plan_shards. config.json is checkpoint.config plus {"rtpurbo": {"manifest", "schema_version"}}. The manifest lists
    sha256 and size of every file except itself and UNDIGESTED. Memory: about one tensor. Equal inputs give equal bytes.
    A leftover `<out>.partial` of an interrupted run is replaced. ValueError, with nothing left behind: `out` exists, too little disk
    space, a folder that cannot be written, an indexer or student of other names or shapes or with values that are not finite.
    """
    assert not manifest.files, "the manifest's files are filled in here"
    refuse_existing(out)
    _check_indexer(indexer, manifest)
    if unknown := sorted(student.keys() - checkpoint.tensors.keys()):
        raise ValueError(f"the student has the tensor {unknown[0]}, which is not in {checkpoint.id}")
    shards = plan_shards(checkpoint.tensors, max_shard_bytes)
    files = _small_files(checkpoint, recipe_toml, metrics, extra_files or {})
    files |= {name: _json(body) for name, body in shard_index(shards, checkpoint.tensors).items()}
    needed = checkpoint.size_bytes + sum(map(len, files.values())) + sum(t.nbytes for t in indexer.values()) + (1 << 20)
    check_space(out, needed)
    with appearing(out) as partial:
        digests = {name: write_file(partial / name, [content]) for name, content in files.items()}
        shapes = manifest.index_shapes()
        digests[INDEXER_NAME] = write_file(partial / INDEXER_NAME, _indexer_bytes({name: indexer[name] for name in shapes}))
        for shard in shards:
            infos = {name: checkpoint.tensors[name] for name in shard.tensors}
            digests[shard.name] = write_file(partial / shard.name, _weight_bytes(infos, student))
        listed = {
            name: FileDigest(sha256=sha256, size_bytes=size) for name, (sha256, size) in sorted(digests.items()) if name not in UNDIGESTED
        }
        complete = dataclasses.replace(manifest, files=listed)
        complete.save(partial / MANIFEST_NAME)
        sync(partial / MANIFEST_NAME)
    return complete


def _check_indexer(indexer: Mapping[str, Tensor], manifest: Manifest) -> None:
    wanted = manifest.index_shapes()
    if odd := sorted(indexer.keys() ^ wanted.keys()):
        state = "is not wanted by the manifest" if odd[0] in indexer else "is missing"
        raise ValueError(f"{INDEXER_NAME}: {odd[0]} {state}")
    for name, shape in wanted.items():
        if tuple(indexer[name].shape) != shape:
            raise ValueError(f"{INDEXER_NAME}: {name} has shape {list(indexer[name].shape)}, wanted {list(shape)}")
        if not indexer[name].is_floating_point() or not torch.isfinite(indexer[name]).all():
            raise ValueError(f"{INDEXER_NAME}: {name} has values that are not finite floating-point numbers")


def _small_files(
    checkpoint: Checkpoint, recipe_toml: str, metrics: Mapping[str, Any], extra_files: Mapping[str, bytes]
) -> dict[str, bytes]:
    """Name -> content of everything but weights, indexer and manifest."""
    config = {key: value for key, value in checkpoint.config.items() if key not in LOCAL_KEYS}
    config["rtpurbo"] = {"manifest": MANIFEST_NAME, "schema_version": SCHEMA_VERSION}
    try:
        metrics_json = _json(dict(metrics), sort_keys=True)
    except ValueError as error:
        raise ValueError(f"{METRICS_NAME}: a value is not a finite JSON number") from error
    files = {CONFIG: _json(config), RECIPE_NAME: recipe_toml.encode(), METRICS_NAME: metrics_json}
    for name in _COPIED_JSON:
        if (checkpoint.folder / name).is_file():
            body = read_json(checkpoint.folder / name, "")
            files[name] = _json({key: value for key, value in body.items() if key not in LOCAL_KEYS})
    try:
        files |= {name: (checkpoint.folder / name).read_bytes() for name in _COPIED if (checkpoint.folder / name).is_file()}
    except OSError as error:
        raise ValueError(f"{error.filename}: cannot be read ({error.strerror})") from error
    for name, content in extra_files.items():
        assert _FILE_NAME.fullmatch(name), f"extra file {name!r}"
        assert name not in (*files, MANIFEST_NAME, INDEXER_NAME), f"extra file {name!r} is written already"
        files[name] = content
    return files


def _indexer_bytes(indexer: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    yield header_bytes({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in indexer.items()})
    yield from map(tensor_bytes, indexer.values())


def _weight_bytes(infos: Mapping[str, TensorInfo], student: Mapping[str, Callable[[], Tensor]]) -> Iterator[bytes | memoryview]:
    yield header_bytes({name: (info.dtype, info.shape) for name, info in infos.items()})
    for name, info in infos.items():
        if name not in student:
            yield from read_bytes(info)
            continue
        tensor = student[name]()
        if tuple(tensor.shape) != info.shape or not tensor.is_floating_point():
            found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            raise ValueError(f"the student's {name} is {found}, wanted a floating dtype and shape {list(info.shape)}")
        tensor = tensor.detach().to(info.dtype)
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise ValueError(f"the student's {name} has {bad} values that are not finite in {info.dtype}, wanted none")
        yield tensor_bytes(tensor)


def _json(body: Any, sort_keys: bool = False) -> bytes:
    return (json.dumps(body, indent=2, sort_keys=sort_keys, allow_nan=False, ensure_ascii=False) + "\n").encode()
