"""From sequences to batches, with Grain.

"concat" text: documents in a shuffled order, joined and cut every T tokens -> rows, by number -> shuffled
anew each epoch, without end -> batch. "best_fit" text: document pieces of up to T tokens -> shuffled anew
each epoch -> Grain's best-fit packing -> batch. Bigram-Backcopy: sequences, by number -> batch. Tasks likewise.

Every process follows the same stream of GLOBAL batches and keeps its own block of rows: process p of P holds
rows [p * b, (p + 1) * b) of the batch of B = P * b rows that one process alone would see. Rows that have a
number are made only by the process that holds them; best-fit packing runs whole on every process, because a
packed row depends on the rows before it.

Grain's own `ConcatThenSplitIterDataset` is not used (0.2.18): it splits every full window of a long document
over two rows, or, told not to, queues full windows without bound until a shorter piece comes; its state does
not survive JSON (it compares a list with the tuple (-1, -1)), and Orbax writes JSON. Rows by number need no
state but the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grain
import numpy as np
from grain.experimental import BestFitPackIterDataset

from train.data import worker
from train.data.bb import PERTURB, generate, stream_rng
from train.data.bb_table import BigramTable
from train.data.guard import Guarded
from train.data.perturb import Perturbation
from train.data.split import Spans
from train.data.store import TokenStore
from train.data.tasks import Example, Task

_BINS = 64
"""Rows that best-fit packing fills at the same time: more waste less, and mix neighbouring epochs more."""
_ENDLESS = 2**62
_NO_THREADS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


@dataclass(frozen=True)
class Layout:
    """Shape of the batches: T, B over all processes, which process this is, and the row edits."""

    context: int
    batch_size: int
    process_index: int
    process_count: int
    packing: str
    workers: int
    prefix_len: int
    perturb: Perturbation | None

    @property
    def local(self) -> int:
        """Rows of one process, b."""
        return self.batch_size // self.process_count

    def numbers(self, step: int) -> range:
        """The global row numbers that this process holds at a step."""
        first = step * self.batch_size + self.process_index * self.local
        return range(first, first + self.local)


class Pieces:
    """Random access to document pieces: [n, 2] int32, the token and its successor (-1 at a document's end), n
    <= T."""

    def __init__(self, store: TokenStore, spans: Spans, context: int):
        self._store, self._spans, self._context = store, spans, context
        per_document = (spans.stop - spans.start + context - 1) // context
        self._ends = np.cumsum(per_document)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __call__(self, index: int) -> dict:
        document = int(np.searchsorted(self._ends, index, side="right"))
        nth = index - (int(self._ends[document - 1]) if document else 0)
        stop = int(self._spans.stop[document])
        start = int(self._spans.start[document]) + nth * self._context
        end = min(start + self._context, stop)
        pairs = np.full((end - start, 2), -1, np.int32)
        pairs[:, 0] = self._store.ids[start:end]
        successors = self._store.ids[start + 1 : min(end + 1, stop)]
        pairs[: len(successors), 1] = successors
        return {"pairs": pairs}


def _row(packed: dict) -> dict:
    """A packed row -> tokens, targets, positions, segment_ids [T] int32 and loss_mask [T] bool."""
    tokens, following = packed["pairs"][:, 0], packed["pairs"][:, 1]
    segments = packed["pairs_segment_ids"]
    mask = (following >= 0) & (segments > 0)
    return {
        "tokens": np.ascontiguousarray(tokens),
        "targets": np.where(mask, following, 0).astype(np.int32),
        "positions": packed["pairs_positions"],
        "segment_ids": segments,
        "loss_mask": mask,
    }


@dataclass(frozen=True)
class _Local:
    """A global batch [B, ...] -> the rows of this process [b, ...], with the prefix applied."""

    layout: Layout

    def __call__(self, batch: dict) -> dict:
        first = self.layout.process_index * self.layout.local
        return _prefix({k: v[first : first + self.layout.local] for k, v in batch.items()}, self.layout)


def _prefix(batch: dict, layout: Layout) -> dict:
    """Takes the first p positions out of the loss and adds "prefix_len" [b] int32."""
    if not layout.prefix_len:
        return batch
    mask = batch["loss_mask"].copy()
    mask[:, : layout.prefix_len] = False
    return {**batch, "loss_mask": mask, "prefix_len": np.full(len(mask), layout.prefix_len, np.int32)}


class Joined:
    """Random access to the rows of joined documents: each token once, the last row padded."""

    def __init__(self, store: TokenStore, spans: Spans, context: int, seed: int):
        order = np.random.default_rng([seed, 2]).permutation(len(spans))
        self._store, self._context = store, context
        self._start, self._stop = spans.start[order], spans.stop[order]
        self._ends = np.cumsum(self._stop - self._start)

    def __len__(self) -> int:
        return (int(self._ends[-1]) + self._context - 1) // self._context

    def __call__(self, index: int) -> dict:
        T = self._context
        pairs = np.full((T, 2), -1, np.int32)
        positions, segments = np.zeros(T, np.int32), np.zeros(T, np.int32)
        place = index * T
        document = int(np.searchsorted(self._ends, place, side="right"))
        filled, segment = 0, 1
        while filled < T and document < len(self._ends):
            stop = int(self._stop[document])
            start = stop - (int(self._ends[document]) - place - filled)
            n = min(T - filled, stop - start)
            window = self._store.ids[start : min(start + n + 1, stop)]
            pairs[filled : filled + n, 0] = window[:n]
            pairs[filled : filled + len(window) - 1, 1] = window[1:]
            positions[filled : filled + n] = np.arange(n)
            segments[filled : filled + n] = segment
            filled, segment, document = filled + n, segment + 1, document + 1
        pairs[filled:, 0] = 0
        return _row({"pairs": pairs, "pairs_positions": positions, "pairs_segment_ids": segments})


def text_batches(store: TokenStore, spans: Spans, layout: Layout, seed: int) -> grain.IterDataset:
    """Endless batches of packed text."""
    if layout.packing == "concat":
        rows = Joined(store, spans, layout.context, seed)
        return _by_step(_Rows(rows, _endless(len(rows), seed), layout, seed), layout)
    pieces = Pieces(store, spans, layout.context)
    packed = BestFitPackIterDataset(
        # No read-ahead threads: the ids are memory-mapped, and threads would only fight over the interpreter
        # lock.
        _endless(len(pieces), seed).map(pieces).to_iter_dataset(_NO_THREADS),
        length_struct={"pairs": layout.context},
        num_packing_bins=_BINS,
        seed=seed,
    ).map(_row)
    if layout.perturb is not None:
        packed = packed.seed(seed).random_map(layout.perturb)
    return packed.batch(layout.batch_size, drop_remainder=True).map(_Local(layout))


def _endless(count: int, seed: int) -> grain.MapDataset:
    """0 .. count-1 without end, in a new order each epoch."""
    return grain.MapDataset.range(count).shuffle(seed=seed).repeat()


def _by_step(make: Callable[[int], dict], layout: Layout) -> grain.IterDataset:
    """Endless batches, each made from its step number alone."""
    return grain.MapDataset.range(_ENDLESS // layout.batch_size).map(make).to_iter_dataset(_NO_THREADS)


@dataclass(frozen=True)
class _Rows:
    """Step number -> this process's batch of joined text."""

    rows: Joined
    order: grain.MapDataset
    layout: Layout
    seed: int

    def __call__(self, step: int) -> dict:
        rows = [self._row(number) for number in self.layout.numbers(step)]
        return _prefix({name: np.stack([row[name] for row in rows]) for name in rows[0]}, self.layout)

    def _row(self, number: int) -> dict:
        index = self.order[number]
        assert index is not None  # Grain's type: only filtered data sets have holes
        row = self.rows(index)
        if self.layout.perturb is not None:
            row = self.layout.perturb(row, stream_rng(self.seed, PERTURB, number))
        return row


@dataclass(frozen=True)
class _Sequences:
    """Step number -> this process's batch of Bigram-Backcopy sequences."""

    table: BigramTable
    order: grain.MapDataset | None
    """Which sequences repeat; None draws fresh ones for ever."""
    layout: Layout
    seed: int
    stream: int
    content: int
    """Seed of the sequences themselves."""

    def __call__(self, step: int) -> dict:
        b, T = self.layout.local, self.layout.context
        x = np.stack([self._sequence(number) for number in self.layout.numbers(step)])
        batch = {
            "tokens": x[:, :-1].copy(),
            "targets": x[:, 1:].copy(),
            "positions": np.tile(np.arange(T, dtype=np.int32), (b, 1)),
            "segment_ids": np.ones((b, T), np.int32),
            "loss_mask": np.ones((b, T), bool),
        }
        return _prefix(batch, self.layout)

    def _sequence(self, number: int) -> np.ndarray:
        """[T + 1] int32: the global sequence `number`, perturbed."""
        index = number if self.order is None else self.order[number]
        assert index is not None
        length = self.layout.context + 1
        x = generate(self.table, length, seed=self.content, stream=self.stream, index=index)
        if (edit := self.layout.perturb) is not None:
            rng = stream_rng(self.seed, PERTURB, number)
            x[list(edit.positions)] = edit.draw(rng, len(edit.positions))
        return x


def bb_batches(
    table: BigramTable, layout: Layout, *, seed: int, stream: int, unique: int = 0, unique_seed: int = 0
) -> grain.IterDataset:
    """Endless batches of Bigram-Backcopy; with `unique` > 0 that many sequences, those of `unique_seed`, repeat."""
    order = _endless(unique, seed) if unique else None
    return _by_step(_Sequences(table, order, layout, seed, stream, unique_seed if unique else seed), layout)


@dataclass(frozen=True)
class _Examples:
    """Step number -> this process's batch of a task's sequences."""

    task: Task
    order: grain.MapDataset | None
    """Which sequences repeat; None draws fresh ones for ever."""
    layout: Layout
    stream: int
    content: int
    """Seed of the sequences themselves."""

    def __call__(self, step: int) -> dict:
        b, T = self.layout.local, self.layout.context
        examples = [self._example(number) for number in self.layout.numbers(step)]
        tokens, targets, mask = (np.stack(part) for part in zip(*examples, strict=True))
        batch = {
            "tokens": tokens,
            "targets": targets,
            "positions": np.tile(np.arange(T, dtype=np.int32), (b, 1)),
            "segment_ids": np.ones((b, T), np.int32),
            "loss_mask": mask,
        }
        return _prefix(batch, self.layout)

    def _example(self, number: int) -> Example:
        index = number if self.order is None else self.order[number]
        assert index is not None
        return self.task.sample(self.layout.context, seed=self.content, stream=self.stream, index=index)


def task_batches(
    task: Task, layout: Layout, *, seed: int, stream: int, unique: int = 0, unique_seed: int = 0
) -> grain.IterDataset:
    """Endless batches of a task; with `unique` > 0 that many sequences, those of `unique_seed`, repeat."""
    order = _endless(unique, seed) if unique else None
    return _by_step(_Examples(task, order, layout, stream, unique_seed if unique else seed), layout)


def iterate(batches: grain.IterDataset, layout: Layout, identity: dict) -> grain.DatasetIterator:
    """The training iterator: guarded on restore and against dying workers."""
    if layout.workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():
            # Grain reads its absl flags when it starts workers; this program does not use absl's parser.
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=layout.workers, per_worker_buffer_size=4)
        batches = batches.mp_prefetch(options, worker.start)
    with worker.shielded():  # Grain makes threads here that start workers later
        return iter(Guarded(batches, {**identity, "workers": layout.workers}))


def take(batches: grain.IterDataset, count: int) -> list[dict]:
    """The first `count` batches."""
    iterator: Iterator[dict] = iter(batches)
    return [next(iterator) for _ in range(count)]
