"""The data configuration: what to read, how to cut it into sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxattn.config_fields import check_fields
from jaxattn.errors import ConfigError, shown


@dataclass(frozen=True)
class DataConfig:
    """What the model reads. Every field is a command line flag."""

    source: str = "bb"
    """Where the text comes from: "bb" (the Bigram-Backcopy task, no files needed), "stdlib" (the source of
    the running Python; "stdlib:json,email" takes some of its packages), a synthetic task ("mqar", "passkey",
    "copy", "selective_copy", with options like "mqar(pairs=[4, 8], vocab=512)"), a path, a glob or a comma-separated
    list of txt, md, py, jsonl or parquet files, or "hf:NAME[:SPLIT]" for a HuggingFace dataset or local
    dataset folder."""

    tokenizer: str = "bpe"
    """"bpe" (trained on the corpus, then cached), "bytes", the path of a tokenizer.json or of a folder that
    holds one, or "hf:NAME" from the HuggingFace hub. Not used by "bb" and tasks."""

    vocab_size: int = 2048
    """Entries of the BPE that is trained here, at least 257 (256 bytes and the end-of-text token)."""

    context: int = 256
    """Tokens per sequence, T."""

    batch_size: int = 32
    """Sequences per step over all processes; the process count must divide it."""

    text_field: str = "text"
    """Name of the text column of jsonl, parquet and HuggingFace records."""

    val_fraction: float = 0.02
    """Share of the documents held out for validation, chosen by a hash of (data.seed, document number)."""

    seed: int = 0
    """Seed of what is held out: which documents or sequences validate, in which order, and which windows
    the sink metric reads. --seed leaves it alone, so runs of several seeds are measured on the same text."""

    packing: Literal["concat", "best_fit"] = "concat"
    """"concat" joins documents and cuts every T tokens; "best_fit" keeps documents of up to
    T tokens whole and pads what is left over."""

    workers: int = 0
    """Processes that prepare batches ahead; 0 prepares them in the training process."""

    unique_tokens: int = 0
    """Train on the first N tokens only, over and over (unique-token budget of the sink study); 0 takes
    all."""

    prefix_len: int = 0
    """Prefix language model: no loss on the first p positions; the batch then carries "prefix_len"."""

    perturb: str = ""
    """Replace tokens at given 0-based positions of every sequence: "random@0", "random@0,1", "fixed=17@2"."""

    max_bad_records: int = 0
    """Corrupt records (files, lines, row groups) that are skipped and counted; one more stops the run."""

    cache_dir: str = ""
    """Where tokenizers and token files are kept; default $JAXATTN_CACHE, else ~/.cache/jaxattn."""

    bb_triggers: int = 3
    """Bigram-Backcopy: how many of the most frequent characters are triggers."""

    bb_table: str = ""
    """Bigram-Backcopy: a UTF-8 text file to count character pairs in; default: the built-in counts."""

    def __post_init__(self) -> None:
        check_fields("data", self)


def validate(cfg: DataConfig, *, process_index: int = 0, process_count: int = 1) -> None:
    """Refuses impossible values.

    Raises:
      ConfigError: naming the field, the value and the remedy.
    """

    def need(ok: bool, field: str, remedy: str) -> None:
        if not ok:
            raise ConfigError(f"data.{field}={shown(getattr(cfg, field))} is not possible: {remedy}.")

    need(cfg.source.strip() != "", "source", "give 'bb', 'stdlib', a task, a path, a glob or 'hf:NAME'")
    need(cfg.tokenizer.strip() != "", "tokenizer", "give 'bpe', 'bytes', a path or 'hf:NAME'")
    need(cfg.tokenizer != "bpe" or cfg.vocab_size >= 257, "vocab_size", "a byte-level BPE needs at least 257")
    need(cfg.context >= 2, "context", "a sequence needs at least 2 tokens")
    need(cfg.batch_size >= 1, "batch_size", "a batch needs at least 1 sequence")
    need(0.0 <= cfg.val_fraction < 1.0, "val_fraction", "choose a number from 0 up to, not including, 1")
    need(cfg.workers >= 0, "workers", "choose 0 or more")
    need(cfg.unique_tokens >= 0, "unique_tokens", "choose 0 (all) or a number of tokens")
    need(0 <= cfg.prefix_len < cfg.context, "prefix_len", f"choose 0 up to context-1={cfg.context - 1}")
    need(cfg.max_bad_records >= 0, "max_bad_records", "choose 0 or more")
    need(1 <= cfg.bb_triggers <= 32, "bb_triggers", "choose 1 to 32 of the 65 characters")
    if not 0 <= process_index < process_count:
        raise ConfigError(
            f"process_index={process_index} is not possible with process_count={process_count}: "
            "choose 0 up to process_count-1."
        )
    need(
        cfg.batch_size % process_count == 0,
        "batch_size",
        f"choose a multiple of the {process_count} processes",
    )
