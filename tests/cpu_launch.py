"""Launches of CUDA C++ kernels on the CPU: the kernels' own source, with tests/cuda_on_cpu in the place of the hardware."""

import ctypes
import hashlib
import itertools
import mmap
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from rtpurbo.kernels.cuda import SOURCES, Constants, TileMaps, packed
from rtpurbo.kernels.launch import Launch

COMPILER = shutil.which("g++")
HARDWARE = Path(__file__).parent / "cuda_on_cpu"
MAP_BYTES = 128
SOURCE = '#include <hardware.cuh>\n#include "{name}.cu"\nextern "C" void launch(int n, void** p) {{ launch_on_cpu(&{name}, n, p); }}\n'


PAGE, NO_ACCESS = mmap.PAGESIZE, 0
_flush_with_end = itertools.cycle((True, False))


def run_on_cpu(launch: Launch) -> None:
    """Run a launch on copies of its tensors, those of TileMaps apart, that lie between pages nobody may touch: a kernel that reads or
    writes beyond one ends the process. The tensors hold what the kernel wrote."""
    library = _built(launch.kernel.name, tuple(sorted(launch.constants.items())))
    at_end = next(_flush_with_end)
    tensors = {value.data_ptr(): value for value in launch.arguments if isinstance(value, torch.Tensor)}
    fenced = {place: Fenced(tensor, at_end=at_end) for place, tensor in tensors.items()}
    arguments = [
        _encoded(value) if isinstance(value, TileMaps)
        else ctypes.c_void_p(fenced[value.data_ptr()].address) if isinstance(value, torch.Tensor)
        else packed(value)
        for value in launch.arguments
    ]  # fmt: skip
    addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
    library.launch(launch.grid[0], addresses)
    for copy in fenced.values():
        copy.write_back()


class Fenced:
    """A copy of a tensor's memory, up to 15 bytes more, that ends where a page begins that nobody may touch, or begins where one ends."""

    def __init__(self, tensor: torch.Tensor, *, at_end: bool) -> None:
        last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        self._tensor, self._bytes = tensor, (last + 1) * tensor.element_size()
        size = -(-self._bytes // 16) * 16
        pages = -(-size // PAGE)
        self._memory = mmap.mmap(-1, (pages + 2) * PAGE)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        for fence in (begin, begin + (pages + 1) * PAGE):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(PAGE), NO_ACCESS) == 0
        self.address = begin + PAGE + (pages * PAGE - size if at_end else 0)
        ctypes.memmove(self.address, tensor.data_ptr(), self._bytes)

    def write_back(self) -> None:
        """Store in the tensor what the copy holds now."""
        ctypes.memmove(self._tensor.data_ptr(), self.address, self._bytes)


def _encoded(maps: TileMaps) -> ctypes.Array:
    """What tests/cuda_on_cpu reads as a TensorMap: address, strides in bytes, sizes."""
    blob = b""
    for x in maps.tensors:
        assert x.stride(3) == 1
        numbers = [x.data_ptr(), *(step * x.element_size() for step in x.stride()[:3]), *x.shape]
        blob += b"".join(number.to_bytes(8, "little") for number in numbers).ljust(MAP_BYTES, b"\0")
    # The parameter is aligned like the hardware's.
    buffer = (ctypes.c_char * (len(blob) + 64))()
    array = (ctypes.c_char * len(blob)).from_buffer(buffer, -ctypes.addressof(buffer) % 64)
    array.raw = blob
    return array


@cache
def _built(name: str, constants: Constants) -> ctypes.CDLL:
    assert COMPILER is not None
    folder = Path(tempfile.mkdtemp(prefix="rtpurbo-"))
    source, library = folder / "launch.cpp", folder / f"{hashlib.sha256(repr((name, constants)).encode()).hexdigest()[:16]}.so"
    source.write_text(SOURCE.format(name=name))
    macros = [f"-D{macro}={value}" for macro, value in constants]
    command = [COMPILER, "-O1", "-w", "-std=c++20", "-shared", "-fPIC", "-pthread", f"-I{HARDWARE}", f"-I{SOURCES}", *macros]
    subprocess.run([*command, str(source), "-o", str(library)], check=True, capture_output=True, text=True)
    loaded = ctypes.CDLL(str(library))
    shutil.rmtree(folder)
    return loaded


def on_cpu_plan(plan):
    """Scratch memory as a launch may find it: whatever has no launch's number holds no number at all."""
    for value in vars(plan).values():
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.shape[-1] == 4:
            value[..., :3] = float("nan")
    return plan
