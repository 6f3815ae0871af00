"""Who does what in a forward kernel for Hopper: two warpgroups compute, and a third fetches if registers allow it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels.flash.gpu_tiles import WGS, Feed, refill, ring

CONSUMER, PRODUCER = 232, 40  # registers of a thread


def threads(v_dim: int) -> int:
    """Warpgroups of the forward kernel. Sums of the widest values leave no registers for one that only fetches."""
    return WGS if v_dim > 192 else WGS + 1


def fetcher(v_dim: int) -> int:
    """The warpgroup that fetches."""
    return threads(v_dim) - 1 if threads(v_dim) > WGS else 0


def share_out(
    wg: Any,
    v_dim: int,
    count: Any,
    free: Any,
    start: Callable[[], None],
    fetch: Callable[[Any, Any], None],
    compute: Callable[[Callable[[Any], None]], None],
) -> None:
    """Runs a kernel of `threads(v_dim)` warpgroups.

    Args:
      count: steps, each with what `fetch(n, slot)` copies; `free`: the barriers of its slots, see `refill`.
      start: copies what is needed from the first step on.
      compute: what the computing warpgroups do, from a function to be called at the start of step n.
    """
    if threads(v_dim) == WGS:
        feed = Feed(wg, count, free, fetch)
        pl.when(wg == 0)(start)
        feed.start()
        compute(feed.ahead)
        feed.finish()
        return

    @pl.when(wg == WGS)
    def produce():
        mg.registers(PRODUCER, more=False)
        start()
        ring(jnp.int32(0), count, lambda n, slot, _: refill(n, slot, free, fetch), None)
        mg.drain(free, count)

    @pl.when(wg < WGS)
    def consume():
        mg.registers(CONSUMER, more=True)
        compute(lambda n: None)
