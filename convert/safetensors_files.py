"""The tensors of a HuggingFace folder of safetensors files, one file or sharded, none of it trusted.

Every header is checked here before the library opens the file: lengths, offsets, shapes and names may lie.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxattn.errors import Corrupt, Incomplete, Mismatch, Unsupported, UserError, shown
from jaxattn.json_text import as_object, read_object

DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}\.safetensors")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npy", ".npz", ".h5", ".msgpack")
MOST_HEADER = 100_000_000  # bytes, as the safetensors library has it
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor by its header: where it is, under which name, and what it says it is."""

    file: Path
    dtype: Any
    shape: tuple[int, ...]
    name: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def entries(folder: Path, root: Path | None = None) -> dict[str, Entry]:
    """Name -> entry of every tensor; only headers are read. Files must lie in `root` (default: the folder).

    Raises:
      Incomplete: no weights, or a file of the index is missing or short.
      Corrupt: a header lies.
      Mismatch: index and files disagree.
      Unsupported: only pickled weights, or a dtype that is no float of at most 32 bits.
    """
    root = (root or folder).resolve()
    files, mapped = _files(folder)
    found: dict[str, Entry] = {}
    for name in files:
        path = inside(folder / name, root)
        for tensor, entry in read_header(path).items():
            if tensor in found:
                raise Mismatch(f"tensor {tensor[:120]!r} is in {found[tensor].file.name} and in {name}; keep one.")
            if mapped is not None and mapped.get(tensor) != name:
                raise Mismatch(
                    f"tensor {tensor[:120]!r} is in {name} but {INDEX} says {str(mapped.get(tensor))[:80]!r}; "
                    "download the checkpoint again."
                )
            found[tensor] = entry
    if mapped is not None and (absent := sorted(set(mapped) - set(found))):
        raise Incomplete(
            f"tensor {absent[0][:120]!r} is in {INDEX} but not in {mapped[absent[0]]}; nothing is filled with random "
            "numbers: download the checkpoint again."
        )
    return found


def read_all(found: dict[str, Entry]) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor, file by file, one in memory at a time.

    Raises:
      Corrupt: NaN or inf, or the library refuses the file.
    """
    from safetensors import SafetensorError, safe_open

    for name, entry in sorted(found.items(), key=lambda item: item[1].file):
        try:
            # Opened anew for each tensor: the pages of a mapped file that were read count as this process's memory.
            with safe_open(entry.file, framework="numpy") as file:
                array = file.get_tensor(entry.name)
        except SafetensorError as error:
            raise Corrupt(f"{entry.file} cannot be read ({str(error)[:120]}); download it again.") from error
        yield name, finite(name, array, str(entry.file))


def save(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Write one file as PyTorch does.

    Raises:
      OSError: the disk refuses, which the library tells by an error of its own.
      UserError: the library refuses.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if (code := re.search(r"os error (\d+)", str(error))) is None:
            raise UserError(f"{path} cannot be written ({str(error)[:160]}).") from error
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def finite(name: str, array: np.ndarray, origin: str) -> np.ndarray:
    """The array itself. Raises `Corrupt` if it holds NaN or inf."""
    with np.errstate(over="ignore", invalid="ignore"):  # a finite sum proves it at half the cost
        if not np.isfinite(np.sum(array, dtype=np.float32)) and not np.isfinite(array.astype(np.float32)).all():
            raise Corrupt(f"tensor {name!r} of {origin} holds NaN or infinite numbers; download it again.")
    return array


def read_header(path: Path) -> dict[str, Entry]:
    """Name -> entry of one file, proven to cover the file exactly.

    Raises:
      Incomplete: the file is short.
      Corrupt: the header lies.
      Unsupported: a dtype outside `DTYPES`.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(size - 8, MOST_HEADER):
                raise Corrupt(
                    f"{path}: its header claims {length:,} bytes, but the file has {size:,} and a header at most "
                    f"{MOST_HEADER:,}; download it again."
                )
            raw = file.read(length)
    except OSError as error:
        raise Incomplete(f"{path} cannot be read ({error.strerror}); download it again.") from error
    header = as_object(raw, f"{path} (header)", strict=True)
    header.pop("__metadata__", None)
    spans, found = [], {}
    for name, value in header.items():
        dtype, shape, begin, end = _fields(value, name, path)
        if dtype not in DTYPES:
            raise Unsupported(
                f"tensor {name[:120]!r} of {path} has dtype {dtype[:20]}; weights must be one of {', '.join(DTYPES)}."
            )
        entry = Entry(path, DTYPES[dtype], shape, name)
        if end - begin != entry.bytes:
            raise Corrupt(f"tensor {name[:120]!r} of {path}: {end - begin:,} bytes for shape {str(list(shape))[:80]}.")
        spans.append((begin, end, name))
        found[name] = entry
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise Corrupt(f"tensor {name[:120]!r} of {path} begins at byte {begin:,}, not {at:,}: a gap or an overlap.")
        at = end
    data = size - 8 - length
    if at != data:
        kind = Incomplete if data < at else Corrupt
        raise kind(f"{path} has {data:,} bytes of weights but its header describes {at:,}; download it again.")
    return found


def _fields(value: Any, name: str, path: Path) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape and offsets of one header entry. Raises `Corrupt`."""
    is_count = lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 1 << 48
    ok = (
        isinstance(value, dict) and set(value) == {"dtype", "shape", "data_offsets"} and isinstance(value["dtype"], str)
    )
    if ok:
        shape, offsets = value["shape"], value["data_offsets"]
        ok = isinstance(shape, list) and len(shape) <= 8 and all(map(is_count, shape))
        ok = ok and isinstance(offsets, list) and len(offsets) == 2 and all(map(is_count, offsets))
    if not ok:
        raise Corrupt(f"tensor {name[:120]!r} of {path}: its header entry is {shown(value)}; download it again.")
    return value["dtype"], tuple(shape), offsets[0], offsets[1]


def _files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The files that hold weights, and the index's name -> file where it counts: one whole file goes before it."""
    index = folder / INDEX
    if (folder / SINGLE).exists():
        return [SINGLE], None
    if index.exists():
        mapped = read_object(index, strict=True).get("weight_map")
        if not isinstance(mapped, dict) or not mapped:
            raise Corrupt(f"{index}: weight_map must be an object that names a file for every tensor.")
        for tensor, name in mapped.items():
            if not isinstance(name, str) or not FILE_NAME.fullmatch(name):
                raise Corrupt(
                    f"{index} places {tensor[:120]!r} in {str(name)[:120]!r}; only files of this folder are read, "
                    "with plain names."
                )
        return sorted(set(mapped.values())), mapped
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED) if folder.is_dir() else []
    if pickled:
        raise Unsupported(
            f"{folder} has its weights in {pickled[0]}, a format that can run code when it is opened; it is not read. "
            "Convert it to safetensors where you trust it."
        )
    raise Incomplete(f"{folder} has neither {SINGLE} nor {INDEX}; download the whole checkpoint.")


def inside(path: Path, root: Path) -> Path:
    """The path. Raises if it is missing, no plain file, or leads out of `root` by a link."""
    if not path.exists():
        raise Incomplete(f"{path} is missing, though the checkpoint consists of it; download it.")
    if not path.resolve().is_relative_to(root):
        raise Corrupt(f"{path} is a link that leads out of {root}; nothing outside the checkpoint is read.")
    if not path.is_file():
        raise Corrupt(f"{path} is no plain file; download it again.")
    return path
