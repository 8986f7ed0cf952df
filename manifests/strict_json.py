"""JSON text to Python values, with everything that readers disagree about refused."""

import json
import math
from typing import Any

MAX_DEPTH = 64


def parse_strict(text: str) -> Any:
    """json.loads that refuses duplicate keys, NaN and infinities (also as 1e999) and nesting beyond MAX_DEPTH, by ValueError."""
    try:
        body = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from error
    _check_depth(body)
    return body


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"duplicate key {key[:80]!r}")
        found[key] = value
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _check_depth(body: Any) -> None:
    """What the parser still accepts could exhaust the stack when it is written again."""
    level, depth = [body], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        depth += 1
        level = [child for node in level if isinstance(node, dict | list) for child in (node.values() if isinstance(node, dict) else node)]
