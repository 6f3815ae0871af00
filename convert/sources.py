"""Where weights come from: a HuggingFace folder, a GGUF file, or a name on the HuggingFace hub."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from convert import hf_config
from convert import safetensors_files as st
from convert.gguf_files import GgufFile
from convert.gguf_tokenizer import save as save_gguf_tokenizer
from convert.hf_fields import Fields, check_ids
from jaxattn.chat import ADDITIONAL
from jaxattn.errors import Incomplete, Unsupported, UserError, one_line, shown
from jaxattn.json_text import read_object

# Kept beside the weights, byte for byte, and written back on export.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tiktoken.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    st.INDEX,
)
MOST_SIDE_BYTES = 128 << 20


@contextlib.contextmanager
def reading(origin: str | Path) -> Iterator[None]:
    """A block that reads a source and writes nothing.

    Raises:
      Incomplete: in place of any `OSError`, naming its file, or `origin`.
    """
    try:
        yield
    except OSError as error:
        raise Incomplete(
            f"{error.filename or origin} cannot be read ({error.strerror or error}): check permissions and disk."
        ) from error


def side_names(folder: Path) -> list[str]:
    """The names of `SIDE_FILES` that may be in a folder, and those of its additional chat templates."""
    more = sorted((folder / ADDITIONAL).glob("*.jinja"))
    return [*SIDE_FILES, *(f"{ADDITIONAL}/{path.name}" for path in more)]


class Source(Protocol):
    """A checkpoint to convert; `config`, `shapes` and `layout` read no weights."""

    origin: str
    kind: str

    def config(self) -> dict[str, Any]: ...
    def notes(self) -> list[str]: ...
    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    def layout(self) -> dict[str, str]: ...
    def read_all(self) -> Iterator[tuple[str, np.ndarray]]: ...
    def save_side_files(self, folder: Path) -> None: ...
    def files(self) -> list[Path]: ...


@dataclasses.dataclass
class Folder:
    """A HuggingFace folder of safetensors; links may lead into `root` only (the hub's cache consists of links)."""

    path: Path
    root: Path | None = None
    kind = "huggingface"

    def __post_init__(self) -> None:
        self.origin = str(self.path)
        self._entries: dict[str, st.Entry] | None = None

    @property
    def entries(self) -> dict[str, st.Entry]:
        if self._entries is None:
            self._entries = _with_prefix(st.entries(self.path, self.root))
        return self._entries

    def config(self) -> dict[str, Any]:
        self._guard(self.path / "config.json")
        if (self.path / "adapter_config.json").exists():
            raise Unsupported(
                f"{self.path} holds adapter_config.json: an adapter is not read; merge it into the model first."
            )
        self._check_generation()
        return read_object(self.path / "config.json", strict=True)

    def notes(self) -> list[str]:
        return hf_config.notes(self.config())

    def _check_generation(self) -> None:
        """Whoever generates later believes the ids in this file."""
        path = self.path / "generation_config.json"
        self._guard(path)
        if path.exists():
            check_ids(Fields(read_object(path, strict=True), str(path)), hf_config.TOKEN_IDS, several=("eos_token_id",))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def layout(self) -> dict[str, str]:
        return {name: entry.file.name for name, entry in self.entries.items()}

    def read_all(self) -> Iterator[tuple[str, np.ndarray]]:
        return st.read_all(self.entries)

    def save_side_files(self, folder: Path) -> None:
        for name in side_names(self.path):
            with reading(self.path / name):
                raw = self._side_file(self.path / name)
            if raw is not None:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(raw)

    def _side_file(self, path: Path) -> bytes | None:
        if not path.is_file():
            return None
        self._guard(path)
        if path.stat().st_size > MOST_SIDE_BYTES:
            raise UserError(f"{path} has more than {MOST_SIDE_BYTES:,} bytes; no tokenizer is that large.")
        return path.read_bytes()

    def files(self) -> list[Path]:
        return sorted({entry.file for entry in self.entries.values()})

    def _guard(self, path: Path) -> None:
        if path.exists():
            st.inside(path, (self.root or self.path).resolve())


@dataclasses.dataclass
class Gguf:
    """A GGUF file."""

    path: Path
    kind = "gguf"

    def __post_init__(self) -> None:
        self.origin = str(self.path)
        self.opened = GgufFile(self.path)

    def config(self) -> dict[str, Any]:
        return self.opened.config()

    def notes(self) -> list[str]:
        return self.opened.notes()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.opened.shapes()

    def layout(self) -> dict[str, str]:
        return dict.fromkeys(self.shapes(), st.SINGLE)

    def read_all(self) -> Iterator[tuple[str, np.ndarray]]:
        return self.opened.read_all()

    def save_side_files(self, folder: Path) -> None:
        from jaxattn.runs.rundir import write_json_atomic

        save_gguf_tokenizer(self.opened.fields, folder, self.origin)
        write_json_atomic(folder / "config.json", self.config())

    def files(self) -> list[Path]:
        return [self.path]


def _with_prefix(found: dict[str, st.Entry]) -> dict[str, st.Entry]:
    """The names of a whole model for a checkpoint that was saved without its head."""
    if any(name.startswith("model.") for name in found):
        return found
    return {name if name.startswith("lm_head.") else f"model.{name}": entry for name, entry in found.items()}


def open_source(text: str) -> Source:
    """A path or a hub name.

    Raises:
      UserError: nothing of that name is there.
    """
    path = Path(text)
    try:
        path.exists()
    except OSError as error:  # a name too long, a folder that may not be entered
        raise Incomplete(f"{shown(text)} cannot be opened ({error.strerror}).") from error
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path} is no .gguf file; give the folder of a HuggingFace checkpoint, or a GGUF file.")
        return Gguf(path)
    if path.is_dir():
        return Folder(path)
    if path.is_absolute() or text.startswith(".") or text.count("/") != 1:
        raise Incomplete(f"{text} does not exist; give a folder, a GGUF file, or a hub name like Qwen/Qwen3-0.6B.")
    return _download(text)


def _download(name: str) -> Source:
    """The snapshot of a hub repository: JSON, tokenizer and safetensors files alone."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise UserError(f"{name!r} is no path here, and hub names need: pip install 'jaxattn[hf]'.") from error
    patterns = ["model*.safetensors", *SIDE_FILES, f"{ADDITIONAL}/*.jinja"]
    try:  # a * of the hub's patterns crosses folders
        folder = Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*.safetensors"]))
    except HFValidationError as error:
        raise UserError(f"{name!r} is neither a path nor a hub name ({error}).") from error
    except Exception as error:  # the client lets its HTTP library's own errors pass
        reason = one_line(str(error)[:160]) or type(error).__name__
        raise UserError(
            f"{name!r} is no path here and could not be downloaded ({reason}); "
            "check the name, the network and HF_TOKEN."
        ) from error
    return Folder(folder, root=folder.parent.parent)
