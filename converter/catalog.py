"""Names of models: short names that stand for Hub ids, and the nearest known names when somebody mistypes one."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DEMO = "demo"

KNOWN_IDS = (
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "HuggingFaceTB/SmolLM2-360M-Instruct",
    "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "Qwen/Qwen2-0.5B-Instruct",
    "Qwen/Qwen2-1.5B-Instruct",
    "Qwen/Qwen2-7B-Instruct",
    "Qwen/Qwen2-72B-Instruct",
    "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen/Qwen2.5-3B-Instruct",
    "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen2.5-7B-Instruct-1M",
    "Qwen/Qwen2.5-14B-Instruct",
    "Qwen/Qwen2.5-14B-Instruct-1M",
    "Qwen/Qwen2.5-32B-Instruct",
    "Qwen/Qwen2.5-72B-Instruct",
    "Qwen/Qwen2.5-Coder-7B-Instruct",
    "Qwen/Qwen2.5-Coder-32B-Instruct",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-1.7B",
    "Qwen/Qwen3-4B",
    "Qwen/Qwen3-4B-Instruct-2507",
    "Qwen/Qwen3-4B-Thinking-2507",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3-14B",
    "Qwen/Qwen3-32B",
    "Qwen/Qwen3-30B-A3B",
    "Qwen/Qwen3-30B-A3B-Instruct-2507",
    "Qwen/Qwen3-30B-A3B-Thinking-2507",
    "Qwen/Qwen3-Coder-30B-A3B-Instruct",
    "Qwen/Qwen3-235B-A22B-Instruct-2507",
    "Qwen/Qwen3-Coder-480B-A35B-Instruct",
    "meta-llama/Meta-Llama-3-8B-Instruct",
    "meta-llama/Meta-Llama-3-70B-Instruct",
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama/Llama-3.1-70B-Instruct",
    "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-3.2-1B-Instruct",
    "meta-llama/Llama-3.2-3B-Instruct",
    "meta-llama/Llama-3.3-70B-Instruct",
    "mistralai/Mistral-7B-v0.3",
    "mistralai/Mistral-7B-Instruct-v0.2",
    "mistralai/Mistral-7B-Instruct-v0.3",
    "mistralai/Mistral-Nemo-Instruct-2407",
)

# Names that people and papers use for something whose Hub id is another one.
ALIASES = {
    "Qwen/Qwen3-Coder-30B-A3B": "Qwen/Qwen3-Coder-30B-A3B-Instruct",
    "Qwen/Qwen3-Coder-480B-A35B": "Qwen/Qwen3-Coder-480B-A35B-Instruct",
    "Qwen/Qwen3-0.6B-Instruct": "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-1.7B-Instruct": "Qwen/Qwen3-1.7B",
    "Qwen/Qwen3-4B-Instruct": "Qwen/Qwen3-4B-Instruct-2507",
    "Qwen/Qwen3-8B-Instruct": "Qwen/Qwen3-8B",
    "Qwen/Qwen3-14B-Instruct": "Qwen/Qwen3-14B",
    "Qwen/Qwen3-32B-Instruct": "Qwen/Qwen3-32B",
    "Qwen/Qwen3-30B-A3B-Instruct": "Qwen/Qwen3-30B-A3B-Instruct-2507",
    "Qwen/Qwen3-235B-A22B-Instruct": "Qwen/Qwen3-235B-A22B-Instruct-2507",
    "meta-llama/Llama-3-8B-Instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "meta-llama/Llama-3-70B-Instruct": "meta-llama/Meta-Llama-3-70B-Instruct",
    "meta-llama/Meta-Llama-3.1-8B": "meta-llama/Llama-3.1-8B",
    "meta-llama/Meta-Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama/Meta-Llama-3.1-70B-Instruct": "meta-llama/Llama-3.1-70B-Instruct",
    "meta-llama/Llama-3.3-70B": "meta-llama/Llama-3.3-70B-Instruct",
    "mistralai/Mistral-7B-v0.3-Instruct": "mistralai/Mistral-7B-Instruct-v0.3",
    "mistralai/Mistral-Nemo-Instruct": "mistralai/Mistral-Nemo-Instruct-2407",
}

# What can be typed -> Hub id, in lower case: ids, aliases, and either without the organisation ("qwen3-8b").
_BY_NAME = {
    key: target
    for name, target in [*ALIASES.items(), *((known, known) for known in KNOWN_IDS)]
    for key in (name.lower(), name.split("/")[1].lower())
}
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """What a name stands for.

    kind: what it is. target: the word "demo", the folder, or the Hub id. substituted: a sentence when target is another Hub id.
    """

    name: str
    kind: Literal["demo", "folder", "hub"]
    target: str
    substituted: str | None = None


def resolve_model(name: str) -> ResolvedModel:
    """What `name` stands for: "demo", an existing local folder, a known short name, or any Hub id of the form org/name.

    No network. An existing folder goes before a Hub id of the same name. ValueError with the nearest known names otherwise, and
    for files. Resolving a target gives the target again.
    """
    if name == DEMO:
        return ResolvedModel(name=name, kind="demo", target=DEMO)
    path = Path(name).expanduser() if name else Path("/dev/null")
    if name and path.is_dir():
        return ResolvedModel(name=name, kind="folder", target=str(path))
    if name and path.is_file():
        raise ValueError(f"{name}: is a file, wanted a model folder, a Hub id or `{DEMO}`")
    known = _BY_NAME.get(name.lower())
    if known is not None:
        said = None if known == name else f"{name} stands for the Hub id {known}"
        return ResolvedModel(name=name, kind="hub", target=known, substituted=said)
    if _HUB_ID.fullmatch(name) and not name.endswith((".", "-")) and ".." not in name and "--" not in name:
        return ResolvedModel(name=name, kind="hub", target=name)
    raise ValueError(f"{name!r}: is neither a folder nor a Hub id of the form org/name nor `{DEMO}`{nearest_names(name)}")


def nearest_names(name: str) -> str:
    """ "; nearest known names: A, B, C", or "" when nothing is near."""
    lowered = name.lower()
    near = difflib.get_close_matches(lowered, list(_BY_NAME), n=8, cutoff=0.5)
    ids = list(dict.fromkeys(_BY_NAME[key] for key in near if _BY_NAME[key] != name))[:3]
    return f"; nearest known names: {', '.join(ids)}" if ids else ""
