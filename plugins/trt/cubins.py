"""The project's Triton kernels as cubins: compiled ahead of time without a GPU, found again and launched without a compiler."""

import ctypes
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rtpurbo.kernels.division import SHARED_BYTES
from rtpurbo.kernels.driver import Function, PreparedLaunch, tensor_map
from rtpurbo.kernels.launch import Launch

CAPABILITIES = (80, 86, 89, 90)
INDEX_NAME = "index.json"
INDEX_FORMAT = 3
_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float8_e4m3fn: "*fp8e4nv", torch.int32: "*i32",
    torch.int64: "*i64", torch.uint8: "*u8",
}  # fmt: skip
_C_TYPES: dict[str, Any] = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
_ALIGNMENT = 16
DESCRIPTOR = "tensordesc"
# Of Triton's reading of a kernel's source.
_READING = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a cubin is compiled for.

    types: of the run-time arguments, "1" for a stride that is the constant 1, "tensordesc<...>" for a descriptor. aligned: arguments
    that must be multiples of 16 (for pointers: addresses); a launch may use any variant that asks for no more than it has.
    """

    kernel: str
    types: tuple[str, ...]
    aligned: tuple[bool, ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    max_registers: int | None

    @property
    def shape(self) -> tuple[Any, ...]:
        """Everything but the alignment."""
        return (self.kernel, self.types, self.constants, self.num_warps, self.num_stages, self.max_registers)

    def suits(self, aligned: tuple[bool, ...]) -> bool:
        """Whether arguments of this alignment may be given to the cubin."""
        return all(have or not wanted for have, wanted in zip(aligned, self.aligned, strict=True))


def variant_of(launch: Launch) -> Variant:
    """The variant that fits a launch exactly; tensors may be on the meta device."""
    function = launch.kernel
    names = [name for name in function.arg_names if name not in launch.constants]
    assert len(names) == len(launch.arguments), (function.__name__, names, len(launch.arguments))
    kinds = [_kind(name, value) for name, value in zip(names, launch.arguments, strict=True)]
    return Variant(
        kernel=f"{function.__module__}.{function.__name__}",
        types=tuple(kind for kind, _ in kinds),
        aligned=tuple(aligned for _, aligned in kinds),
        constants=tuple(sorted(launch.constants.items())),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        max_registers=launch.max_registers,
    )


def _kind(name: str, value: Any) -> tuple[str, bool]:
    """Type and alignment of one argument. Strides over the batch are 64 bits wide: a cache of a million tokens exceeds 32."""
    if _is_descriptor(value):
        block = ",".join(map(str, value.block_shape))
        layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
        return f"{DESCRIPTOR}<{_TYPES[value.base.dtype].removeprefix('*')}[{block}]{layout}>", False
    if isinstance(value, torch.Tensor):
        address = value.storage_offset() * value.element_size() if value.device.type == "meta" else value.data_ptr()
        return _TYPES[value.dtype], address % _ALIGNMENT == 0
    if isinstance(value, float):
        return "fp32", False
    if name.startswith("stride_") and value == 1:
        return "1", False
    wide = name.startswith("stride_") and name.endswith("b")
    assert wide or -(2**31) <= value < 2**31, (name, value)
    return ("i64" if wide else "i32"), value % _ALIGNMENT == 0


def _is_descriptor(value: Any) -> bool:
    """Whether an argument is a tensor descriptor, of Triton or of Gluon."""
    return hasattr(value, "block_shape") and hasattr(value, "base")


def compile_cubins(wanted: Mapping[int, Iterable[Launch]], folder: Path, *, progress: Any = None) -> dict[str, Any]:
    """Compile every distinct variant of the launches, given for each capability, into `folder`, and write its index.

    progress: called with (done, total) after each. Returns the index. Raises ValueError when Triton is missing or cannot compile.
    """
    jobs = [(capability, *one) for capability, launches in wanted.items() for one in distinct(launches)]
    folder.mkdir()
    entries: list[dict[str, Any]] = []
    # Threads suffice: the compiler and the assembler work outside of Python's lock.
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, max(1, len(jobs)))) as pool:
        futures = [pool.submit(_compile, variant, kernel, capability, folder) for capability, variant, kernel in jobs]
        try:
            for future in futures:
                entries.append(future.result())
                if progress is not None:
                    progress(len(entries), len(jobs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    index = {"format": INDEX_FORMAT, "kernels_sha256": kernels_digest(), "capabilities": list(wanted), "cubins": entries}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n")
    return index


def distinct(launches: Iterable[Launch]) -> list[tuple[Variant, Any]]:
    """The variants of the launches with their kernels: of those that differ in alignment alone, the one that all may use."""
    found: dict[tuple[Any, ...], tuple[Variant, Any]] = {}
    for launch in launches:
        variant = variant_of(launch)
        known, _ = found.get(variant.shape, (variant, None))
        aligned = tuple(a and b for a, b in zip(variant.aligned, known.aligned, strict=True))
        found[variant.shape] = (replace(variant, aligned=aligned), launch.kernel)
    return list(found.values())


def _compile(variant: Variant, kernel: Any, capability: int, folder: Path) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    constants = dict(variant.constants)
    signature, values, hints = {}, {(names.index(name),): value for name, value in constants.items()}, {}
    arguments = iter(zip(variant.types, variant.aligned, strict=True))
    for place, name in enumerate(names):
        kind, aligned = ("constexpr", False) if name in constants else next(arguments)
        if kind == "1":
            values[(place,)] = 1
            kind = "constexpr"
        signature[name] = kind
        if aligned:
            hints[(place,)] = [["tt.divisibility", _ALIGNMENT]]
    # Fusion of products and sums is said, not left to a default that changes between releases of Triton.
    options = {
        "num_warps": variant.num_warps, "num_stages": variant.num_stages, "maxnreg": variant.max_registers, "enable_fp_fusion": True,
    }  # fmt: skip
    kind = ASTSource
    if type(kernel).__module__.startswith("triton.experimental.gluon"):
        from triton.experimental.gluon._runtime import GluonASTSource as kind
    source = _read_in_turn(kind)(kernel, signature, values, hints)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:
        raise ValueError(f"{variant.kernel} does not compile for capability {capability}: {' '.join(str(error).split())[:300]}") from error
    image, metadata = compiled.asm["cubin"], compiled.metadata
    if metadata.shared > SHARED_BYTES[capability]:
        raise ValueError(
            f"{variant.kernel} wants {metadata.shared} bytes of shared memory, and a program of capability {capability} has "
            f"{SHARED_BYTES[capability]}"
        )
    entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)", compiled.asm["ptx"], re.DOTALL)
    assert entry is not None
    descriptors = list(getattr(metadata, "tensordesc_meta", None) or [])
    assert len(descriptors) == sum(kind.startswith(DESCRIPTOR) for kind in variant.types), f"{variant.kernel}: descriptors without metadata"
    # A descriptor is passed with the shape and the strides of its tensor.
    own = sum(1 + 2 * _rank(kind) if kind.startswith(DESCRIPTOR) else kind != "1" for kind in variant.types)
    hidden = entry.group(1).count(".param") - own
    assert 0 <= hidden <= 2, f"{variant.kernel}: {hidden} parameters beyond its own"
    assert not getattr(metadata, "global_scratch_size", 0), f"{variant.kernel} wants scratch memory of its own"
    digest = hashlib.sha256(image).hexdigest()
    name = f"{kernel.__name__}_sm{capability}_{digest[:16]}.cubin"
    (folder / name).write_bytes(image)
    return {
        "file": name,
        "sha256": digest,
        "capability": capability,
        "entry": metadata.name,
        "shared_bytes": metadata.shared,
        "threads": metadata.num_warps * 32,
        "hidden_pointers": hidden,
        "descriptors": [{name: meta[name] for name in ("swizzle", "elem_size", "block_size")} for meta in descriptors],
        "kernel": variant.kernel,
        "types": list(variant.types),
        "aligned": list(variant.aligned),
        "constants": constants,
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "max_registers": variant.max_registers,
    }


def _read_in_turn(kind: type) -> type:
    """A kind of source of Triton's that one thread reads at a time.

    CPython 3.11 counts the depth of syntax trees for all threads together, and fails with "AST constructor recursion depth mismatch" where
    two read sources at once (python/cpython#106905). The reading is Python: nothing is lost by turns.
    """

    class Source(kind):
        def hash(self, *arguments: Any) -> str:
            with _READING:
                return super().hash(*arguments)

        def make_ir(self, *arguments: Any, **options: Any) -> Any:
            with _READING:
                return super().make_ir(*arguments, **options)

    return Source


class CubinTable:
    """The cubins of an engine's folder that run on one GPU."""

    def __init__(self, folder: Path, capability: int) -> None:
        """Read the index and every cubin; ValueError for a missing or changed file, or a GPU that none was compiled for.

        capability: of the GPU; `self.capability` is the one that the cubins in use were compiled for.
        """
        path = folder / INDEX_NAME
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            found = (index["format"], index["kernels_sha256"])
            capabilities = [int(known) for known in index["capabilities"]]
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a valid index of cubins ({error})") from error
        if found != (INDEX_FORMAT, kernels_digest()):
            raise ValueError(f"{path}: compiled from other kernels than this release of rtpurbo has; build the engine again")
        # A cubin runs on its own and on later minor revisions of the same major one.
        fitting = [known for known in capabilities if known // 10 == capability // 10 and known <= capability]
        if not fitting:
            raise ValueError(f"{path}: no cubin for compute capability {capability}, only for {capabilities}")
        self._variants: dict[tuple[Any, ...], tuple[Variant, dict[str, Any], bytes]] = {}
        self._functions: dict[str, Function] = {}
        # Launches are described for what the cubins were compiled for, whatever the GPU has beyond it.
        self._folder, self.capability = folder, max(fitting)
        for entry in index["cubins"]:
            if entry["capability"] == self.capability:
                if entry["shared_bytes"] > SHARED_BYTES.get(capability, entry["shared_bytes"]):
                    raise ValueError(
                        f"{folder / entry['file']}: wants {entry['shared_bytes']} bytes of shared memory, and a GPU of compute capability "
                        f"{capability} has {SHARED_BYTES[capability]}; build the engine with --capability {capability}"
                    )
                variant = Variant(
                    kernel=entry["kernel"], types=tuple(entry["types"]), aligned=tuple(entry["aligned"]),
                    constants=tuple(sorted(entry["constants"].items())), num_warps=entry["num_warps"], num_stages=entry["num_stages"],
                    max_registers=entry["max_registers"],
                )  # fmt: skip
                self._variants[variant.shape] = (variant, entry, _read(folder, entry))

    def prepare(self, launch: Launch) -> PreparedLaunch:
        """Bind a launch's arguments to the cubin that fits them; the tensors must stay where they are. ValueError without one."""
        wanted = variant_of(launch)
        found = self._variants.get(wanted.shape)
        if found is None or not found[0].suits(wanted.aligned):
            raise ValueError(f"{self._folder / INDEX_NAME}: no cubin of {wanted.kernel} for {dict(wanted.constants)}, {wanted.types}")
        variant, entry, image = found
        function = self._functions.get(entry["file"])
        if function is None:
            function = Function(image, entry["entry"], entry["shared_bytes"], str(self._folder / entry["file"]))
            self._functions[entry["file"]] = function
        descriptors, arguments = iter(entry["descriptors"]), []
        for kind, value in zip(variant.types, launch.arguments, strict=True):
            if kind.startswith(DESCRIPTOR):
                arguments.append(tensor_map(value.base, value.shape, value.strides, **next(descriptors)))
                arguments += [*map(ctypes.c_int32, value.shape), *map(ctypes.c_int64, value.strides)]
            elif kind != "1":
                arguments.append(_packed(kind, value))
        arguments += [ctypes.c_void_p(0) for _ in range(entry["hidden_pointers"])]
        return function.prepare(launch.grid, entry["threads"], arguments, early=launch.early_launch, together=launch.all_at_once)


def _rank(kind: str) -> int:
    """Axes of the tensor behind a descriptor's type, tensordesc<bf16[1,64,128],...>."""
    return kind.partition("[")[2].partition("]")[0].count(",") + 1


def _packed(kind: str, value: Any) -> Any:
    return ctypes.c_void_p(value.data_ptr()) if isinstance(value, torch.Tensor) else _C_TYPES[kind](value)


def _read(folder: Path, entry: dict[str, Any]) -> bytes:
    path = folder / entry["file"]
    try:
        image = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if (found := hashlib.sha256(image).hexdigest()) != entry["sha256"]:
        raise ValueError(f"{path}: sha256 {found}, wanted {entry['sha256']} ({INDEX_NAME})")
    return image


def kernels_digest() -> str:
    """sha256 over the sources that define kernels and their launches."""
    from rtpurbo import kernels

    root = Path(next(iter(kernels.__path__)))
    sources = sorted(path for path in root.rglob("*.py") if "reference" not in path.name and path.name not in ("bench.py", "testing.py"))
    parts = [f"{path.relative_to(root).as_posix()}\n{path.read_text(encoding='utf-8')}" for path in sources]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
