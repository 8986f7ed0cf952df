"""Every option of a conversion with its default: one frozen dataclass, presets, and TOML in and out."""

import dataclasses
import tomllib
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

RECIPE_NAME = "recipe.toml"
# Not part of what a conversion computes on paper: they stay out of the manifest and its digest.
_LOCAL_FIELDS = ("device", "indexer_data", "distill_data", "checkpoint_every")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All options of `rtpurbo convert`; the defaults are the preset `paper` (arXiv 2605.16928; ours where it is silent).

    Lengths are in tokens, learning rates per optimiser step, ratios in [0, 1]. `indexer_data` and `distill_data` name a data
    source as `converter.data` reads it; empty means the paper's data set for that stage.
    """

    preset: str = "paper"
    seed: int = 0
    device: str = "auto"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    # Roles. `group` picks whole KV groups, the only choice that saves memory; see docs/method.md.
    granularity: Literal["head", "group"] = "group"
    group_threshold: float = 0.0
    retrieval_ratio: float = 0.15
    sliding_window: int = 8192
    sinks: int = 4
    dense_below: int = 0
    rope_scaling: str = ""

    # Indexer and selection.
    index_dim: int = 16
    index_keys: Literal["head", "group"] = "head"
    index_key_dtype: Literal["bfloat16", "float8_e4m3fn", "float32"] = "bfloat16"
    top_p: float = 0.9
    decode_block: int = 64
    prefill_block: int = 128
    prefill_pattern: Literal["dense", "topp"] = "dense"
    prefill_top_p: float = 0.0

    # Calibration: needle documents.
    calibration_documents: int = 4
    calibration_tokens: int = 32768
    needle_tokens: int = 32

    # Stage 1: indexer alignment.
    indexer_data: str = ""
    indexer_steps: int = 600
    indexer_min_tokens: int = 32768
    indexer_max_tokens: int = 81920
    indexer_learning_rate: float = 1e-3
    indexer_warmup: int = 100

    # Stage 2: self-distillation.
    distill_data: str = ""
    distill_steps: int = 600
    distill_batch: int = 8
    distill_min_tokens: int = 32768
    distill_max_tokens: int = 65536
    answer_tokens: int = 300
    distill_learning_rate: float = 3e-6
    distill_warmup: int = 200
    train: Literal["all", "attention", "lora"] = "all"
    lora_rank: int = 16
    teacher_top_k: int = 10

    realign_steps: int = 0

    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    checkpoint_every: int = 20

    # Held-out evaluation, before and after each stage.
    evaluation_documents: int = 4
    evaluation_tokens: int = 32768
    evaluation_needles: int = 16

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            _check_type(f.name, getattr(self, f.name), hints[f.name])
            if hints[f.name] is float:  # 1 and 1.0 are one recipe, so they must be one digest
                object.__setattr__(self, f.name, float(getattr(self, f.name)))
        for name, low, high in _RANGES:
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted {low} ... {high}")
        for name in ("decode_block", "prefill_block"):
            if getattr(self, name) & (getattr(self, name) - 1):
                raise ValueError(f"{name} is {getattr(self, name)}, wanted a power of two")
        if self.prefill_top_p and self.prefill_pattern != "topp":
            raise ValueError(f"prefill_top_p {self.prefill_top_p} wants prefill_pattern topp, found {self.prefill_pattern}")
        for stage in ("indexer", "distill"):
            low, high = getattr(self, f"{stage}_min_tokens"), getattr(self, f"{stage}_max_tokens")
            if low > high:
                raise ValueError(f"{stage}_min_tokens {low} is above {stage}_max_tokens {high}")
        if self.answer_tokens >= self.distill_min_tokens:
            raise ValueError(f"answer_tokens {self.answer_tokens} must be below distill_min_tokens {self.distill_min_tokens}")

    def to_toml(self) -> str:
        """The recipe as TOML, one key a field."""
        import tomli_w

        return tomli_w.dumps({"recipe": dataclasses.asdict(self)})

    @classmethod
    def from_toml(cls, path: Path) -> "Recipe":
        """Read a recipe written by `to_toml`; ValueError names file and key of anything unknown or out of range."""
        try:
            body = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"{path}: not a readable recipe ({error})") from error
        values = body.get("recipe")
        if not isinstance(values, dict) or set(body) != {"recipe"}:
            raise ValueError(f"{path}: has the tables {sorted(body)}, wanted [recipe] alone")
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{path}: unknown key {unknown[0]!r} in [recipe]")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def provenance(self) -> dict[str, Any]:
        """The fields that determine the result, for the manifest: no device, no paths, no checkpoint interval."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in _LOCAL_FIELDS}

    @classmethod
    def preset_named(cls, name: str, **overrides: Any) -> "Recipe":
        """A preset with some fields replaced; unknown names are refused with the list of presets."""
        if name not in PRESETS:
            raise ValueError(f"preset is {name!r}, wanted one of {', '.join(PRESETS)}")
        return cls(**{"preset": name, **PRESETS[name], **overrides})


# `demo`: the same stages at lengths that two CPU cores finish in minutes; window and lengths shrink together, so that text
# outside the window exists. Learning rates are higher because there are few steps.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "demo": {
        "sliding_window": 256,
        "calibration_documents": 4,
        "calibration_tokens": 2048,
        "indexer_data": "python-docs",
        "indexer_steps": 24,
        "indexer_min_tokens": 1536,
        "indexer_max_tokens": 2048,
        "indexer_learning_rate": 3e-3,
        "indexer_warmup": 4,
        "distill_data": "python-docs",
        "distill_steps": 12,
        "distill_batch": 1,
        "distill_min_tokens": 1280,
        "distill_max_tokens": 1536,
        "answer_tokens": 256,
        "distill_learning_rate": 1e-5,
        "distill_warmup": 2,
        "checkpoint_every": 8,
        "evaluation_documents": 2,
        "evaluation_tokens": 1536,
        "evaluation_needles": 8,
    },
}

# One line for each option, shown by `--help`.
HELP: dict[str, str] = {
    "seed": "Seed of data order, needles and random baselines.",
    "device": "auto, cpu, cuda or cuda:N.",
    "dtype": "Compute dtype; trained weights keep float32 copies.",
    "granularity": "Choose retrieval heads one by one, or whole KV groups (saves memory).",
    "group_threshold": "With groups: heads of a retained group that score below stay local.",
    "retrieval_ratio": "Share of query heads (or KV groups) that retrieve.",
    "sliding_window": "Keys that local heads see, the query's own included.",
    "sinks": "First tokens that local heads always see.",
    "dense_below": "Prompts shorter than this stay full attention (0: never).",
    "rope_scaling": "Stretch the context first, as yarn:4 or linear:2.",
    "index_dim": "Dimension of index queries and keys.",
    "index_keys": "One key projection per retrieval head, or one per KV group.",
    "index_key_dtype": "How index keys are cached; fp8 halves their bytes.",
    "top_p": "Share of the indexer's softmax mass that a decode step reads.",
    "decode_block": "Keys per block in decode selection.",
    "prefill_block": "Keys per block in prefill.",
    "prefill_pattern": "Retrieval heads in prefill: all keys, or blocks by top-p.",
    "prefill_top_p": "Mass that prefill keeps with topp (0: as --top-p).",
    "calibration_documents": "Needle documents.",
    "calibration_tokens": "Tokens of the longest needle document.",
    "needle_tokens": "Tokens of the needle.",
    "indexer_data": "Data of calibration and stage 1 alone.",
    "indexer_steps": "Steps of stage 1, one document each.",
    "indexer_min_tokens": "Shortest document of stage 1.",
    "indexer_max_tokens": "Longest document of stage 1.",
    "indexer_learning_rate": "Peak learning rate of stage 1.",
    "indexer_warmup": "Warm-up steps of stage 1.",
    "distill_data": "Data of stage 2 alone.",
    "distill_steps": "Steps of stage 2.",
    "distill_batch": "Documents per step of stage 2.",
    "distill_min_tokens": "Shortest document of stage 2.",
    "distill_max_tokens": "Longest document of stage 2.",
    "answer_tokens": "Answer tokens of a document that marks none.",
    "distill_learning_rate": "Learning rate of stage 2 after warm-up.",
    "distill_warmup": "Warm-up steps of stage 2.",
    "train": "Weights that stage 2 changes; routers and experts never.",
    "lora_rank": "Rank with --train lora.",
    "teacher_top_k": "Teacher logits kept per answer token.",
    "realign_steps": "Steps of a second, short stage 1 on the distilled weights (0: none).",
    "weight_decay": "AdamW weight decay of both stages.",
    "gradient_clip": "Gradient norm limit of both stages.",
    "checkpoint_every": "Steps between saved states.",
    "evaluation_documents": "Held-out documents.",
    "evaluation_tokens": "Tokens of a held-out document.",
    "evaluation_needles": "Held-out needle questions (0: none).",
}

_RANGES: tuple[tuple[str, float, float], ...] = (
    ("seed", 0, 2**31 - 1),
    ("group_threshold", 0, 1),
    ("retrieval_ratio", 0, 1),
    ("sliding_window", 1, 1 << 24),
    ("sinks", 0, 1 << 16),
    ("dense_below", 0, 1 << 24),
    ("index_dim", 1, 256),
    ("top_p", 1e-6, 1),
    ("decode_block", 1, 4096),
    ("prefill_block", 1, 4096),
    ("prefill_top_p", 0, 1),
    ("calibration_documents", 1, 1024),
    ("calibration_tokens", 64, 1 << 24),
    ("needle_tokens", 4, 4096),
    ("indexer_steps", 0, 10**6),
    ("indexer_min_tokens", 16, 1 << 24),
    ("indexer_max_tokens", 16, 1 << 24),
    ("indexer_learning_rate", 0, 1),
    ("indexer_warmup", 0, 10**6),
    ("distill_steps", 0, 10**6),
    ("distill_batch", 1, 4096),
    ("distill_min_tokens", 16, 1 << 24),
    ("distill_max_tokens", 16, 1 << 24),
    ("answer_tokens", 1, 1 << 20),
    ("distill_learning_rate", 0, 1),
    ("distill_warmup", 0, 10**6),
    ("lora_rank", 1, 1024),
    ("teacher_top_k", 1, 1024),
    ("realign_steps", 0, 10**6),
    ("weight_decay", 0, 1),
    ("gradient_clip", 1e-6, 1e6),
    ("checkpoint_every", 1, 10**6),
    ("evaluation_documents", 1, 1024),
    ("evaluation_tokens", 64, 1 << 24),
    ("evaluation_needles", 0, 4096),
)


def _check_type(name: str, value: Any, hint: Any) -> None:
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{name} is {value!r}, wanted one of {', '.join(typing.get_args(hint))}")
    elif hint is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name} is {value!r}, wanted a number")
    elif isinstance(value, bool) or not isinstance(value, hint):
        raise ValueError(f"{name} is {value!r}, wanted {'a whole number' if hint is int else 'text'}")
