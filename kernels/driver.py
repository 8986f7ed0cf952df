"""The few calls of the CUDA driver that launching a compiled kernel takes, through ctypes: no Triton, no compiler."""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

_SUCCESS = 0
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
# A kernel may use this much shared memory without asking for it.
_DEFAULT_SHARED_BYTES = 48 << 10
# CUlaunchAttributeID.
_COOPERATIVE, _PROGRAMMATIC_STREAM_SERIALIZATION = 2, 6


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute with a value of type int, in the 64 bytes that all values share."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_char * 4), ("allowed", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


# CUtensorMapDataType of what a descriptor may hold, and the choices that every descriptor makes: no interleaving, L2 fetches of 128 bytes,
# zeros beyond the tensor.
_MAP_TYPES = {torch.float16: 6, torch.bfloat16: 9}
_NO_INTERLEAVE, _L2_128B, _ZEROS = 0, 2, 0
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64


def tensor_map(
    base: torch.Tensor, shape: Sequence[int], strides: Sequence[int], *, swizzle: int, elem_size: int, block_size: list[int]
) -> Any:
    """A CUtensorMap over a tensor, as ctypes bytes; swizzle, block_size (of a tile): as the kernel was compiled.

    Raises ValueError with the driver's reason where there is no such map.
    """
    rank = len(block_size)
    buffer = (ctypes.c_char * (_MAP_BYTES + _MAP_ALIGNMENT))()
    made = (ctypes.c_char * _MAP_BYTES).from_buffer(buffer, -ctypes.addressof(buffer) % _MAP_ALIGNMENT)
    dims = (ctypes.c_uint64 * rank)(*reversed(shape))
    steps = (ctypes.c_uint64 * rank)(*(elem_size * stride for stride in reversed(strides[:-1])), 0)
    box, ones = (ctypes.c_uint32 * rank)(*reversed(block_size)), (ctypes.c_uint32 * rank)(*[1] * rank)
    found = _driver().cuTensorMapEncodeTiled(
        made, _MAP_TYPES[base.dtype], rank, base.data_ptr(), dims, steps, box, ones, _NO_INTERLEAVE, swizzle, _L2_128B, _ZEROS
    )
    _check(found, f"no tensor map for {tuple(shape)} with strides {tuple(strides)}")
    return made


class Function:
    """One kernel of a loaded module; keeps the module alive."""

    def __init__(self, image: bytes, name: str, shared_bytes: int, source: str) -> None:
        """Load a cubin into the current context; ValueError with the driver's reason when it does not fit this GPU."""
        driver = _driver()
        module, self.handle = ctypes.c_void_p(), ctypes.c_void_p()
        # CUDA keeps one context per device and process; torch has made it current by the time it has a tensor there.
        torch.cuda.current_stream().synchronize()
        _check(driver.cuModuleLoadData(ctypes.byref(module), image), f"{source}: the cubin cannot be loaded")
        _check(driver.cuModuleGetFunction(ctypes.byref(self.handle), module, name.encode()), f"{source}: no kernel {name}")
        if shared_bytes > _DEFAULT_SHARED_BYTES:
            found = driver.cuFuncSetAttribute(self.handle, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
            _check(found, f"{source}: {shared_bytes} bytes of shared memory are not to be had")
        self._module, self.shared_bytes = module, shared_bytes

    def prepare(
        self, grid: tuple[int, ...], threads: int, arguments: list[Any], *, early: bool = False, together: bool = False
    ) -> "PreparedLaunch":
        """Bind ctypes values as arguments, in the kernel's order.

        early: may overlap the end of the launch before it. together: refused where not all programs fit the GPU at once.
        """
        chosen = [attribute for attribute, on in ((_PROGRAMMATIC_STREAM_SERIALIZATION, early), (_COOPERATIVE, together)) if on]
        return PreparedLaunch(self, (*grid, 1, 1)[:3], threads, arguments, chosen)


class PreparedLaunch:
    """A launch whose arguments are packed: `run` hands it to the driver and does nothing else."""

    def __init__(self, function: Function, grid: tuple[int, ...], threads: int, arguments: list[Any], chosen: list[int]) -> None:
        self._function, self._arguments = function, arguments
        self._packed = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        self._attributes = (_Attribute * max(1, len(chosen)))(*(_Attribute(id=attribute, allowed=1) for attribute in chosen))
        self._config = _Config(
            grid=grid, block=(threads, 1, 1), shared_bytes=function.shared_bytes, attributes=ctypes.addressof(self._attributes),
            num_attributes=len(chosen),
        )  # fmt: skip

    def run(self, stream: int) -> None:
        """Launch on a stream (its handle)."""
        self._config.stream = stream
        found = _driver().cuLaunchKernelEx(ctypes.byref(self._config), self._function.handle, self._packed, None)
        _check(found, "a kernel launch failed")


@cache
def _driver() -> ctypes.CDLL:
    """libcuda, which every NVIDIA driver brings; ValueError where there is none."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise ValueError(f"the CUDA driver cannot be loaded ({error}): an engine runs on a machine with an NVIDIA GPU") from error
    library.cuModuleLoadData.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.cuModuleGetFunction.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p]
    library.cuFuncSetAttribute.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    library.cuTensorMapEncodeTiled.argtypes = [
        ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, *[ctypes.c_void_p] * 5, *[ctypes.c_int] * 4,
    ]  # fmt: skip
    library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    return library


def _check(found: int, what: str) -> None:
    if found != _SUCCESS:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(found, ctypes.byref(text))
        raise ValueError(f"{what}: {(text.value or b'unknown error').decode()} (CUDA error {found})")
