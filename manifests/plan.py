"""Memory and time of a conversion and of serving its result, from a config.json alone (no torch, no weights)."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from rtpurbo.manifests import stages
from rtpurbo.manifests.architectures import rope_type_of
from rtpurbo.manifests.assumptions import KEY_BYTES, PlanOptions, RoleCounts, check_number, count_roles, options_of_manifest
from rtpurbo.manifests.parameters import Parameters, Shape, count_parameters, shape_of


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes in bytes and times in seconds; see docs/plan.md for every formula."""

    model_type: str
    context: int
    batch: int
    options: PlanOptions
    shape: Shape
    parameters: Parameters
    roles: RoleCounts
    stages: tuple[stages.Stage, ...]
    warnings: tuple[str, ...]

    @property
    def dense_kv_bytes_per_token(self) -> int:
        """Layers * KV heads * 2 * head_dim * kv_bytes."""
        return self.roles.num_groups * self._pair_bytes

    @property
    def retained_kv_bytes_per_token(self) -> int:
        """The same for the retained groups alone: what grows with the context after conversion, beside the index."""
        return self.roles.retained_groups * self._pair_bytes

    @property
    def index_bytes_per_token(self) -> int:
        """Index sets * index_dim * the bytes of index_key_dtype; 0 with top_p 1, where nothing is scored."""
        if self.options.top_p >= 1:
            return 0
        return self.roles.index_sets * self.options.index_dim * KEY_BYTES[self.options.index_key_dtype]

    @property
    def ring_bytes(self) -> int:
        """Rings of all local groups for one sequence: groups * 2 * head_dim * kv_bytes * (sinks + window)."""
        local = self.roles.num_groups - self.roles.retained_groups
        return local * self._pair_bytes * (self.options.sinks + self.options.sliding_window)

    @property
    def _pair_bytes(self) -> int:
        return 2 * self.shape.head_dim * self.options.kv_bytes

    def cache_bytes(self, num_tokens: int, batch: int = 1) -> int:
        """Converted cache with room for `num_tokens` tokens: growing groups, rings, index keys and an int32 length a sequence."""
        growing = self.retained_kv_bytes_per_token + self.index_bytes_per_token
        return batch * (growing * num_tokens + self.ring_bytes + 4)

    def dense_cache_bytes(self, num_tokens: int, batch: int = 1) -> int:
        """Cache of the unconverted model."""
        return batch * self.dense_kv_bytes_per_token * num_tokens

    def decode(self) -> dict[str, dict[str, float]]:
        """Bytes that one decode step reads at the full context, and the milliseconds that the bandwidth alone asks for.

        converted_shared: the retrieval heads of a group select the same blocks; converted_disjoint: different ones, until the
        whole group is read. The truth lies between.
        """
        o, roles = self.options, self.roles
        weights = self.parameters.read_per_step(self.batch) * o.weight_bytes
        kept = 1.0 if o.top_p >= 1 else o.kept_fraction
        heads_per_group = roles.retrieval_heads / roles.retained_groups if roles.retained_groups else 0.0
        local = roles.num_groups - roles.retained_groups
        fixed = local * self._pair_bytes * min(self.context, o.sinks + o.sliding_window)
        fixed += self.index_bytes_per_token * self.context
        growing = self.retained_kv_bytes_per_token * self.context
        cache = {
            "dense": self.dense_kv_bytes_per_token * self.context,
            "converted_shared": fixed + growing * kept,
            "converted_disjoint": fixed + growing * min(1.0, kept * heads_per_group),
        }
        return {
            name: {
                "weight_bytes": weights,
                "cache_bytes": round(self.batch * size),
                "ms_per_token": (weights + self.batch * size) / o.bandwidth * 1e3,
            }
            for name, size in cache.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values, for --json; the manifest among the options is replaced by its digest."""
        roles = self.options.roles
        options = {f.name: getattr(self.options, f.name) for f in dataclasses.fields(self.options) if f.name != "roles"}
        return {
            "model_type": self.model_type,
            "context": self.context,
            "batch": self.batch,
            "options": {**options, "roles": roles.to_dict()["digest"] if roles else None},
            "parameters": {**dataclasses.asdict(self.parameters), "active": self.parameters.active},
            "roles": dataclasses.asdict(self.roles),
            "cache": {
                "dense_kv_bytes_per_token": self.dense_kv_bytes_per_token,
                "retained_kv_bytes_per_token": self.retained_kv_bytes_per_token,
                "index_bytes_per_token": self.index_bytes_per_token,
                "ring_bytes": self.ring_bytes,
                "dense_bytes": self.dense_cache_bytes(self.context, self.batch),
                "converted_bytes": self.cache_bytes(self.context, self.batch),
            },
            "stages": [{**dataclasses.asdict(stage), "total_bytes": stage.total_bytes} for stage in self.stages],
            "decode": self.decode(),
            "warnings": list(self.warnings),
        }

    def render(self, console: Any) -> None:
        """Print the plan as tables on a rich console."""
        from rtpurbo.manifests.report import plan_tables

        for table in plan_tables(self):
            console.print(table)
        for warning in self.warnings:
            console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)


def plan(config: dict[str, Any], *, context: int, batch: int = 1, options: PlanOptions | None = None) -> Plan:
    """Plan the conversion of the model that `config` (the object in config.json) describes.

    context: tokens per sequence to serve, >= 1; batch: sequences served together, >= 1. ValueError for models that cannot be
    converted (with the reason), for values out of range and for roles of another geometry.
    """
    assumed = PlanOptions() if options is None else options
    check_number("context", context, 1, 1 << 30, whole=True)
    check_number("batch", batch, 1, 1 << 20, whole=True)
    shape, parameters = shape_of(config), count_parameters(config)
    if assumed.roles is not None:
        assumed = options_of_manifest(assumed, assumed.roles, shape, config["model_type"])
    if assumed.index_dim > shape.head_dim:
        raise ValueError(f"index_dim is {assumed.index_dim}, wanted at most head_dim {shape.head_dim}")
    roles = count_roles(shape, assumed)
    bare = Plan(
        model_type=config["model_type"],
        context=context,
        batch=batch,
        options=assumed,
        shape=shape,
        parameters=parameters,
        roles=roles,
        stages=(),
        warnings=(),
    )
    work = stages.Work(
        shape=shape,
        parameters=parameters,
        options=assumed,
        num_retrieval_heads=roles.retrieval_heads,
        num_index_sets=roles.index_sets,
    )
    planned = dataclasses.replace(
        bare,
        stages=(
            stages.calibration(work),
            stages.indexer(work),
            stages.distillation(work),
            stages.serving_dense(work, bare.dense_cache_bytes(context, batch), context, batch),
            stages.serving(work, bare.cache_bytes(context, batch), context, batch),
        ),
    )
    return dataclasses.replace(planned, warnings=tuple(_warnings(planned, config)))


def _warnings(planned: Plan, config: dict[str, Any]) -> list[str]:
    found = []
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    reach = config["max_position_embeddings"]
    if rope_type_of(config) == "yarn":
        reach = max(reach, int(original * rope.get("factor", 1)))
    if planned.context > reach:
        factor = math.ceil(planned.context / original * 100) / 100
        found.append(
            f"context {planned.context} exceeds the {reach} positions of the model: "
            f"calibrate, train and serve with --rope-scaling yarn:{factor:g}"
        )
    limit = planned.options.gpu_memory_bytes
    for stage in planned.stages:
        if stage.total_bytes > limit:
            found.append(
                f"{stage.name} needs {stage.total_bytes / 1e9:.1f} GB, more than one GPU of {limit / 1e9:.0f} GB: "
                f"at least {math.ceil(stage.total_bytes / limit)} GPUs or a smaller setting"
            )
    window = planned.options.sinks + planned.options.sliding_window
    if planned.context <= window:
        found.append(f"context {planned.context} lies within sinks and window ({window} tokens): conversion saves nothing there")
    elif planned.cache_bytes(planned.context) > 0.8 * planned.dense_cache_bytes(planned.context):
        found.append("the converted cache is more than 80 % of the dense one: choose granularity group or a smaller ratio")
    return found
