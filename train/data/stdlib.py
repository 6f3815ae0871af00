"""The source code of the running Python as a corpus: text that is always there, offline.

Rule: every `.py` file below `sysconfig.get_path("stdlib")`, sorted by path, except folders named
site-packages, dist-packages, test, tests, idle_test, __pycache__ or config-*. One file is one document. A
file is decoded by its own coding line (PEP 263). The text differs between Python versions; the corpus hash in
the run's record tells them apart.
"""

from __future__ import annotations

import io
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from jaxattn.errors import DataError
from train.data.cache_files import digest
from train.data.corpus import Corpus, Tally

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def _files(root: Path, packages: set[str]) -> list[Path]:
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [n for n in subfolders if n not in _SKIPPED and not n.startswith("config-")]
        if packages and Path(folder) == root:
            subfolders[:] = [n for n in subfolders if n in packages]
            names = [n for n in names if n.removesuffix(".py") in packages]
        found.extend(Path(folder) / n for n in names if n.endswith(".py"))
    return sorted(found)


def _decode(raw: bytes) -> str:
    encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
    return io.TextIOWrapper(io.BytesIO(raw), encoding=encoding).read()


def stdlib_corpus(source: str = "stdlib") -> Corpus:
    """All of the standard library, or "stdlib:NAME,NAME" for some top-level packages and modules.

    Raises:
      DataError: no such package, or this Python ships no source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    packages = {name for name in source.partition(":")[2].split(",") if name}
    files = _files(root, packages)
    missing = packages - {path.relative_to(root).parts[0].removesuffix(".py") for path in files}
    if missing or not files:
        raise DataError(
            f"data.source={source!r} has no Python files for {sorted(missing) or 'stdlib'} under "
            f"{str(root)!r}: name top-level modules of the standard library, or use another source."
        )
    raw = {path: path.read_bytes() for path in files}
    names = "\n".join(str(path.relative_to(root)) for path in files)

    def read(tally: Tally) -> Iterator[str]:
        for path in files:
            try:
                text = _decode(path.read_bytes())
            except (UnicodeDecodeError, SyntaxError) as error:
                tally.bad(f"file {str(path)!r}", f"it does not decode ({error})")
                continue
            yield text

    return Corpus(
        name=source,
        fingerprint=digest("stdlib", names, *raw.values()),
        size=sum(map(len, raw.values())),
        files=len(files),
        read=read,
    )
