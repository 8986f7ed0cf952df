"""The artifact's weights as ONNX initializers that point into its own safetensors files."""

import json
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, external_data_helper, helper

from rtpurbo.manifests.manifest import INDEXER_NAME

ONNX_DTYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float8_e4m3fn: TensorProto.FLOAT8E4M3FN,
}
_STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# A protobuf message ends at 2 GiB; the nodes and the largest RoPE table need the rest.
MAX_COPIED_BYTES = 1_500_000_000


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor lies: file name, dtype, shape, offset and length in bytes from the file's beginning."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Weights:
    """Initializers of one export, made on demand.

    A weight whose stored dtype is the engine's becomes external data: (file, offset, length) of the artifact's own file, relative
    to the artifact's folder. Any other one is converted and copied into the ONNX file. external_bytes and copied_bytes count both.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self.initializers: list[TensorProto] = []
        self.external_bytes = self.copied_bytes = 0
        self._places: dict[str, Place] = {}
        self._made: set[str] = set()
        for path in sorted(folder.glob("*.safetensors")):
            if path.name != INDEXER_NAME:
                self._places |= read_places(path)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor."""
        return self._places[name].shape

    def stored_dtype(self, name: str) -> torch.dtype:
        """Dtype of a stored tensor."""
        return self._places[name].dtype

    def tensor(self, name: str) -> str:
        """The initializer of a stored tensor, which has its name."""
        place = self._places[name]
        return self._add(name, place) if place.dtype == self.dtype else self.copy(name, self.read(name).to(self.dtype))

    def stack(self, name: str, parts: list[str], experts: int) -> str:
        """Tensors of equal width as one initializer [E, rows of an expert, width]; `parts` lists the experts one after the other."""
        rows, width = sum(self.shape(part)[0] for part in parts), self.shape(parts[0])[1]
        return self._joined(name, parts, (experts, rows // experts, width))

    def join(self, name: str, parts: list[str], *, copy: bool = False) -> str | None:
        """Tensors of equal width below each other as one initializer [rows, ...], or None where only a copy could hold them.

        They lie below each other on disk in artifacts that the converter wrote. copy: small ones, which may be copied.
        """
        if self.dtype == self.stored_dtype(parts[0]) and not (copy or self._adjacent(parts)):
            return None
        return self._joined(name, parts, (sum(self.shape(part)[0] for part in parts), *self.shape(parts[0])[1:]))

    def _joined(self, name: str, parts: list[str], shape: tuple[int, ...]) -> str:
        first = self._places[parts[0]]
        if self._adjacent(parts) and first.dtype == self.dtype:
            nbytes = sum(self._places[part].nbytes for part in parts)
            return self._add(name, Place(file=first.file, dtype=first.dtype, shape=shape, offset=first.offset, nbytes=nbytes))
        self._room_for(name, prod(shape) * self.dtype.itemsize)
        return self.copy(name, torch.cat([self.read(part).to(self.dtype) for part in parts]).reshape(shape))

    def _adjacent(self, parts: list[str]) -> bool:
        """Whether the tensors follow each other in one file, in this order, in one dtype."""
        places = [self._places[part] for part in parts]
        return all(
            (a.file, a.dtype, a.offset + a.nbytes, a.shape[1:]) == (b.file, b.dtype, b.offset, b.shape[1:]) for a, b in pairwise(places)
        )

    def copy(self, name: str, tensor: torch.Tensor) -> str:
        """An initializer inside the ONNX file. ValueError when the file would grow past what one protobuf message holds."""
        if name not in self._made:
            self._room_for(name, tensor.nbytes)
            raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            self.initializers.append(helper.make_tensor(name, ONNX_DTYPES[tensor.dtype], list(tensor.shape), raw, raw=True))
            self._made.add(name)
            self.copied_bytes += len(raw)
        return name

    def read(self, name: str) -> torch.Tensor:
        """A stored tensor on the CPU."""
        place = self._places[name]
        data = np.fromfile(self.folder / place.file, dtype=np.uint8, count=place.nbytes, offset=place.offset)
        return torch.from_numpy(data).view(place.dtype).reshape(place.shape)

    def _add(self, name: str, place: Place) -> str:
        if name not in self._made:
            tensor = TensorProto(name=name, data_type=ONNX_DTYPES[place.dtype], dims=place.shape, raw_data=b"")
            external_data_helper.set_external_data(tensor, location=place.file, offset=place.offset, length=place.nbytes)
            tensor.ClearField("raw_data")
            self.initializers.append(tensor)
            self._made.add(name)
            self.external_bytes += place.nbytes
        return name

    def _room_for(self, name: str, nbytes: int) -> None:
        if self.copied_bytes + nbytes > MAX_COPIED_BYTES:
            found = str(self.dtype).removeprefix("torch.")
            raise ValueError(
                f"{self.folder}: {name} cannot be used where it lies and the ONNX file has no room for a copy: more than "
                f"{MAX_COPIED_BYTES} bytes are stored in another dtype than {found} or with experts that are not adjacent; "
                "export in the artifact's own dtype, or convert the model again"
            )


def read_places(path: Path) -> dict[str, Place]:
    """Tensor name -> place, from the header of a safetensors file whose digest was checked; ValueError if it cannot be read."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {
            name: Place(
                file=path.name,
                dtype=_STORED[entry["dtype"]],
                shape=tuple(entry["shape"]),
                offset=8 + length + entry["data_offsets"][0],
                nbytes=entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error!r})") from error
