"""Bigram-Backcopy as a data source."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxattn.errors import DataError
from jaxattn.runs.data_config import DataConfig
from train.data.bb import HELD_OUT, TRAIN, VALIDATION, generate, oracle
from train.data.bb_table import START, VOCAB, BigramTable, load_table
from train.data.cache_files import digest
from train.data.perturb import parse_perturbation
from train.data.source import Source

if TYPE_CHECKING:
    import grain


@dataclass(frozen=True)
class BigramBackcopySource(Source):
    """See `train.data.bb`."""

    table: BigramTable = field(kw_only=True, repr=False)

    def _train_batches(self) -> grain.IterDataset:
        from train.data.pipeline import bb_batches

        unique = -(-self.cfg.unique_tokens // self.cfg.context)
        how = {"stream": TRAIN, "unique": unique, "unique_seed": self.cfg.seed}
        return bb_batches(self.table, self.layout(), seed=self.seed, **how)

    def val_batches(self, count: int, batch_size: int | None = None) -> list[dict[str, np.ndarray]]:
        """Fresh sequences of a stream of their own."""
        from train.data.pipeline import bb_batches, take

        return take(bb_batches(self.table, self.layout(batch_size), seed=self.cfg.seed, stream=VALIDATION), count)

    def held_out(self, n: int, length: int, *, perturbed: bool = True) -> np.ndarray:
        """Fresh sequences from <s>."""
        rows = [generate(self.table, length, seed=self.cfg.seed, stream=HELD_OUT, index=i) for i in range(n)]
        out = np.stack(rows) if rows else np.zeros((0, length), np.int32)
        return self.perturb.replace(out, self.cfg.seed) if perturbed and self.perturb else out

    def encode_text(self, path: str, n: int, length: int) -> np.ndarray:
        """Always refused: the task has no tokenizer."""
        raise DataError(
            f"the text file {path!r} cannot be used with data.source='bb', which has no tokenizer: train "
            "on a text source, or leave the file out."
        )

    def entropies(self, max_tokens: int = 5_000_000) -> dict[str, float]:
        """Exact, `max_tokens` is not used."""
        o = oracle(self.table, self.cfg.context)
        return {
            "unigram_nats": o.unigram,
            "bigram_nats": o.bigram,
            "bigram_heldout_nats": o.bigram,
            "oracle_trigger_nats": o.trigger,
            "oracle_non_trigger_nats": o.non_trigger,
            "oracle_nats": (1 - o.trigger_fraction) * o.non_trigger,
            "trigger_fraction": o.trigger_fraction,
        }


def bigram_backcopy(cfg: DataConfig, place: dict[str, Any]) -> BigramBackcopySource:
    """Opens the task; `place` holds the seed and the process of `make_source`."""
    table = load_table(cfg.bb_table, cfg.bb_triggers)
    meta = {
        "source": "bb",
        "vocab_size": VOCAB,
        "table": cfg.bb_table or "built-in",
        "data_hash": digest(table.weights.tobytes(), table.unigram.tobytes(), repr(table.triggers)),
        "trigger_ids": list(table.triggers),
        **{f"oracle_{k}": v for k, v in dataclasses.asdict(oracle(table, cfg.context)).items()},
    }
    perturb = parse_perturbation(cfg.perturb, context=cfg.context, vocab=START)
    return BigramBackcopySource(
        **place,
        name="bb",
        vocab_size=VOCAB,
        meta=meta,
        perturb=perturb,
        trigger_ids=table.triggers,
        table=table,
    )
