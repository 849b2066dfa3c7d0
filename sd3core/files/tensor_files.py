"""safetensors files a span at a time, larger than memory.

They are read and written in any order.

The format: 8 bytes N, little end first; N bytes of JSON, name -> {dtype, shape, data_offsets}; the data without gaps.
Such files come from outside, so all that a header says is checked before a byte of data is read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from sd3core.errors import CheckpointError

Shape = tuple[int, ...]
LARGEST_HEADER = 10_000_000  # bytes; that of SD3.5-large with three text encoders in one file has some 300,000
MOST_DIMENSIONS = 8
SPAN = 1 << 20  # elements: 4 MB in fp32
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    dtype: torch.dtype
    shape: Shape

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class _Place:
    file: BinaryIO
    path: Path
    offset: int  # in the file


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of one or more safetensors files, read when they are asked for. Close it, or use it in a `with`.

    Raises CheckpointError that names the file where one is no safetensors file, or two have a tensor of one name.
    """

    def __init__(self, paths: Iterable[Path | str]) -> None:
        self.infos: dict[str, TensorInfo] = {}
        self._places: dict[str, _Place] = {}
        with ExitStack() as opened:
            for path in map(Path, paths):
                file = opened.enter_context(path.open("rb"))
                for name, (info, offset) in _read_header(file, path).items():
                    if name in self.infos:
                        raise CheckpointError(f"{path}: tensor {name!r} is in {self._places[name].path.name} too")
                    self.infos[name] = info
                    self._places[name] = _Place(file, path, offset)
            self._opened = opened.pop_all()

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: info.shape for name, info in self.infos.items()}

    def path_of(self, name: str) -> Path:
        return self._places[name].path

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Elements start .. start + count of the flattened tensor. -> (count,), a copy of its own."""
        info, place = self.infos[name], self._places[name]
        if not 0 <= start <= start + count <= info.elements:
            raise IndexError(f"{name!r} has {info.elements} elements, not {start} to {start + count}")
        values = torch.empty(count, dtype=info.dtype)
        place.file.seek(place.offset + start * info.dtype.itemsize)
        if place.file.readinto(values.view(torch.uint8).numpy()) != count * info.dtype.itemsize:
            raise CheckpointError(f"{place.path}: ends within tensor {name!r}; get the file again")
        return values

    def spans(self, name: str, start: int = 0, count: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """`read` in parts of at most SPAN elements, each with the number of those before it."""
        count = self.infos[name].elements - start if count is None else count
        for low in range(0, count, SPAN):
            yield low, self.read(name, start + low, min(SPAN, count - low))

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name, 0, self.infos[name].elements).view(self.infos[name].shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TensorFileWriter:
    """Writes a safetensors file of the tensors `infos` at `path`, span by span.

        with TensorFileWriter(path, infos) as out:
            out.write(name, start, values)

    Every element must have been written once at the end, else ValueError. The bytes are on disk when the block ends.
    """

    def __init__(self, path: Path | str, infos: Mapping[str, TensorInfo]) -> None:
        self.infos = infos
        self._left = {name: info.elements for name, info in infos.items()}
        header, self._offsets, self.bytes = _make_header(infos)
        self._file = Path(path).open("wb")  # noqa: SIM115 (closed by `close`)
        self._file.write(header)
        self._file.truncate(self.bytes)

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Elements start .. start + len(values) of the flattened tensor, in any float dtype: it is cast."""
        info = self.infos[name]
        self._left[name] -= len(values)
        self._file.seek(self._offsets[name] + start * info.dtype.itemsize)
        self._file.write(values.detach().to(info.dtype).contiguous().view(torch.uint8).numpy())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        with self._file:
            if failed is None:
                wrong = sorted(name for name, left in self._left.items() if left)
                if wrong:
                    raise ValueError(f"{len(wrong)} tensors not written once and whole, {wrong[0]!r} the first")
                self._file.flush()
                os.fsync(self._file.fileno())


def _make_header(infos: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int], int]:
    """-> header with its length before it, each tensor's offset in the file, the file's length.

    Wide dtypes come first, so that each tensor starts at a multiple of its element's size.
    """
    spans, end = {}, 0
    for name, info in sorted(infos.items(), key=lambda item: -item[1].dtype.itemsize):
        spans[name] = (end, end + info.bytes)
        end += info.bytes
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, info in infos.items():
        fields[name] = {
            "dtype": SAFETENSORS_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": list(spans[name]),
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: start + span[0] for name, span in spans.items()}, start + end


def _read_header(file: BinaryIO, path: Path) -> dict[str, tuple[TensorInfo, int]]:
    """name -> the tensor and its offset in the file, with everything checked."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= min(LARGEST_HEADER, size - 8):
        raise CheckpointError(f"{path}: {_other_kind(start)}")
    try:
        fields = json.loads(file.read(length), object_pairs_hook=_without_doubles)
        fields.pop("__metadata__", None)
        found = {name: _read_entry(entry) for name, entry in fields.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: its header is wrong ({error})") from None
    end = 0
    for name, (info, (low, high)) in sorted(found.items(), key=lambda item: item[1][1]):
        if low != end or high - low != info.bytes:
            raise CheckpointError(f"{path}: not a safetensors file: tensor {name!r} lies at bytes {low} to {high}")
        end = high
    if 8 + length + end != size:
        raise CheckpointError(f"{path}: {size} bytes, but its header tells of {8 + length + end}; get the file again")
    return {name: (info, 8 + length + low) for name, (info, (low, _)) in found.items()}


def _read_entry(entry: dict[str, Any]) -> tuple[TensorInfo, tuple[int, int]]:
    shape, (low, high) = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list):
        raise ValueError("a shape is a list")
    if len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"{len(shape)} dimensions")
    if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, low, high)):
        raise ValueError(f"shape {shape}, offsets {low} to {high}")
    # beside a 0 it has no bytes, and no tensor can be made of it
    if math.prod(max(number, 1) for number in shape) >= 2**48:
        raise ValueError(f"shape {shape}")
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise ValueError(f"dtype {entry['dtype']!r}")
    return TensorInfo(SAFETENSORS_DTYPES[entry["dtype"]], tuple(shape)), (low, high)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name stands in it twice")
    return fields


def _other_kind(start: bytes) -> str:
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return (
            "a pickle, not a safetensors file; loading one can run any program, so it is not read:"
            " get the .safetensors of these weights"
        )
    return "not a safetensors file; get the .safetensors of these weights"
