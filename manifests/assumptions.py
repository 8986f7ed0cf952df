"""What a plan assumes: options with their ranges, and how many heads and KV groups keep a full cache."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from rtpurbo.manifests.manifest import Manifest
from rtpurbo.manifests.parameters import Shape

KEY_BYTES = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}
_CHOICES = {
    "granularity": ("head", "group"), "index_keys": ("head", "group"), "index_key_dtype": tuple(KEY_BYTES),
    "train": ("all", "attention", "lora"),
}  # fmt: skip
_RANGES: dict[str, tuple[float, float]] = {
    "retrieval_ratio": (0, 1),
    "sliding_window": (1, 1 << 24),
    "sinks": (0, 1 << 16),
    "index_dim": (1, 1024),
    "top_p": (1e-6, 1),
    "kept_fraction": (0, 1),
    "kv_bytes": (1, 4),
    "weight_bytes": (1, 4),
    "lora_rank": (1, 1024),
    "calibration_documents": (1, 1024),
    "calibration_tokens": (64, 1 << 24),
    "indexer_steps": (0, 10**6),
    "indexer_min_tokens": (16, 1 << 24),
    "indexer_max_tokens": (16, 1 << 24),
    "distill_steps": (0, 10**6),
    "distill_batch": (1, 4096),
    "distill_min_tokens": (16, 1 << 24),
    "distill_max_tokens": (16, 1 << 24),
    "answer_tokens": (1, 1 << 20),
    "teacher_top_k": (1, 1024),
    "chunk": (1, 1 << 24),
    "gpu_memory_bytes": (1, 1 << 60),
    "gemm_flops": (1, 1e18),
    "efficiency": (1e-6, 1),
    "bandwidth": (1, 1e15),
}


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Assumptions of a plan; names and defaults as in the recipe, rates as measured on one NVIDIA H200.

    kept_fraction: share of the context that one retrieval head selects per decoded token (top_p 1 selects all of it).
    *_bytes: bytes per element. chunk: tokens per forward pass in prefill and calibration. efficiency: share of gemm_flops
    (FLOP/s) that whole stages reach. bandwidth: bytes/s. roles: a manifest, whose roles, window, sinks, indexer and top_p then
    replace the expected ones. ValueError names the option, what was found and what was wanted.
    """

    granularity: Literal["head", "group"] = "group"
    retrieval_ratio: float = 0.15
    sliding_window: int = 8192
    sinks: int = 4
    index_dim: int = 16
    index_keys: Literal["head", "group"] = "head"
    index_key_dtype: Literal["bfloat16", "float8_e4m3fn", "float32"] = "bfloat16"
    top_p: float = 0.9
    kept_fraction: float = 0.1
    kv_bytes: int = 2
    weight_bytes: int = 2
    train: Literal["all", "attention", "lora"] = "all"
    lora_rank: int = 16
    calibration_documents: int = 4
    calibration_tokens: int = 32768
    indexer_steps: int = 600
    indexer_min_tokens: int = 32768
    indexer_max_tokens: int = 81920
    distill_steps: int = 600
    distill_batch: int = 8
    distill_min_tokens: int = 32768
    distill_max_tokens: int = 65536
    answer_tokens: int = 300
    teacher_top_k: int = 10
    chunk: int = 8192
    gpu_memory_bytes: int = 141 * 10**9
    gemm_flops: float = 764e12
    efficiency: float = 0.5
    bandwidth: float = 4.2e12
    roles: Manifest | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, wanted one of {', '.join(choices)}")
        kinds = {f.name: f.type for f in dataclasses.fields(self)}
        for name, (low, high) in _RANGES.items():
            check_number(name, getattr(self, name), low, high, whole=kinds[name] is int)
        for stage in ("indexer", "distill"):
            low, high = getattr(self, f"{stage}_min_tokens"), getattr(self, f"{stage}_max_tokens")
            if low > high:
                raise ValueError(f"{stage}_min_tokens is {low}, wanted at most {stage}_max_tokens {high}")
        if self.roles is not None and not isinstance(self.roles, Manifest):
            raise ValueError(f"roles is a {type(self.roles).__name__}, wanted a Manifest")


@dataclass(frozen=True, kw_only=True)
class RoleCounts:
    """How many query heads retrieve and how many KV groups keep their full cache.

    source: "manifest" (exact) or "expected". For granularity head without a manifest, retained_groups is `scattered`: the groups
    touched when roles fall independently on all query heads; `scattered_late`: on those of the later half of the layers;
    `packed`: when they fill whole groups, the least that is possible. The three are equal where the count is exact.
    """

    source: Literal["manifest", "expected"]
    num_heads: int
    num_groups: int
    retrieval_heads: int
    retained_groups: int
    packed: int
    scattered_late: int
    scattered: int
    index_sets: int


def count_roles(shape: Shape, options: PlanOptions) -> RoleCounts:
    """Counts from the manifest in `options`, or the expected ones (docs/plan.md, Roles)."""
    heads, groups, size = shape.num_layers * shape.num_heads, shape.num_layers * shape.num_groups, shape.group_size
    if options.roles is not None:
        retrieval, packed = options.roles.num_retrieval_heads, options.roles.num_retained_groups
        scattered_late = scattered = packed
    elif options.granularity == "group":
        packed = scattered_late = scattered = _share(options.retrieval_ratio, groups)
        retrieval = packed * size
    else:
        retrieval = _share(options.retrieval_ratio, heads)
        late = (shape.num_layers - shape.num_layers // 2) * shape.num_groups
        packed = math.ceil(retrieval / size)
        scattered = _expected_groups(retrieval, groups, size)
        # More roles than the later half has heads: that half is full and the rest lies in the earlier one.
        rest = max(retrieval - late * size, 0)
        scattered_late = _expected_groups(retrieval - rest, late, size) + _expected_groups(rest, groups - late, size)
    return RoleCounts(
        source="manifest" if options.roles is not None else "expected",
        num_heads=heads,
        num_groups=groups,
        retrieval_heads=retrieval,
        retained_groups=scattered,
        packed=packed,
        scattered_late=scattered_late,
        scattered=scattered,
        index_sets=retrieval if options.index_keys == "head" else scattered,
    )


def options_of_manifest(options: PlanOptions, roles: Manifest, shape: Shape, model_type: str) -> PlanOptions:
    """Options with everything that the manifest decides taken from it; ValueError when it belongs to another geometry."""
    found = roles.model
    for name, value, wanted in (
        ("model_type", found.model_type, model_type),
        ("num_hidden_layers", found.num_hidden_layers, shape.num_layers),
        ("num_attention_heads", found.num_attention_heads, shape.num_heads),
        ("num_key_value_heads", found.num_key_value_heads, shape.num_groups),
        ("head_dim", found.head_dim, shape.head_dim),
    ):
        if value != wanted:
            raise ValueError(f"roles: model.{name} is {value}, wanted {wanted} as in config.json")
    return dataclasses.replace(
        options,
        granularity=roles.granularity,
        sliding_window=roles.sliding_window,
        sinks=roles.sinks,
        index_dim=roles.indexer.dim,
        index_keys=roles.indexer.keys,
        index_key_dtype=roles.indexer.key_dtype,
        top_p=roles.top_p,
    )


def _share(ratio: float, count: int) -> int:
    return round(ratio * count)


def _expected_groups(retrieval: int, groups: int, size: int) -> int:
    """Expected groups with at least one of `retrieval` heads drawn without replacement from groups * size."""
    if not retrieval:
        return 0
    heads = groups * size
    untouched = math.prod((heads - retrieval - i) / (heads - i) for i in range(size))
    return round(groups * (1 - untouched))


def check_number(name: str, value: Any, low: float, high: float, *, whole: bool) -> None:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}, wanted {'a whole number' if whole else 'a number'} from {low} to {high}")
