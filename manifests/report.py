"""A manifest or a plan for people and for scripts: JSON description, terminal tables and a heat map of the head roles."""

from typing import TYPE_CHECKING, Any

from rtpurbo.manifests.assumptions import KEY_BYTES
from rtpurbo.manifests.heatmap import plot
from rtpurbo.manifests.manifest import SCHEMA_VERSION, LayerRoles, Manifest

if TYPE_CHECKING:
    from rtpurbo.manifests.plan import Plan

__all__ = ["CONTEXTS", "describe", "format_bytes", "format_seconds", "plan_tables", "plot", "render", "role_string"]

CONTEXTS = {"32K": 1 << 15, "128K": 1 << 17, "1M": 1 << 20}
# One character per query head in the terminal.
RETRIEVAL, LOCAL_IN_RETAINED, LOCAL = "#", "o", "."
_DECODE_NAMES = {
    "dense": "dense",
    "converted_shared": "converted, heads of a group select alike",
    "converted_disjoint": "converted, heads of a group select apart",
}


def describe(manifest: Manifest, kv_bytes: int = 2) -> dict[str, Any]:
    """The manifest's facts as JSON values, for `rtpurbo inspect --json`.

    kv_bytes: bytes per element of the key-value cache that the sizes assume (2: bfloat16), >= 1. Sizes are bytes for one
    sequence; `sparsity` is the share of query heads that are local, `kv_sparsity` the share of KV groups without full cache.
    """
    shape = manifest.model
    body = manifest.to_dict()
    num_heads = shape.num_hidden_layers * shape.num_attention_heads
    num_groups = shape.num_hidden_layers * shape.num_key_value_heads
    return {
        "schema_version": SCHEMA_VERSION,
        "digest": body["digest"],
        "base_model": body["base_model"],
        "model": body["model"],
        "granularity": manifest.granularity,
        "group_threshold": manifest.group_threshold,
        "num_heads": num_heads,
        "num_retrieval_heads": manifest.num_retrieval_heads,
        "num_groups": num_groups,
        "num_retained_groups": manifest.num_retained_groups,
        "sparsity": 1 - manifest.num_retrieval_heads / num_heads,
        "kv_sparsity": 1 - manifest.num_retained_groups / num_groups,
        "layers": [
            {"layer": i, "roles": role_string(layer, shape.group_size), "score_max": max(layer.scores), **entry}
            for i, (layer, entry) in enumerate(zip(manifest.layers, body["layers"], strict=True))
        ],
        "sliding_window": manifest.sliding_window,
        "sinks": manifest.sinks,
        "indexer": body["indexer"],
        "top_p": manifest.top_p,
        "decode_block": manifest.decode_block,
        "prefill_block": manifest.prefill_block,
        "prefill_pattern": manifest.prefill_pattern,
        "prefill_top_p": manifest.prefill_mass if manifest.prefill_pattern == "topp" else None,
        "dense_below": manifest.dense_below,
        "cache": _cache_sizes(manifest, kv_bytes),
        "calibration": body["calibration"],
        "recipe": body["recipe"],
        "metrics": body["metrics"],
        "libraries": body["libraries"],
        "files": body["files"],
    }


def role_string(layer: LayerRoles, group_size: int) -> str:
    """One character per query head (# retrieval, o local in a retained group, . local), a space between KV groups."""
    heads, groups = set(layer.retrieval_heads), set(layer.retained_groups)
    local = [LOCAL_IN_RETAINED if h // group_size in groups else LOCAL for h in range(len(layer.scores))]
    marks = [RETRIEVAL if h in heads else mark for h, mark in enumerate(local)]
    return " ".join("".join(marks[i : i + group_size]) for i in range(0, len(marks), group_size))


def render(manifest: Manifest, console: Any) -> None:
    """Print summary, sizes and one row per layer on a rich console."""
    from rich.table import Table
    from rich.text import Text

    facts = describe(manifest)
    summary = Table(title=Text(f"{manifest.base_model.id} ({manifest.model.model_type})"), show_header=False)
    for name, value in _summary(manifest, facts):
        summary.add_row(name, Text(value))
    console.print(summary)

    sizes = Table(title="Cache of one sequence (bfloat16)")
    for column in ("tokens", "dense", "converted", "of which index", "saved"):
        sizes.add_column(column, justify="right")
    for name in CONTEXTS:
        at = facts["cache"]["at"][name]
        saved = 1 - at["converted_bytes"] / at["dense_bytes"]
        sizes.add_row(name, *(format_bytes(at[k]) for k in ("dense_bytes", "converted_bytes", "index_bytes")), f"{saved:.1%}")
    console.print(sizes)

    layers = Table(caption="# retrieval   o local in a group with full cache   . local", min_width=60)
    layers.add_column("layer", justify="right")
    layers.add_column("query heads by KV group", overflow="fold")
    layers.add_column("score max", justify="right")
    for entry in facts["layers"]:
        roles = Text()
        for character in entry["roles"]:
            roles.append(character, style={RETRIEVAL: "bold dark_orange", LOCAL_IN_RETAINED: "cyan"}.get(character, "dim"))
        layers.add_row(str(entry["layer"]), roles, f"{entry['score_max']:.3f}")
    console.print(layers)


def plan_tables(plan: "Plan") -> list[Any]:
    """The rich tables of a plan: model and roles, cache, stages, decode."""
    from rich.table import Table

    p, roles = plan.parameters, plan.roles
    model = Table(title=f"{plan.model_type}: {plan.context:,} tokens x {plan.batch}", show_header=False)
    model.add_row("parameters", f"{p.total / 1e9:.3f} B, active {p.active / 1e9:.3f} B")
    model.add_row("retrieval heads", f"{roles.retrieval_heads} of {roles.num_heads} ({roles.source})")
    model.add_row("KV groups with full cache", f"{roles.retained_groups} of {roles.num_groups}")
    if roles.packed != roles.scattered:
        model.add_row("  roles filling whole groups", f"{roles.packed} (least possible)")
        model.add_row("  scattered over the later half", f"{roles.scattered_late} (expected)")
        model.add_row("  scattered over all layers", f"{roles.scattered} (expected; used below)")
    model.add_row("KV per token, dense", format_bytes(plan.dense_kv_bytes_per_token))
    model.add_row("KV per token, converted", format_bytes(plan.retained_kv_bytes_per_token))
    model.add_row("index keys per token", format_bytes(plan.index_bytes_per_token))
    model.add_row("rings per sequence", format_bytes(plan.ring_bytes))
    model.add_row("cache, dense", format_bytes(plan.dense_cache_bytes(plan.context, plan.batch)))
    model.add_row("cache, converted", format_bytes(plan.cache_bytes(plan.context, plan.batch)))

    stages = Table(title="One GPU per stage")
    for column, justify in (("stage", "left"), ("GPU memory", "right"), ("time", "right"), ("largest parts", "left")):
        stages.add_column(column, justify=justify)  # pyright: ignore[reportArgumentType]
    for stage in plan.stages:
        parts = sorted(stage.memory_bytes.items(), key=lambda item: -item[1])[:3]
        text = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts)
        time = "" if stage.seconds is None else format_seconds(stage.seconds)
        stages.add_row(stage.name, format_bytes(stage.total_bytes), time, text)

    decode = Table(title="Decode: bytes read per step and what the bandwidth alone asks for")
    for column in ("", "weights", "cache", "ms per token"):
        decode.add_column(column, justify="right" if column else "left")
    for name, row in plan.decode().items():
        decode.add_row(
            _DECODE_NAMES[name],
            format_bytes(row["weight_bytes"]),
            format_bytes(row["cache_bytes"]),
            f"{row['ms_per_token']:.2f}",
        )
    return [model, stages, decode]


def format_bytes(size: float) -> str:
    """Bytes with a decimal unit, as GPU memory is sold: 141 GB = 141e9 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def format_seconds(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads well."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _cache_sizes(manifest: Manifest, kv_bytes: int) -> dict[str, Any]:
    shape = manifest.model
    pair = 2 * shape.head_dim * kv_bytes
    num_groups, retained = shape.num_hidden_layers * shape.num_key_value_heads, manifest.num_retained_groups
    sets = manifest.num_retrieval_heads if manifest.indexer.keys == "head" else retained
    # With top_p 1 nothing is scored, so no index keys are cached.
    index = sets * manifest.indexer.dim * KEY_BYTES[manifest.indexer.key_dtype] if manifest.top_p < 1 else 0
    rings = (num_groups - retained) * pair * (manifest.sinks + manifest.sliding_window)
    return {
        "kv_bytes_per_element": kv_bytes,
        "dense_bytes_per_token": num_groups * pair,
        "retained_bytes_per_token": retained * pair,
        "index_bytes_per_token": index,
        "ring_bytes": rings,
        "at": {
            name: {
                "num_tokens": tokens,
                "dense_bytes": num_groups * pair * tokens,
                "converted_bytes": (retained * pair + index) * tokens + rings,
                "index_bytes": index * tokens,
            }
            for name, tokens in CONTEXTS.items()
        },
    }


def _prefill(manifest: Manifest) -> str:
    if manifest.prefill_pattern == "dense":
        return "dense"
    return f"{manifest.prefill_pattern} {manifest.prefill_mass:g} in blocks of {manifest.prefill_block}"


def _summary(manifest: Manifest, facts: dict[str, Any]) -> list[tuple[str, str]]:
    indexer = manifest.indexer
    rows = [
        ("digest", facts["digest"]),
        ("revision", manifest.base_model.revision or "not recorded"),
        ("retrieval heads", f"{facts['num_retrieval_heads']} of {facts['num_heads']} ({facts['sparsity']:.1%} local)"),
        ("KV groups with full cache", f"{facts['num_retained_groups']} of {facts['num_groups']}"),
        ("local heads", f"window {manifest.sliding_window}, sinks {manifest.sinks}, dense below {manifest.dense_below} tokens"),
        ("indexer", f"{indexer.dim} dimensions, keys per {indexer.keys}, {indexer.key_dtype}, scale {indexer.scale:g}"),
        ("selection", f"top-p {manifest.top_p:g}, decode block {manifest.decode_block}, prefill {_prefill(manifest)}"),
    ]
    rows += [(f"metric {name}", f"{value}") for name, value in sorted(manifest.metrics.items()) if not isinstance(value, dict | list)]
    rows += [(f"file {name}", f"{format_bytes(f.size_bytes)}, sha256 {f.sha256[:16]}...") for name, f in manifest.files.items()]
    return rows
