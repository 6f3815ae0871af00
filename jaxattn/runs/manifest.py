"""The manifest of a checkpoint: what was saved, byte for byte, and for which configuration.

Orbax checks its index, not the bytes of the arrays: a flipped bit restores without a word. So every
step carries `manifest.json` with a sha256 of each array and of each file. It is written last and
carries a digest of itself; a step without it does not exist.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxattn.errors import Corrupt, Incomplete, Mismatch, Unsupported, UserError, shown
from jaxattn.json_text import loads
from jaxattn.runs.rundir import versions, write_json_atomic

NAME = "manifest.json"
FORMAT = 1
BLOCK = 1 << 22
THREADS = min(4, os.cpu_count() or 1)  # hashlib lets go of the GIL; more than 4 only fight for the disk


@dataclass(frozen=True)
class Leaf:
    """One array: `sha256` is of its logical content in C order, None where no host holds all of it."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    sha256: str | None


@dataclass(frozen=True)
class File:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    step: int
    leaves: dict[str, Leaf]
    files: dict[str, File]
    has_data: bool
    config: dict[str, Any]


# ----------------------------------------------------------------------------------------- digests


def hash_array(array: np.ndarray) -> str:
    """sha256 of an array's content in C order, whatever its layout in memory."""
    flat: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return hashlib.sha256(flat).hexdigest()


def describe(leaf: Any) -> Leaf:
    """The manifest entry of a leaf; hashes it if it is a host array."""
    content = hash_array(leaf) if isinstance(leaf, np.ndarray) else None
    size = int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize
    return Leaf(leaf.dtype.name, tuple(leaf.shape), size, content)


def describe_all(leaves: Mapping[str, Any]) -> dict[str, Leaf]:
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(leaves, pool.map(describe, leaves.values()), strict=True))


def hash_file(path: Path, *, sync: bool = False) -> File:
    """Size and sha256 of a file; `sync` also makes its content durable."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
        if sync:
            os.fsync(file.fileno())
    return File(size, digest.hexdigest())


def hash_files(folder: Path) -> dict[str, File]:
    """Every file below `folder` but the manifest, by its path with "/", made durable on the way."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    names = [name for name in names if name != NAME]
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: hash_file(folder / name, sync=True), names), strict=True))


def _canonical(obj: Any) -> str:
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# ------------------------------------------------------------------------------------ write and read


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as JSON gives it back (tuples become lists). Raises `UserError` if it cannot."""
    try:
        return json.loads(json.dumps(config))
    except (TypeError, ValueError) as error:
        raise UserError(f"the configuration cannot be written as JSON ({error}): use plain values.") from error


def write(folder: Path, manifest: Manifest) -> None:
    """Write `folder/manifest.json` durably. Raises `OSError`."""
    body = {
        "format": FORMAT,
        **asdict(manifest),
        "config_sha256": _canonical(manifest.config),
        "versions": versions(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    body = json.loads(json.dumps(body))  # so that the digest is of what a reader will see
    write_json_atomic(folder / NAME, {"sha256": _canonical(body), "manifest": body})


def read(folder: Path) -> Manifest:
    """Raises `Incomplete` (no manifest), `Corrupt` (damaged), `Unsupported` (a newer format)."""
    path = folder / NAME
    try:
        outer = loads(path.read_bytes())
        body, digest = outer["manifest"], outer["sha256"]
    except FileNotFoundError as error:
        raise Incomplete(
            f"{path} is missing, so this step was never finished: restore another step or delete {folder}."
        ) from error
    except OSError as error:
        raise Incomplete(f"{path} cannot be read ({error.strerror}): restore another step.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(
            f"{path} is damaged: expected JSON with 'manifest' and 'sha256', found {first_line(error)}; "
            "restore another step."
        ) from error
    try:
        if (found := _canonical(body)) != digest:
            raise Corrupt(f"{path} is damaged: expected sha256 {shown(digest)}, found {found}; restore another step.")
        if body["format"] != FORMAT:
            raise Unsupported(
                f"{path} has format {shown(body['format'])} and this version reads format {FORMAT}: "
                f"use jaxattn {body['versions']['jaxattn']}, which wrote it."
            )
        return _manifest(body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Corrupt(
            f"{path} has the digest of what it says, yet what it says is no manifest ({first_line(error)}); "
            "restore another step."
        ) from error


def _manifest(body: dict[str, Any]) -> Manifest:
    """Raises `ValueError`, `KeyError`, `TypeError` or `AttributeError` for what `write` has not written."""
    files = {name: File(_size(x["bytes"]), str(x["sha256"])) for name, x in body["files"].items()}
    if outside := [name for name in files if name.startswith("/") or ".." in name.split("/")]:
        raise ValueError(f"{shown(outside[0])} lies outside its folder")
    leaves = {
        name: Leaf(_dtype(x["dtype"]), tuple(map(_size, x["shape"])), _size(x["bytes"]), x["sha256"])
        for name, x in body["leaves"].items()
    }
    if not isinstance(body["config"], dict):
        raise TypeError("its configuration is no object")
    return Manifest(_size(body["step"]), leaves, files, bool(body["has_data"]), body["config"])


def _dtype(name: str) -> str:
    dtype = np.dtype(jnp.dtype(name))
    if dtype.kind in "OUSMm":
        raise ValueError(f"{shown(name)} is no dtype of an array")
    return dtype.name


def _size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{shown(value)} is no size")
    return value


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# ---------------------------------------------------------------------------------------- comparison


def verify_files(folder: Path, manifest: Manifest, *, content: bool = True) -> None:
    """Compare the files with the manifest; other files beside them do no harm and are ignored.

    Cost: one read and one sha256 of each byte; with `content=False` only sizes are compared.
    Raises `Incomplete` (missing or short) or `Corrupt` (long or changed), naming the first such file.
    """

    def check(item: tuple[str, File]) -> None:
        name, expected = item
        path = folder / name
        try:
            size = path.stat().st_size
            found = hash_file(path) if content and size == expected.bytes else None
        except OSError as error:
            raise Incomplete(
                f"{path} cannot be read ({error.strerror}), expected {expected.bytes} bytes: restore another step."
            ) from error
        if size != expected.bytes:
            kind = Incomplete if size < expected.bytes else Corrupt
            raise kind(f"{path} has {size} bytes, expected {expected.bytes}: restore another step.")
        if found is not None and found != expected:
            raise Corrupt(
                f"{path} was changed after it was saved: expected sha256 {expected.sha256}, "
                f"found {found.sha256}; restore another step."
            )

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(check, manifest.files.items()):
            pass


def verify_arrays(folder: Path, manifest: Manifest, leaves: Mapping[str, Any]) -> None:
    """Compare restored host arrays with the manifest. Raises `Corrupt` naming the tensor."""
    for name, found in describe_all({n: x for n, x in leaves.items() if isinstance(x, np.ndarray)}).items():
        expected = manifest.leaves[name]
        if expected.sha256 is not None and found != expected:
            raise Corrupt(
                f"tensor {name!r} of {folder} is not what was saved: expected {expected.dtype}"
                f"{list(expected.shape)} sha256 {expected.sha256}, found {found.dtype}{list(found.shape)} "
                f"sha256 {found.sha256}; restore another step."
            )


def compare_leaves(
    folder: Path, manifest: Manifest, wanted: Mapping[str, Any], *, allow_cast: bool, only: str | None = None
) -> None:
    """Raises `Mismatch` naming the leaf if names, shapes or dtypes differ from `wanted`.

    `allow_cast` accepts one floating type for another; nothing accepts an integer for a float. `only` leaves out what
    is not below that name.
    """

    def refuse(name: str, saved: object, now: object, remedy: str) -> None:
        raise Mismatch(f"tensor {name!r} of {folder}: saved {saved}, expected {now}; {remedy}.")

    for name in wanted:
        if name not in manifest.leaves:
            refuse(name, "nothing", "the tensor", "build the model with the configuration in its manifest")
    for name, saved in manifest.leaves.items():
        if only is not None and not name.startswith(f"{only}/"):
            continue
        if name not in wanted:
            refuse(name, "a tensor", "none", "build the model with the configuration in its manifest")
        now = wanted[name]
        if saved.shape != tuple(now.shape):
            refuse(name, f"shape {list(saved.shape)}", f"shape {list(now.shape)}", "use the saved configuration")
        if saved.dtype != np.dtype(now.dtype).name:
            floats = all(jnp.issubdtype(jnp.dtype(d), jnp.floating) for d in (saved.dtype, now.dtype))
            if not (allow_cast and floats):
                remedy = "pass allow_cast=True to convert" if floats else "use the saved dtype"
                refuse(name, f"dtype {saved.dtype}", f"dtype {np.dtype(now.dtype).name}", remedy)


def diff_config(saved: Mapping[str, Any], current: Mapping[str, Any], *, ignore: Iterable[str] = ()) -> list[str]:
    """Differences as "model.num_heads: saved 4, now 8", sorted; `ignore` holds dotted prefixes.

    A prefix covers a field and all below it: "data" covers "data.path" but not "dataset".
    """
    old, new = _flatten(plain(saved)), _flatten(plain(current))
    prefixes = tuple(ignore)
    lines = []
    for name in sorted(old.keys() | new.keys()):
        if any(name == p or name.startswith(p + ".") for p in prefixes):
            continue
        before, after = old.get(name, _ABSENT), new.get(name, _ABSENT)
        if before != after or type(before) is not type(after):
            lines.append(f"{name}: saved {shown(before)}, now {shown(after)}")
    return lines


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


_ABSENT = _Absent()


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, name + "."))
        else:
            flat[name] = value
    return flat
