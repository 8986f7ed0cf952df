"""An engine's folder: what is in it, what it was made for, and whether it fits this machine."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtpurbo.manifests.manifest import MANIFEST_NAME, Manifest, file_digest
from rtpurbo.manifests.strict_json import parse_strict

INFO_NAME = "engine.json"
PLAN_NAME = "engine.plan"
CUBINS_NAME = "cubins"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """One cache of the engine: its input's shape without the batch (None: the capacity), its dtype, the output that aliases it."""

    shape: tuple[int | None, ...]
    dtype: str
    output: str


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What an engine was built from and for.

    capabilities: compute capabilities that its cubins were compiled for. batch, capacity, prefill_chunk: the largest ones, of the
    profiles. phased: it takes the input `phase`. build: seconds and peak bytes of the process.
    """

    library: str
    library_version: str
    rtpurbo: str
    capabilities: tuple[int, ...]
    dtype: str
    batch: int
    capacity: int
    prefill_chunk: int
    dense: bool
    phased: bool
    vocab_size: int
    caches: dict[str, CacheInfo]
    manifest_digest: str
    kernels_sha256: str
    onnx_sha256: str
    plan_sha256: str
    plan_bytes: int
    build: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write engine.json."""
        body = {"format": FORMAT, **dataclasses.asdict(self)}
        (folder / INFO_NAME).write_text(json.dumps(body, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def is_engine_folder(path: str | Path) -> bool:
    """Whether the path is a folder with an engine, not an artifact."""
    return (Path(path) / INFO_NAME).is_file()


def read_info(folder: Path) -> EngineInfo:
    """engine.json of a folder; ValueError in one sentence when it is missing, damaged or of another format."""
    path = folder / INFO_NAME
    try:
        body = parse_strict(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        found = body.get("format") if isinstance(body, dict) else body
        raise ValueError(f"{path}: format is {found!r}, wanted {FORMAT}")
    del body["format"]
    try:
        caches = {
            name: CacheInfo(shape=tuple(entry["shape"]), dtype=entry["dtype"], output=entry["output"])
            for name, entry in body.pop("caches").items()
        }
        return EngineInfo(**{**body, "capabilities": tuple(body["capabilities"])}, caches=caches)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the description of an engine ({' '.join(str(error).split())[:200]})") from error


def check_folder(folder: Path, library: str, version: str) -> tuple[EngineInfo, Manifest]:
    """The engine's description and manifest, after everything that can be checked without a GPU; ValueError with the first that fails."""
    info, manifest = read_info(folder), Manifest.load(folder / MANIFEST_NAME)
    path = folder / INFO_NAME
    if (info.library, info.library_version) != (library, version):
        raise ValueError(
            f"{path}: the engine was built by {info.library} {info.library_version}, and here is {library} {version}: build it again, "
            "or install that release"
        )
    if (found := manifest.to_dict()["digest"]) != info.manifest_digest:
        raise ValueError(f"{folder / MANIFEST_NAME}: digest is {found}, but the engine was built from {info.manifest_digest}")
    plan = folder / PLAN_NAME
    if not plan.is_file():
        raise ValueError(f"{plan}: missing, but {INFO_NAME} describes it")
    digest = file_digest(plan)
    if (digest.size_bytes, digest.sha256) != (info.plan_bytes, info.plan_sha256):
        raise ValueError(f"{plan}: {digest.size_bytes} bytes with sha256 {digest.sha256}, wanted {info.plan_bytes} and {info.plan_sha256}")
    return info, manifest
