"""Kernels written in CUDA C++, compiled by NVRTC: it comes with PyTorch for GPUs, or as the wheel nvidia-cuda-nvrtc.

What was compiled once is kept beside what Triton keeps (TRITON_CACHE_DIR), by a digest of the sources, the macros and NVRTC's version.
RTPURBO_CUDA_MACROS adds macros for debugging, separated by spaces: compute-sanitizer's racecheck needs EVERY_LANE=1.
"""

import ctypes
import hashlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rtpurbo.kernels.driver import Function, tensor_map

SOURCES = Path(__file__).parent
DEBUGGING = "RTPURBO_CUDA_MACROS"
_SUCCESS, _DIGEST_BYTES = 0, 32
# CUtensorMapSwizzle.
_SWIZZLE_128B = 3
Constants = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class CudaKernel:
    """The kernel of a file of this folder, named like it. `Launch.constants` are its macros.

    shared_bytes: dynamic shared memory of a program.
    """

    name: str
    shared_bytes: int

    def compile(self, constants: Mapping[str, Any], capability: int) -> bytes:
        """The cubin for a compute capability (90 for 9.0). ValueError where NVRTC is missing or refuses."""
        return _compiled(self.name, _with_debugging(constants), capability)

    def run(self, launch: Any) -> None:
        """Compile (once for each set of constants) and launch on the current stream."""
        function = _loaded(self, _with_debugging(launch.constants), torch.cuda.current_device())
        prepared = function.prepare(
            launch.grid, launch.num_warps * 32, [packed(value) for value in launch.arguments], early=launch.early_launch,
            together=launch.all_at_once,
        )  # fmt: skip
        prepared.run(torch.cuda.current_stream().cuda_stream)


class Long(int):
    """An integer argument of 64 bits."""


@dataclass(frozen=True)
class TileMaps:
    """Tensors as one argument, for a kernel that copies tiles of them, with rows of 128 bytes permuted as Hopper's copies do."""

    tensors: tuple[torch.Tensor, ...]
    tile: tuple[int, ...]

    def encoded(self) -> Any:
        """The CUtensorMaps side by side."""
        maps = [
            tensor_map(x, x.shape, x.stride(), swizzle=_SWIZZLE_128B, elem_size=x.element_size(), block_size=list(self.tile))
            for x in self.tensors
        ]
        return (ctypes.c_char * sum(map(len, maps))).from_buffer_copy(b"".join(maps))


def packed(value: Any) -> Any:
    """An argument as the kernel takes it: tensors as pointers, numbers as float, int or (`Long`) long."""
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, TileMaps):
        return value.encoded()
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_int64(value) if isinstance(value, Long) else ctypes.c_int32(value)


@cache
def nvrtc_obstacle() -> str | None:
    """Why kernels in CUDA C++ cannot be compiled here, or None."""
    try:
        _nvrtc()
    except ValueError as error:
        return str(error)
    return None


def _with_debugging(constants: Mapping[str, Any]) -> Constants:
    """The macros of a launch and those of RTPURBO_CUDA_MACROS. ValueError where one is no NAME=VALUE, or the launch's own."""
    added: dict[str, str] = {}
    for word in os.environ.get(DEBUGGING, "").split():
        name, _, value = word.partition("=")
        if not value or name in constants:
            raise ValueError(f"{DEBUGGING}: {word!r} is not NAME=VALUE of a macro that no launch sets")
        added[name] = value
    return (*sorted(constants.items()), *sorted(added.items()))


@cache
def _loaded(kernel: CudaKernel, constants: Constants, device: int) -> Function:
    major, minor = torch.cuda.get_device_capability(device)
    return Function(_compiled(kernel.name, constants, 10 * major + minor), kernel.name, kernel.shared_bytes, kernel.name)


@cache
def _compiled(name: str, constants: Constants, capability: int) -> bytes:
    """The cubin, from the cache on disk or from NVRTC."""
    from triton.runtime.cache import get_cache_manager

    options = [
        f"--gpu-architecture=sm_{capability}", "--std=c++17", "-default-device", *(f"-D{macro}={value}" for macro, value in constants)
    ]  # fmt: skip
    sources = [(path.name, path.read_bytes()) for path in sorted(SOURCES.glob("*.cu*"))]
    kept = get_cache_manager(hashlib.sha256(repr((_nvrtc_version(), name, options, sources)).encode()).hexdigest())
    path = kept.get_file(f"{name}.cubin")
    blob = b"" if path is None else Path(path).read_bytes()
    # A file that something else has written to is compiled again.
    digest, image = blob[:_DIGEST_BYTES], blob[_DIGEST_BYTES:]
    if digest != hashlib.sha256(image).digest():
        image = _compile(name, [*options, f"-I{SOURCES}"], capability)
        kept.put(hashlib.sha256(image).digest() + image, f"{name}.cubin", binary=True)
    return image


def _compile(name: str, options: list[str], capability: int) -> bytes:
    library, program, path = _nvrtc(), ctypes.c_void_p(), SOURCES / f"{name}.cu"
    words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    if library.nvrtcCreateProgram(ctypes.byref(program), path.read_bytes(), path.name.encode(), 0, None, None) != _SUCCESS:
        raise ValueError(f"{path.name}: NVRTC does not take the source")
    try:
        if library.nvrtcCompileProgram(program, len(options), words) != _SUCCESS:
            log = _bytes_of(program, "ProgramLog").decode(errors="replace").rstrip("\0")
            raise ValueError(f"{path.name} does not compile for capability {capability}: {' '.join(log.split())[:300]}")
        return _bytes_of(program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _nvrtc_version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def _bytes_of(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(_nvrtc(), f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(_nvrtc(), f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


@cache
def _nvrtc() -> ctypes.CDLL:
    """The library: PyTorch's own, else that of the wheel, else the system's. ValueError where there is none."""
    names = [f"libnvrtc.so.{major}" for major in dict.fromkeys([(torch.version.cuda or "13").partition(".")[0], "13", "12"])]
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else list(spec.submodule_search_locations or [])
    wheels = [path for name in names for root in roots for path in sorted(Path(root).glob(f"*/lib/{name}"))]
    for name in [*wheels, *names]:
        try:
            if isinstance(name, Path):
                # Loaded first, because the library looks for it by name alone.
                for builtins in name.parent.glob("libnvrtc-builtins.so.*"):
                    ctypes.CDLL(str(builtins))
            return ctypes.CDLL(str(name))
        except OSError:
            continue
    raise ValueError("NVRTC is not installed: pip install nvidia-cuda-nvrtc")
