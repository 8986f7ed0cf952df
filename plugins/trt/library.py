"""Which TensorRT: `tensorrt`, else `tensorrt_rtx`; both have one Python API."""

import importlib.util
from pathlib import Path
from typing import Any, Literal

LibraryName = Literal["tensorrt", "tensorrt-rtx"]
MODULES: dict[str, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
# The carrier node reaches a plugin written in Python in this release of tensorrt-rtx alone (see docs/tensorrt.md).
CARRIER_VERSION = "1.6.1.120"


def load_library(name: str | None = None) -> tuple[str, Any]:
    """(name, module) of the wanted library, or of the first that is installed; ValueError says what to install."""
    if name is not None and name not in MODULES:
        raise ValueError(f"library is {name!r}, wanted {' or '.join(MODULES)}")
    reasons = []
    for candidate in MODULES if name is None else (name,):
        try:
            module = importlib.import_module(MODULES[candidate])
            if candidate == "tensorrt-rtx":
                _link_by_plain_name()
            return candidate, module
        except (ImportError, OSError) as error:
            reasons.append(f"{candidate}: {error}")
    extra = {"tensorrt": "rtpurbo[trt]", "tensorrt-rtx": "rtpurbo[trt-rtx]", None: "rtpurbo[trt] or rtpurbo[trt-rtx]"}[name]
    raise ValueError(f"no TensorRT: install {extra} ({'; '.join(reasons)})")


def require_installed(*modules: str) -> None:
    """ValueError that says what to install where one of the modules (onnx, triton) is missing; imports none of them."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"TensorRT engines need {' and '.join(missing)}: install rtpurbo[trt] or rtpurbo[trt-rtx]")


def _link_by_plain_name() -> None:
    """Make libtensorrt_rtx.so a link to libtensorrt_rtx.so.1: the parser opens it by that name, and aborts the process without it."""
    package = importlib.util.find_spec("tensorrt_rtx_libs")
    for folder in (package.submodule_search_locations or []) if package else []:
        wanted = Path(folder) / "libtensorrt_rtx.so"
        if not wanted.exists() and wanted.with_name("libtensorrt_rtx.so.1").exists():
            try:
                wanted.symlink_to("libtensorrt_rtx.so.1")
            except OSError as error:
                raise ValueError(f"{wanted}: wanted as a link to libtensorrt_rtx.so.1, and cannot be made ({error.strerror})") from error


def uses_carrier(name: str, version: str) -> bool:
    """Whether custom nodes must travel as carrier nodes for this library; ValueError for a release where neither form works."""
    if name == "tensorrt":
        return False
    if version == CARRIER_VERSION:
        return True
    raise ValueError(f"tensorrt-rtx {version}: its engines run no Python plugin on data-centre GPUs, wanted {CARRIER_VERSION}")
