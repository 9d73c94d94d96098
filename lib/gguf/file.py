"""Read GGUF files and write new ones, by bytes: tensors are copied and never decoded.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3. Files are
mapped, so their tensors need no memory of this process. A model in several files is read as one.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..util.errors import UserError

SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # codes of struct
STRING, ARRAY, UINT32, INT32, FLOAT32 = 8, 9, 4, 5, 6
INTEGERS = {kind for kind, code in SCALARS.items() if code not in "fd?"}
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
CHUNK = 2**24  # bytes copied at a time


@dataclass
class Field:
    """A value: a number, bytes of a string, an array of numbers (n,), or a list.

    `kind` is its type, and `of` that of an array's items. `raw` are its bytes in a file.
    """

    kind: int
    value: Any
    of: int | None = None
    raw: bytes = b""

    @property
    def is_integer(self) -> bool:
        return self.kind in INTEGERS or self.of in INTEGERS


@dataclass
class Tensor:
    """A tensor and its bytes, `data` (bytes,), of which a new file has the rows `kept`.

    The last number of `shape` is the number of rows in `data`; `kind` is the type.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    data: np.ndarray
    kept: np.ndarray | None = None

    @property
    def size(self) -> int:
        """The bytes in a new file."""
        if self.kept is None:
            return self.data.size
        return self.data.size // self.shape[-1] * len(self.kept)

    def parts(self) -> Iterator[np.ndarray]:
        """Yield the bytes in a new file, about CHUNK at a time."""
        if self.kept is None:
            yield from (self.data[i : i + CHUNK] for i in range(0, self.data.size, CHUNK))
            return
        rows = self.data.reshape(self.shape[-1], -1)
        step = max(1, CHUNK // rows.shape[1])
        yield from (rows[self.kept[i : i + step]] for i in range(0, len(self.kept), step))


class GgufFile:
    """The fields and tensors of a model; `what` names it in messages.

    Raises UserError for a file that is damaged, or of another kind.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.what, self.tensors = what, []
        self.fields: dict[str, Field] = {}
        self.paths = [path]
        if shard := SHARD.fullmatch(path.name):
            name, _, count = shard.groups()
            numbers = range(1, int(count) + 1)
            self.paths = [path.with_name(f"{name}-{n:05}-of-{count}.gguf") for n in numbers]
        for each in self.paths:
            if not each.is_file():
                problem = f"there is no file {each.name}"
                raise UserError(what, problem, "Name a GGUF file; all its parts must be there")
            try:
                self._read(each)
            except (struct.error, OverflowError, UnicodeDecodeError) as error:
                problem = f"{each.name} is truncated or damaged"
                raise UserError(what, problem, "Download it again") from error
        self.size = sum(each.stat().st_size for each in self.paths)

    def value(self, name: str, default: Any = None) -> Any:
        """Return the value of a field; a string as str."""
        value = self.fields[name].value if name in self.fields else default
        return value.decode(errors="replace") if isinstance(value, bytes) else value

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's architecture, "" if the file has none."""
        return self.value("general.architecture", "")

    @property
    def alignment(self) -> int:
        field = self.fields.get("general.alignment", Field(UINT32, 32))
        if field.kind != UINT32 or field.value.bit_count() != 1:
            problem = f"general.alignment {self.value('general.alignment')} is no power of two"
            raise UserError(self.what, problem, "Download it again")
        return field.value

    def _read(self, path: Path) -> None:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(self.what, f"{path.name} is not GGUF", "Name a GGUF file")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        version, n_tensors, n_fields = struct.unpack_from("<IQQ", data, 4)
        if version not in (2, 3):
            problem = f"its version is {version}" if version & 0xFFFF else "it is big-endian"
            raise UserError(self.what, problem, "Convert it to little-endian GGUF of version 3")
        at, fields = 24, {}
        for _ in range(n_fields):
            name, begin = _decode(data, at, STRING)
            (kind,) = struct.unpack_from("<I", data, begin)
            of = struct.unpack_from("<I", data, begin + 4)[0] if kind == ARRAY else None
            value, at = _decode(data, begin + 4, kind)
            fields[name.decode()] = Field(kind, value, of, data[begin:at])
        self.fields = self.fields or fields  # other parts have only their number
        infos = []
        for _ in range(n_tensors):
            name, at = _decode(data, at, STRING)
            (n_dims,) = struct.unpack_from("<I", data, at)
            *shape, kind, offset = struct.unpack_from(f"<{n_dims}QIQ", data, at + 4)
            infos.append((name.decode(), tuple(shape), kind, offset))
            at += 16 + 8 * n_dims
        from gguf import GGML_QUANT_SIZES

        begin, view = at + -at % self.alignment, np.frombuffer(data, np.uint8)
        for name, shape, kind, offset in infos:
            if kind not in GGML_QUANT_SIZES:
                problem = f"{name} has the type {kind}, which the package gguf does not know"
                raise UserError(self.what, problem, "Install a newer gguf")
            block, size = GGML_QUANT_SIZES[kind]
            size, offset = prod(shape) // block * size, begin + offset
            if offset + size > len(data):
                raise struct.error
            self.tensors.append(Tensor(name, shape, kind, view[offset : offset + size]))


def _decode(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    """Return the value at a place, and where it ends. Raises struct.error beyond the end."""
    if kind == STRING:
        end = at + 8 + struct.unpack_from("<Q", data, at)[0]
        value = data[at + 8 : end]
    elif kind == ARRAY:
        of, count = struct.unpack_from("<IQ", data, at)
        if of == ARRAY:  # llama.cpp reads none, and a damaged file may nest thousands
            raise struct.error
        end = at + 12
        if of in SCALARS:
            value = np.dtype(SCALARS[of]).newbyteorder("<")
            at, end = end, end + count * value.itemsize
            value = np.frombuffer(data[at:end], value) if end <= len(data) else None
        else:
            value = []
            for _ in range(count):
                item, end = _decode(data, end, of)
                value.append(item)
    elif kind in SCALARS:
        code = f"<{SCALARS[kind]}"
        (value,), end = struct.unpack_from(code, data, at), at + struct.calcsize(code)
    else:
        raise struct.error
    if end > len(data):
        raise struct.error
    return value, end


def _encode(field: Field) -> bytes:
    if field.raw:
        return field.raw
    kind, value = struct.pack("<I", field.kind), field.value
    if field.kind == STRING:
        return kind + struct.pack("<Q", len(value)) + value
    if field.kind != ARRAY:
        return kind + struct.pack(f"<{SCALARS[field.kind]}", value)
    if field.of == STRING:
        items = b"".join(struct.pack("<Q", len(each)) + each for each in value)
    else:
        items = np.asarray(value, np.dtype(SCALARS[field.of]).newbyteorder("<")).tobytes()
    return kind + struct.pack("<IQ", field.of, len(value)) + items


def header(fields: Mapping[str, Field], tensors: Sequence[Tensor], alignment: int) -> bytes:
    """Return all bytes of a new file before its tensors' data."""
    parts, offset = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(fields))], 0
    for name, field in fields.items():
        parts += [struct.pack("<Q", len(name.encode())), name.encode(), _encode(field)]
    for tensor in tensors:
        name, shape = tensor.name.encode(), tensor.shape
        if tensor.kept is not None:
            shape = (*shape[:-1], len(tensor.kept))
        parts += [struct.pack("<Q", len(name)), name]
        info = (len(shape), *shape, tensor.kind, offset)
        parts.append(struct.pack(f"<I{len(shape)}QIQ", *info))
        offset += tensor.size + -tensor.size % alignment
    size = sum(map(len, parts))
    return b"".join([*parts, b"\0" * (-size % alignment)])


def contents(
    fields: Mapping[str, Field], tensors: Sequence[Tensor], alignment: int
) -> Iterator[tuple[str, Any]]:
    """Yield all bytes of a new file in parts, after the name of what they hold."""
    yield "its header", header(fields, tensors, alignment)
    for tensor in tensors:
        for part in tensor.parts():
            yield tensor.name, np.ascontiguousarray(part).data
        yield tensor.name, b"\0" * (-tensor.size % alignment)


def write(
    path: Path, fields: Mapping[str, Field], tensors: Sequence[Tensor], alignment: int = 32
) -> Iterator[int]:
    """Write a file, wait until it is on the disk, and yield the bytes of each step."""
    with path.open("wb") as file:
        for _, part in contents(fields, tensors, alignment):
            yield file.write(part)
        file.flush()
        os.fsync(file.fileno())
