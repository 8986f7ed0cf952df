"""The artifact's manifest `rtpurbo.json`: head roles, indexer, selection and provenance; load, save, validate, digest."""

import dataclasses
import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from rtpurbo.manifests.strict_json import parse_strict

MANIFEST_NAME = "rtpurbo.json"
INDEXER_NAME = "indexer.safetensors"
SCHEMA_VERSION = 1
MAX_MANIFEST_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """Where the weights come from. `id` is a Hub id or a folder's name, never a local path."""

    id: str
    revision: str | None
    config_sha256: str
    tokenizer_sha256: str | None


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The attention geometry that roles and indexer refer to."""

    model_type: str
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_attention_heads // self.num_key_value_heads


@dataclass(frozen=True, kw_only=True)
class LayerRoles:
    """Roles of one layer, in the checkpoint's own head order.

    scores: retrieval score R_h of every query head, in [0, 1] (mean attention mass on the earlier needle).
    retrieval_heads: query heads that retrieve, ascending; all others are local.
    retained_groups: KV heads whose full cache is kept, ascending: those with a retrieval head.
    """

    scores: tuple[float, ...]
    retrieval_heads: tuple[int, ...]
    retained_groups: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Indexer:
    """dim: index dimension. keys: one key projection per retrieval head, or one per retained KV group. scale: logit scale."""

    dim: int
    keys: Literal["head", "group"]
    scale: float
    key_dtype: Literal["float32", "bfloat16", "float8_e4m3fn"] = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """sha256 (hex) and size in bytes of one file of the artifact."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything the runtime and the plugins need to know beside the weights. See docs/artifact.md for each field.

    sliding_window counts the query itself. dense_below: prompts shorter than this many tokens run with full attention to
    their end (0: never). top_p in (0, 1]. decode_block and prefill_block: keys per block, in tokens. prefill_top_p: share of the
    pooled index mass with prefill_pattern "topp" (None: top_p).
    """

    base_model: BaseModel
    model: ModelShape
    granularity: Literal["head", "group"]
    group_threshold: float
    layers: tuple[LayerRoles, ...]
    sliding_window: int
    sinks: int
    indexer: Indexer
    top_p: float
    decode_block: int
    prefill_block: int
    prefill_pattern: Literal["dense", "topp"]
    dense_below: int
    prefill_top_p: float | None = None
    calibration: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    libraries: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileDigest] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def num_retrieval_heads(self) -> int:
        """Retrieval query heads over all layers."""
        return sum(len(layer.retrieval_heads) for layer in self.layers)

    @property
    def num_retained_groups(self) -> int:
        """KV groups over all layers that keep their full cache."""
        return sum(len(layer.retained_groups) for layer in self.layers)

    @property
    def prefill_mass(self) -> float:
        """Share of the pooled index mass that a block of queries keeps with the prefill pattern "topp"."""
        return self.top_p if self.prefill_top_p is None else self.prefill_top_p

    def index_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Name -> shape of every tensor of indexer.safetensors.

        `layers.{i}.index_q` [retrieval heads, dim, head_dim] and `layers.{i}.index_k` [retrieval heads | retained groups, dim,
        head_dim], in the order of `retrieval_heads` and `retained_groups`; layers without retrieval head have none.
        """
        shapes: dict[str, tuple[int, int, int]] = {}
        for i, layer in enumerate(self.layers):
            if layer.retrieval_heads:
                num_keys = len(layer.retrieval_heads if self.indexer.keys == "head" else layer.retained_groups)
                shapes[f"layers.{i}.index_q"] = (len(layer.retrieval_heads), self.indexer.dim, self.model.head_dim)
                shapes[f"layers.{i}.index_k"] = (num_keys, self.indexer.dim, self.model.head_dim)
        return shapes

    def key_sets(self, layer: int) -> tuple[int, ...]:
        """For each retrieval head of `layer`, the row of index_k that it reads."""
        roles = self.layers[layer]
        if self.indexer.keys == "head":
            return tuple(range(len(roles.retrieval_heads)))
        return tuple(roles.retained_groups.index(h // self.model.group_size) for h in roles.retrieval_heads)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object on disk, digest included."""
        body = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        if self.prefill_top_p is None:
            del body["prefill_top_p"]
        body["num_retrieval_heads"] = self.num_retrieval_heads
        body["num_retained_groups"] = self.num_retained_groups
        body = json.loads(json.dumps(body, allow_nan=False))
        return {**body, "digest": digest(body)}

    def save(self, path: Path) -> None:
        """Write the manifest; `path` appears complete or not at all.

        ValueError when `load` would refuse it, so that no run ends with a manifest that nobody can read.
        """
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        Manifest.from_json(text, str(path))
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """Read and validate; any deviation is a ValueError that names the file, the key, what was found and what was wanted."""
        try:
            size = path.stat().st_size
            if size > MAX_MANIFEST_BYTES:
                raise ValueError(f"{path}: {size} bytes, wanted at most {MAX_MANIFEST_BYTES}")
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
        except FileNotFoundError as error:
            raise ValueError(f"{path}: cannot be read (no such file: {path.parent} is not a converted model)") from error
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
        return cls.from_json(text, str(path))

    @classmethod
    def from_json(cls, text: str, source: str = MANIFEST_NAME) -> "Manifest":
        """Parse and validate the text of a manifest; `source` names it in errors."""
        try:
            body = parse_strict(text)
        except ValueError as error:
            raise ValueError(f"{source}: not a valid JSON manifest ({error})") from error
        if isinstance(body, dict) and body.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"{source}: schema_version is {body.get('schema_version')!r}, wanted {SCHEMA_VERSION}")
        error = next(iter(sorted(_validator().iter_errors(body), key=lambda e: list(map(str, e.absolute_path)))), None)
        if error is not None:
            key = ".".join(map(str, error.absolute_path)) or "the top level"
            raise ValueError(f"{source}: {key}: {error.message[:300]}")
        found = body.pop("digest")
        if found != digest(body):
            raise ValueError(f"{source}: digest is {found}, wanted {digest(body)}: the manifest was changed after it was written")
        counts = {name: body.pop(name) for name in ("num_retrieval_heads", "num_retained_groups")}
        del body["schema_version"]
        try:
            manifest = cls(
                base_model=BaseModel(**body.pop("base_model")),
                model=ModelShape(**body.pop("model")),
                layers=tuple(LayerRoles(**{k: tuple(v) for k, v in layer.items()}) for layer in body.pop("layers")),
                indexer=Indexer(**body.pop("indexer")),
                files={name: FileDigest(**entry) for name, entry in body.pop("files").items()},
                **body,
            )
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        for name, value in counts.items():
            if getattr(manifest, name) != value:
                raise ValueError(f"{source}: {name} is {value}, but the layers list {getattr(manifest, name)}")
        return manifest


def digest(body: dict[str, Any]) -> str:
    """sha256 (hex) of the JSON object in canonical form: sorted keys, no white space, no `digest` key."""
    body = {key: value for key, value in body.items() if key != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def file_digest(path: Path) -> FileDigest:
    """sha256 and size of a file, read in chunks."""
    with path.open("rb") as file:
        return FileDigest(sha256=hashlib.file_digest(file, "sha256").hexdigest(), size_bytes=path.stat().st_size)


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare every listed file with its size and sha256; ValueError names the first that is missing or differs."""
    for name, wanted in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path}: missing, but {MANIFEST_NAME} lists it")
        if path.stat().st_size != wanted.size_bytes:
            raise ValueError(f"{path}: {path.stat().st_size} bytes, wanted {wanted.size_bytes} ({MANIFEST_NAME})")
    # hashlib lets other threads run: the shards of a large model are read side by side.
    with ThreadPoolExecutor(max_workers=8) as pool:
        found_of = pool.map(lambda name: file_digest(folder / name).sha256, manifest.files)
        for (name, wanted), found in zip(manifest.files.items(), found_of, strict=True):
            if found != wanted.sha256:
                raise ValueError(f"{folder / name}: sha256 {found}, wanted {wanted.sha256} ({MANIFEST_NAME})")


def roles_from_heads(scores: list[list[float]], retrieval: list[list[int]], group_size: int) -> tuple[LayerRoles, ...]:
    """Layer roles from scores and retrieval heads per layer; a KV group is retained when one of its heads retrieves."""
    return tuple(
        LayerRoles(
            scores=tuple(layer_scores),
            retrieval_heads=tuple(sorted(heads)),
            retained_groups=tuple(sorted({h // group_size for h in heads})),
        )
        for layer_scores, heads in zip(scores, retrieval, strict=True)
    )


@cache
def _validator() -> Any:
    from jsonschema import Draft202012Validator, validators

    schema = json.loads(Path(__file__).with_name("schema_v1.json").read_text(encoding="utf-8"))
    # JSON Schema calls 8192.0 an integer; as a Python float it would break slicing and the digest's canonical form.
    strict = Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    return validators.extend(Draft202012Validator, type_checker=strict)(schema)


def _check(m: Manifest) -> None:
    """The rules between fields that a JSON Schema cannot say."""
    shape = m.model
    if shape.num_attention_heads % shape.num_key_value_heads:
        raise ValueError(
            f"model.num_attention_heads is {shape.num_attention_heads}, wanted a multiple of num_key_value_heads "
            f"{shape.num_key_value_heads}"
        )
    if len(m.layers) != shape.num_hidden_layers:
        raise ValueError(f"layers has {len(m.layers)} entries, wanted num_hidden_layers {shape.num_hidden_layers}")
    for i, layer in enumerate(m.layers):
        _check_layer(i, layer, shape)
    if not 0 < m.top_p <= 1:
        raise ValueError(f"top_p is {m.top_p}, wanted 0 < top_p <= 1")
    if m.prefill_top_p is not None and (m.prefill_pattern != "topp" or not 0 < m.prefill_top_p <= 1):
        raise ValueError(f"prefill_top_p is {m.prefill_top_p}, wanted 0 < prefill_top_p <= 1, and only with prefill_pattern topp")
    if m.sliding_window < 1 or m.sinks < 0 or m.dense_below < 0:
        raise ValueError(f"sliding_window {m.sliding_window}, sinks {m.sinks} or dense_below {m.dense_below} is out of range")
    for name in ("decode_block", "prefill_block"):
        value = getattr(m, name)
        if value < 1 or value & (value - 1):
            raise ValueError(f"{name} is {value}, wanted a power of two")
    if not (0 < m.indexer.dim <= shape.head_dim):
        raise ValueError(f"indexer.dim is {m.indexer.dim}, wanted 1 ... head_dim {shape.head_dim}")
    if not (math.isfinite(m.indexer.scale) and m.indexer.scale > 0):
        raise ValueError(f"indexer.scale is {m.indexer.scale}, wanted a positive number")


def _check_layer(i: int, layer: LayerRoles, shape: ModelShape) -> None:
    if len(layer.scores) != shape.num_attention_heads:
        raise ValueError(f"layers.{i}.scores has {len(layer.scores)} entries, wanted {shape.num_attention_heads}")
    if any(not 0 <= score <= 1 for score in layer.scores):
        raise ValueError(f"layers.{i}.scores has a value outside [0, 1]")
    for name, ids, limit in (
        ("retrieval_heads", layer.retrieval_heads, shape.num_attention_heads),
        ("retained_groups", layer.retained_groups, shape.num_key_value_heads),
    ):
        if list(ids) != sorted(set(ids)) or any(not 0 <= h < limit for h in ids):
            raise ValueError(f"layers.{i}.{name} is {list(ids)}, wanted ascending ids below {limit}")
    groups = tuple(sorted({h // shape.group_size for h in layer.retrieval_heads}))
    if groups != layer.retained_groups:
        raise ValueError(f"layers.{i}.retained_groups is {list(layer.retained_groups)}, but its retrieval heads need {list(groups)}")
