"""One object per data source: training iterator, validation batches, held-out sequences, entropies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxattn.errors import ConfigError
from jaxattn.runs.data_config import DataConfig
from train.data.perturb import Perturbation

if TYPE_CHECKING:
    import grain

    from jaxattn.tokenizer import Tokenizer
    from train.data.pipeline import Layout


@dataclass(frozen=True)
class Source(ABC):
    """Where a run's tokens come from; made by `make_source`."""

    cfg: DataConfig
    seed: int
    """Of the training stream; what is held out follows `cfg.seed`."""
    process_index: int
    process_count: int
    name: str
    vocab_size: int
    meta: dict[str, Any]
    """JSON-able facts about the data for the run's record."""
    perturb: Perturbation | None = field(repr=False)
    tokenizer: Tokenizer | None = field(default=None, repr=False)
    trigger_ids: tuple[int, ...] = ()

    @property
    def indivisible(self) -> bool:
        """Whether a sequence means something only as a whole, at the training context; text can be cut."""
        return self.tokenizer is None

    def layout(self, batch_size: int | None = None) -> Layout:
        """Shape of this process's batches.

        Raises:
          ConfigError: the processes do not divide the batch.
        """
        from train.data.pipeline import Layout

        size = self.cfg.batch_size if batch_size is None else batch_size
        if size < 1 or size % self.process_count:
            raise ConfigError(f"batch_size={size} must be a positive multiple of the {self.process_count} processes.")
        return Layout(
            context=self.cfg.context,
            batch_size=size,
            process_index=self.process_index,
            process_count=self.process_count,
            packing=self.cfg.packing,
            workers=self.cfg.workers,
            prefix_len=self.cfg.prefix_len,
            perturb=self.perturb,
        )

    def train_iterator(self) -> grain.DatasetIterator:
        """Endless training batches of this process: a dict of NumPy arrays.

        tokens, targets, positions, segment_ids [b, T] int32 and loss_mask [b, T] bool (and prefix_len [b]
        int32 for a prefix model). positions restart at 0 in each piece of a document, segment_ids count the
        pieces of a row from 1 and are 0 in padding, loss_mask is True where targets holds the real next token
        of the same document.

        The stream is a function of (configuration, seed), `cfg.seed` for the split; text is shuffled anew each
        epoch. `get_state` and `set_state` continue it exactly; states are plain JSON. A state is refused under
        other data settings or another number of workers (best-fit rows depend on it). Call `close()` to stop the
        workers.
        """
        from train.data.pipeline import iterate

        keep = ("context", "batch_size", "packing", "unique_tokens", "prefix_len", "perturb", "val_fraction")
        identity = {k: getattr(self.cfg, k) for k in keep}
        identity |= {"seed": self.seed, "data": self.meta["data_hash"]}
        if self.cfg.seed != self.seed:  # states from before there were two seeds do not speak of the second
            identity["data_seed"] = self.cfg.seed
        return iterate(self._train_batches(), self.layout(), identity)

    @abstractmethod
    def _train_batches(self) -> grain.IterDataset: ...

    @abstractmethod
    def val_batches(self, count: int, batch_size: int | None = None) -> list[dict[str, np.ndarray]]:
        """The first `count` batches of held-out data, the same ones on every call and for every `seed`, in the
        form of `train_iterator`.

        Small held-out data repeat. The perturbation and the prefix apply as in training.

        Raises:
          DataError: nothing is held out.
        """

    @abstractmethod
    def held_out(self, n: int, length: int, *, perturbed: bool = True) -> np.ndarray:
        """n held-out sequences [n, length] int32, the same on every call and for every `seed`.

        Text: each lies inside one document; the documents' beginnings first, then random places. A start token stands
        before each where the tokenizer puts one before a text (our own BPE and bytes do not).
        Bigram-Backcopy and tasks: fresh sequences. The configured perturbation is applied unless `perturbed`
        is False.

        Raises:
          DataError: no held-out document is that long.
        """

    @abstractmethod
    def encode_text(self, path: str, n: int, length: int) -> np.ndarray:
        """n sequences [n, length] int32 from a UTF-8 text file: non-overlapping, evenly spread.

        Raises:
          DataError: there is no tokenizer, or the file is missing, undecodable or too short.
        """

    @abstractmethod
    def entropies(self, max_tokens: int = 5_000_000) -> dict[str, float]:
        """unigram_nats, bigram_nats, bigram_heldout_nats per token (see `entropy.text_entropies`).

        Bigram-Backcopy: the exact values for this context, and oracle_trigger_nats, oracle_non_trigger_nats,
        oracle_nats, trigger_fraction of a perfect model (queries t >= 1). Tasks: unigram_nats and oracle_nats alone.
        """
