"""The tokenizer that a run of text was trained with, read from its folder; its data are not opened."""

from __future__ import annotations

from pathlib import Path

from jaxattn.errors import Incomplete
from jaxattn.hf_tokenizer import has_tokenizer
from jaxattn.json_text import optional_object, read_text
from jaxattn.open_tokenizer import byte_tokenizer, load_tokenizer, parsed
from jaxattn.places import SIDE
from jaxattn.runs.config import RunConfig
from jaxattn.runs.rundir import write_atomic
from jaxattn.rust import guarded
from jaxattn.tokenizer import Tokenizer, read_tokenizer

OWN = "tokenizer.json"  # the BPE that a run trained on its corpus


def write_own_tokenizer(folder: Path, cfg: RunConfig, tokenizer: Tokenizer | None) -> None:
    """Leave the BPE of a run's own corpus in its folder, which then needs no data to be read. Raises `OSError`."""
    if tokenizer is not None and cfg.data.tokenizer == "bpe":
        write_atomic(folder / OWN, tokenizer.to_json().encode())


def run_tokenizer(folder: Path, cfg: RunConfig) -> Tokenizer | None:
    """The tokenizer of a run or a converted checkpoint; None for a run that is not of text.

    Raises:
      UserError: it is not there any more, or cannot be read.
    """
    side = folder / SIDE
    if has_tokenizer(side):
        return read_tokenizer(side)
    if cfg.preset == "converted" and cfg.data.tokenizer != "bytes":
        raise Incomplete(f"{side} has no tokenizer: the source had none; put its files there.")
    return trained_tokenizer(folder, cfg)


def trained_tokenizer(folder: Path, cfg: RunConfig) -> Tokenizer | None:
    """The tokenizer that `data.tokenizer` names; None for a run that is not of text.

    Raises:
      UserError: it is not there any more, or cannot be read.
    """
    facts = optional_object(folder / "data.json").get("meta")
    if cfg.data.source == "bb" or (isinstance(facts, dict) and "tokenizer" not in facts):
        return None
    if cfg.data.tokenizer == "bytes":
        return byte_tokenizer()
    if cfg.data.tokenizer != "bpe":
        return load_tokenizer(cfg.data.tokenizer)
    path = folder / OWN
    if not path.is_file():
        raise Incomplete(
            f"{path} is missing, the tokenizer of this run's corpus: python -m train.pretrain --resume "
            f"--run-dir={folder} writes it anew."
        )
    with guarded(f"{str(path)!r} is not a tokenizer.json"):
        return Tokenizer(parsed(read_text(path)))
