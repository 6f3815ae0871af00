"""Files that other runs may read at the same time: atomic writes, checksummed reads."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from jaxattn.errors import FULL, DataError, free_bytes
from jaxattn.places import cache_folder


def cache_root(configured: str = "") -> Path:
    """The folder for tokenizers and tokens: the configured one, else $JAXATTN_CACHE, else ~/.cache/jaxattn.

    Raises:
      DataError: it cannot be created or written.
    """
    root = Path(configured).expanduser() if configured else cache_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"data.cache_dir={str(root)!r} cannot be created ({error.strerror}): choose a writable folder "
            "with --data.cache-dir or the environment variable JAXATTN_CACHE."
        ) from error
    return root


def digest(*parts: str | bytes) -> str:
    """A 24-digit name for the parts; lengths are hashed too, so ("ab", "c") differs from ("a", "bc")."""
    h = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        h.update(len(raw).to_bytes(8, "little"))
        h.update(raw)
    return h.hexdigest()[:24]


def write_atomic(path: Path, chunks: Iterable[bytes]) -> tuple[int, str]:
    """Writes the chunks so that readers see the old file or the whole new one.

    Returns:
      (bytes written, SHA-256 of them).
    Raises:
      DataError: the disk refuses.
    """
    h, size = hashlib.sha256(), 0
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                h.update(chunk)
                size += len(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        free = f", {free_bytes(path.parent):,} bytes free" if error.errno in FULL else ""
        raise DataError(
            f"the cache file {str(path)!r} cannot be written ({error.strerror}{free}): free space or choose "
            "another folder with --data.cache-dir."
        ) from error
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
    return size, h.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes (about 1 s per GB)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def corrupt(path: Path, why: str) -> DataError:
    """The error for a cache file that cannot be trusted: nothing is rebuilt behind the user's back."""
    return DataError(f"the cache file {str(path)!r} {why}: delete it and run again to build it anew.")
