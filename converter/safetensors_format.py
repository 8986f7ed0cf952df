"""The safetensors file format: headers read and checked without reading the data, and a writer that keeps a given order.

`safetensors.torch.save_file` orders tensors itself and wants all of them in memory; a converted MoE model needs the experts of a
layer side by side, and a 60 GB checkpoint needs one tensor in memory at a time.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
ALIGNMENT = 8
COPY_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies: file, dtype, shape, and offset and nbytes in bytes from the file's beginning."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of the file, in the order of its data, from the header alone.

    ValueError names the file and key: not readable, a header that is too long, cut or no JSON, an unknown dtype, impossible
    shapes, offsets with gaps or overlaps, data that is shorter or longer than the header says (a truncated download).
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(
                    f"{path}: the header is said to have {length} bytes, but the file has {size}: truncated or not safetensors"
                )
            raw = file.read(length)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the safetensors header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the safetensors header is {type(header).__name__}, wanted an object")
    header.pop("__metadata__", None)
    start = 8 + length
    infos = {name: _tensor_info(path, name, entry, start) for name, entry in header.items()}
    infos = dict(sorted(infos.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    _check_layout(path, infos, start, size)
    return infos


def read_bytes(info: TensorInfo) -> Iterator[bytes]:
    """The tensor's raw bytes in chunks of at most 16 MiB; ValueError when the file ends early."""
    with info.file.open("rb") as file:
        file.seek(info.offset)
        left = info.nbytes
        while left:
            chunk = file.read(min(left, COPY_BYTES))
            if not chunk:
                raise _shrunk(info, left)
            left -= len(chunk)
            yield chunk


def read_tensor(info: TensorInfo) -> Tensor:
    """The tensor on the CPU in its stored dtype, with memory of its own."""
    flat = torch.empty(info.nbytes, dtype=torch.uint8)
    with info.file.open("rb", buffering=0) as file:
        file.seek(info.offset)
        left = flat.numpy().data
        while left:
            count = file.readinto(left)
            if not count:
                raise _shrunk(info, len(left))
            left = left[count:]
    return flat.view(info.dtype).reshape(info.shape)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Raw little-endian bytes of a tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def header_bytes(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """Length prefix and header of a file with these tensors in this order, padded so that the data begins at a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[str, int]:
    """Write the chunks to a new file, flush it to the disk, and return (sha256 in hex, size in bytes)."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), size


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object_pairs_hook that refuses duplicate keys."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"duplicate key {key!r}")
        found[key] = value
    return found


def _shrunk(info: TensorInfo, missing: int) -> ValueError:
    return ValueError(f"{info.file}: {missing} bytes are missing at its end: the file changed while it was read")


def _tensor_info(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{path}: {name}: the header has {str(entry)[:80]}, wanted dtype, shape and data_offsets")
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{path}: {name}: dtype is {entry['dtype']!r}, supported are: {', '.join(DTYPES)}")
    dtype, shape, offsets = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or any(type(v) is not int or not 0 <= v < 1 << 62 for v in value):
            raise ValueError(f"{path}: {name}: {key} is {str(value)[:80]}, wanted a list of non-negative integers")
    nbytes = math.prod(shape) * dtype.itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise ValueError(f"{path}: {name}: data_offsets is {offsets}, wanted {nbytes} bytes for {entry['dtype']} {shape}")
    return TensorInfo(file=path, dtype=dtype, shape=tuple(shape), offset=start + offsets[0], nbytes=nbytes)


def _check_layout(path: Path, infos: dict[str, TensorInfo], start: int, size: int) -> None:
    ends = [start, *(info.offset + info.nbytes for info in infos.values())]
    for (name, info), end in zip(infos.items(), ends, strict=False):
        if info.offset != end:
            raise ValueError(f"{path}: {name}: its data begins at byte {info.offset}, wanted {end} (a gap or an overlap)")
    assert all(a <= b for a, b in pairwise(ends))
    if ends[-1] != size:
        word = "truncated" if size < ends[-1] else "too long"
        raise ValueError(f"{path}: the file has {size} bytes, wanted {ends[-1]} by its header: {word}")
