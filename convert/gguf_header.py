"""The header of a GGUF file: metadata and the places of the tensors, each length proven before it is believed.

Arrays stay in the file until somebody asks for them, so a header costs little however much it claims.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxattn.errors import Corrupt, Incomplete, Unsupported, shown

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
MOST = {
    "tensors": 1 << 16,
    "metadata entries": 1 << 16,
    "array elements": 1 << 24,
    "strings of an array": 1 << 20,  # more than any vocabulary or its merges
    "bytes of a string": 1 << 24,
}
ALIGNMENT = "general.alignment"


@dataclasses.dataclass(frozen=True)
class Place:
    """An array of the metadata by where it is."""

    kind: int
    length: int
    at: int


@dataclasses.dataclass(frozen=True)
class TensorPlace:
    """A tensor by its header: dims as GGUF has them (fastest first), ggml's type number, offset behind the header."""

    name: str
    dims: tuple[int, ...]
    kind: int
    offset: int

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in], as everybody else writes it."""
        return self.dims[::-1]


class Header(Mapping[str, Any]):
    """Metadata by key (arrays are decoded when asked for), `tensors` by name, and where their `data` begin.

    Raises:
      Corrupt: the header lies. Incomplete: the file ends inside it. Unsupported: another version or byte order.
    """

    def __init__(self, data: Any, origin: str) -> None:
        self._data, self._at, self.origin = data, 0, origin
        if bytes(data[:4]) != b"GGUF":
            raise Corrupt(f"{origin} does not begin with GGUF; it is another kind of file or damaged.")
        self._at = 4
        version = self._number("<I")
        if version not in (2, 3):
            raise Unsupported(f"{origin} has GGUF version {version}; versions 2 and 3 in little-endian order are read.")
        tensors, entries = self._count("tensors"), self._count("metadata entries")
        self._values: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string("a key")
            if key in self._values:
                raise Corrupt(f"{origin} names {shown(key)} twice; it is damaged.")
            self._values[key] = self._value(self._number("<I"))
        self.tensors = {place.name: place for place in self._tensors(tensors)}
        alignment = self._values.get(ALIGNMENT, 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise Corrupt(f"{origin}: {ALIGNMENT} is {shown(alignment)} but must be a power of two.")
        self.data = -(-self._at // alignment) * alignment
        for place in self.tensors.values():
            if place.offset % alignment or self.data + place.offset > len(data):
                raise Corrupt(f"{origin}: tensor {shown(place.name)} lies outside the file; download it again.")

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, Place):
            value = self._values[key] = self._decoded(value, key)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def length(self, key: str) -> int | None:
        """Elements of an array, without decoding it; None if there is none of that name."""
        value = self._values.get(key)
        return value.length if isinstance(value, Place) else len(value) if isinstance(value, list) else None

    def _tensors(self, count: int) -> Iterator[TensorPlace]:
        seen: set[str] = set()
        for _ in range(count):
            name = self._string("the name of a tensor")
            if name in seen:
                raise Corrupt(f"{self.origin} has tensor {shown(name)} twice; it is damaged.")
            seen.add(name)
            rank = self._number("<I")
            if not 1 <= rank <= 4:
                raise Corrupt(f"{self.origin}: tensor {shown(name)} has {rank} dimensions; weights have 1 or 2.")
            dims = tuple(self._number("<Q") for _ in range(rank))
            if 0 in dims:
                raise Corrupt(f"{self.origin}: tensor {shown(name)} has dimensions {list(dims)}; weights have no 0.")
            kind, offset = self._number("<I"), self._number("<Q")
            # No type packs more than 8 numbers in a byte.
            if offset > len(self._data) or math.prod(dims) > 16 * len(self._data):
                raise Corrupt(f"{self.origin}: tensor {shown(name)} lies outside the file; download it again.")
            yield TensorPlace(name, dims, kind, offset)

    def _number(self, form: str) -> Any:
        end = self._at + struct.calcsize(form)
        if end > len(self._data):
            raise Incomplete(f"{self.origin} ends inside its header; download it again.")
        (value,) = struct.unpack(form, self._data[self._at : end])
        self._at = end
        return value

    def _count(self, what: str) -> int:
        return self._believed(self._number("<Q"), what)

    def _believed(self, value: int, what: str) -> int:
        if value > MOST[what]:
            raise Corrupt(f"{self.origin} claims {value:,} {what}; more than {MOST[what]:,} are not believed.")
        return value

    def _string(self, what: str) -> str:
        length = self._count("bytes of a string")
        raw = bytes(self._data[self._at : self._at + length])
        if len(raw) < length:
            raise Incomplete(f"{self.origin} ends inside its header; download it again.")
        self._at += length
        return self._text(raw, what)

    def _text(self, raw: bytes, what: str) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Corrupt(
                f"{self.origin}: {what} is {shown(raw)}, which is no UTF-8 text ({error.reason}); download it again."
            ) from error

    def _value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == STRING:
            return self._string("a metadata value")
        if kind != ARRAY:
            raise Corrupt(f"{self.origin} has a metadata value of kind {kind}, which GGUF does not have.")
        inner, length = self._number("<I"), self._count("array elements")
        place = Place(inner, length, self._at)
        if inner in SCALARS:
            self._at += length * struct.calcsize(SCALARS[inner])
        elif inner == STRING:
            self._skip_strings(self._believed(length, "strings of an array"))
        else:
            raise Corrupt(f"{self.origin} has an array of kind {inner}, which no model needs; it is damaged.")
        if self._at > len(self._data):
            raise Incomplete(f"{self.origin} ends inside its header; download it again.")
        return place

    def _skip_strings(self, count: int) -> None:
        data, at, size, most = self._data, self._at, len(self._data), MOST["bytes of a string"]
        length = struct.Struct("<Q").unpack_from
        if at + 8 * count > size:  # no string has less than its length
            raise Incomplete(f"{self.origin} ends inside its header; download it again.")
        for _ in range(count):
            if at + 8 > size:
                raise Incomplete(f"{self.origin} ends inside its header; download it again.")
            (n,) = length(data, at)
            if n > most:
                self._believed(n, "bytes of a string")
            at += 8 + n
        self._at = at

    def _decoded(self, place: Place, key: str) -> list[Any]:
        if place.kind != STRING:
            form = np.dtype(SCALARS[place.kind]) if place.kind != 7 else np.dtype(bool)
            return np.frombuffer(self._data, form, place.length, place.at).tolist()
        found, at = [], place.at
        for _ in range(place.length):
            (n,) = struct.unpack_from("<Q", self._data, at)
            found.append(self._text(bytes(self._data[at + 8 : at + 8 + n]), f"an entry of {shown(key)}"))
            at += 8 + n
        return found
