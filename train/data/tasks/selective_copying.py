"""Selective copying (Mamba, arXiv 2312.00752, section 4.1.1): the symbols lie among blanks at random places.

    blank s1 blank blank s2 ... sn blank GO s1 ... s(n-1)        scored from GO on: s1 ... sn

The paper reads GO at every place of the answer (`forced=False`, and V = 16, n = 16, T = 4096).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from train.data.tasks.copying import Copy


@dataclasses.dataclass(frozen=True)
class SelectiveCopy(Copy):
    """payload: n. vocab: V, of which V - 2 are symbols. forced: see `copying`."""

    name = "selective_copy"

    payload: int = 16
    vocab: int = 16
    forced: bool = True

    @property
    def _least(self) -> int:
        return 1

    def places(self, rng: np.random.Generator, room: int, count: int) -> np.ndarray:
        return np.sort(rng.choice(room, count, replace=False))
