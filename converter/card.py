"""What is published beside the weights: the model card, and the recipe without local paths."""

import json
import re
import tomllib
from collections.abc import Iterator
from typing import Any

from rtpurbo.converter.sources import SUFFIXES
from rtpurbo.manifests.manifest import INDEXER_NAME, MANIFEST_NAME, Manifest

PAPER_URL = "https://arxiv.org/abs/2605.16928"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ABSOLUTE = re.compile(r"(/|~/|\\|[A-Za-z]:[\\/]|file:).")


def model_card(manifest: Manifest, *, repo_id: str | None = None, license: str | None = None) -> str:
    """README.md with the Hub's metadata in front. repo_id: the name in the examples. license: the metadata has none if None.

    `base_model` is in the metadata only when it is a Hub id. Every figure is the manifest's.
    """
    base = manifest.base_model
    is_hub_id = bool(_HUB_ID.fullmatch(base.id))
    front: dict[str, Any] = {
        **({"base_model": base.id} if is_hub_id else {}),
        **({"license": license} if license else {}),
        "library_name": "rtpurbo",
        "pipeline_tag": "text-generation",
        "tags": ["rtpurbo", "sparse-attention", "long-context", manifest.model.model_type],
    }
    # JSON values are valid YAML, whatever characters a name has.
    metadata = "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items())
    revision = f", revision `{_inline(base.revision)}`" if base.revision else ""
    name = repo_id or "user/name"
    origin = f"[{base.id}](https://huggingface.co/{base.id})" if is_hub_id else f"`{_inline(base.id)}`"
    return f"""---
{metadata}---

# {_inline(base.id.split("/")[-1])} with head-wise sparse attention

{origin}{revision}, converted by rtpurbo: a few *retrieval heads* keep the whole context and read a small, dynamically chosen
part of it; all other heads see the first tokens and a sliding window. The method is RTPurbo ([arXiv 2605.16928]({PAPER_URL})).

## Roles

{_roles(manifest)}

## Use

Sparse, with rtpurbo:

```python
import rtpurbo

model = rtpurbo.load({json.dumps(name)})
```

Dense, with transformers alone. The folder is an ordinary checkpoint; `{MANIFEST_NAME}` and `{INDEXER_NAME}` are then unused:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})
model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})
```

## Metrics

{_table(manifest.metrics, "metric") or "No metrics were measured."}

## Recipe

{_table(manifest.recipe, "option") or "The manifest has no recipe."}

## Limits

- Roles and indexer were calibrated at the lengths in the recipe; longer contexts, other languages and other tasks are not
  covered by the metrics above.
- {_prefill(manifest)}
- {_dense_below(manifest)}
- Biases and limits of the base model remain.
"""


def published_recipe(content: bytes, source: str = "recipe.toml") -> tuple[str, list[str]]:
    """recipe.toml for publication and the keys that were changed: a local path becomes its last part, all else stays as it is.

    Local are values that begin with / ~ . \\ or a drive, or end like a data file. Errors: ValueError for what is not TOML in UTF-8.
    """
    try:
        text = content.decode()
        body = tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{source}: not valid TOML ({error})") from error
    changed = [key for key, value in _strings("", body) if _is_local(value)]
    if not changed:
        return text, []
    import tomli_w

    return tomli_w.dumps(_without_paths(body)), changed


def absolute_path_in(body: dict[str, Any]) -> tuple[str, str] | None:
    """(dotted key, value) of the first string in nested objects and lists that is an absolute local path, or None."""
    return next(((key, text) for key, text in _strings("", body) if _ABSOLUTE.match(text)), None)


def _roles(manifest: Manifest) -> str:
    shape = manifest.model
    heads = shape.num_hidden_layers * shape.num_attention_heads
    groups = shape.num_hidden_layers * shape.num_key_value_heads
    layers = [i for i, layer in enumerate(manifest.layers) if layer.retrieval_heads]
    where = f"in {len(layers)} of {shape.num_hidden_layers} layers ({layers[0]} to {layers[-1]})" if layers else "in no layer"
    indexer = manifest.indexer
    return f"""| | |
|---|---|
| retrieval heads | {manifest.num_retrieval_heads} of {heads} ({manifest.num_retrieval_heads / heads:.1%}), {where} |
| KV groups with a full cache | {manifest.num_retained_groups} of {groups} ({manifest.num_retained_groups / groups:.1%}) |
| granularity | {manifest.granularity} |
| local heads | {manifest.sinks} sink tokens and a sliding window of {manifest.sliding_window} tokens |
| indexer | {indexer.dim} dimensions, one key projection per {indexer.keys}, keys cached as {indexer.key_dtype} |
| selection | top-p {manifest.top_p:g} over blocks of {manifest.decode_block} tokens |"""


def _prefill(manifest: Manifest) -> str:
    if manifest.prefill_pattern == "dense":
        return f"Prefill of the retrieval heads is dense; the selection (top-p {manifest.top_p:g}) applies to decoding."
    return (
        f"Prefill of the retrieval heads is sparse too: a block of {manifest.prefill_block} queries keeps {manifest.prefill_mass:g} of its "
        f"pooled index mass. Training ran it dense. Decoding selects with top-p {manifest.top_p:g}."
    )


def _dense_below(manifest: Manifest) -> str:
    if manifest.dense_below:
        return f"Prompts shorter than {manifest.dense_below} tokens run with full attention."
    return "Short prompts run sparse too; a gain in speed starts at long contexts."


def _table(values: dict[str, Any], title: str) -> str:
    rows = [f"| {_inline(key)} | {_inline(value)} |" for key, value in _leaves("", values)]
    return "\n".join([f"| {title} | value |", "|---|---|", *rows]) if rows else ""


def _inline(value: Any) -> str:
    """A value as text that cannot leave its line, table cell or code span."""
    text = f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested objects; lists count as one value."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(f"{key}.{name}" if key else str(name), item)
    else:
        yield key, value


def _strings(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(f"{key}.{name}" if key else str(name), item)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _strings(f"{key}.{i}", item)
    elif isinstance(value, str):
        yield key, value


def _is_local(value: str) -> bool:
    return bool(_ABSOLUTE.match(value)) or value.startswith("./") or value.startswith("..") or _is_data_file(value)


def _is_data_file(value: str) -> bool:
    return value.endswith(SUFFIXES) and re.search(r"[/\\]", value) is not None


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and _is_local(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value
