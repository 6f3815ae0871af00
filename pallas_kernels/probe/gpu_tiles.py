"""What the probe kernels for Hopper share: settings, inputs, a tile's scores and weights, and what a kernel costs.

Every block of threads is one warpgroup and works on 64 queries of one head.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from jaxattn.masks import Visibility
from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels.flash.gpu_biases import NONE, Biases, hiding
from pallas_kernels.flash.gpu_tiles import Plan, Tile, exponents, nbytes, places, wide

QUERIES = mg.ROWS
KEYS = 128  # of a tile at most, where rows are queries
STAGES = 2  # tiles under way
MOST_KEYS = 2**24  # whose indices are exact in f32
TOP, SHARE = 0, 1  # rows of what is kept of a query: its largest score (in powers of two) and that score's weight


@dataclasses.dataclass(frozen=True)
class Inputs:
    """In whole blocks: q [B,T,H,D], k [B,S,K,D], prefixes [B], places [B,2,T] and [B,2,S], and key biases."""

    plan: Plan
    vis: Visibility
    q: Array
    k: Array
    biases: Biases = NONE  # in powers of two

    @property
    def arrays(self) -> tuple[Array, ...]:
        """What every kernel reads after its table."""
        vis, batch = self.vis, self.q.shape[0]
        prefix = vis.prefix_len if self.plan.has_prefix else jnp.zeros((batch,), jnp.int32)
        at = places(vis.q_positions, vis.q_segments), places(vis.k_positions, vis.k_segments)
        return prefix, self.q, self.k, *at, *self.biases.arrays

    @property
    def keyed(self) -> int:
        """1 where keys have biases, else 0."""
        return len(self.biases.arrays)

    @property
    def blocks(self) -> int:
        """Of queries."""
        return self.q.shape[1] // QUERIES

    @property
    def tile(self) -> int:
        """Keys of a tile: fewer of wide heads, so that as many bytes of several blocks of threads are under way."""
        return KEYS // 2 if wide(self.q.shape[3], 0) else KEYS

    @property
    def tiles(self) -> int:
        """Of keys."""
        return self.k.shape[1] // self.tile

    def cost(self, tiles: int, queries: int, keys: int, again: int, *others: Any, more: int = 0) -> pl.CostEstimate:
        """Work of one product in each of `tiles`, for which `again` bytes are fetched; `more` operations a score."""
        scores = tiles * queries * keys
        return pl.CostEstimate(
            flops=scores * (2 * self.q.shape[3] + more),
            transcendentals=scores,
            bytes_accessed=tiles * again + nbytes(*others),
        )


def held(table: Array, shape: tuple[int, int], tiles: int) -> Array:
    """Which tiles [*shape, tiles] the blocks of a table of `flash.gpu_tiles.visits` go through."""
    front, first, last, *_ = (table.reshape(*shape, -1)[..., n, None] for n in range(5))
    j = jnp.arange(tiles, dtype=jnp.int32)
    return (j < front) | ((j >= first) & (j <= last))


def scores(
    plan: Plan, hides: bool, product: Tile, q_at: Any, k_at: Any, prefix: Any, bias: Any, *, by_key: bool = False
) -> tuple[Tile, float]:
    """Biased and masked scores and a positive factor, which makes them powers of two.

    Args:
      bias: a ref of the key biases of the tile, or None.
    """
    return exponents(plan, product, hiding(plan, hides, q_at, k_at, prefix, Biases(bias), by_key=by_key))


def weights(scores: tuple[Tile, float], top: Tile, share: Tile) -> Tile:
    """From what is kept of the queries, in the tile's shape; exactly 0 where nothing is seen."""
    s, factor = scores
    return jnp.exp2(s * factor - top) * share


def stream(start: Any, whole: Any, stop: Any, fetch: Any, body: Any, carry: Any) -> Any:
    """`carry = body(needs a mask, n, slot, carry)` for n = start ... stop - 1, from `whole` on with a mask.

    `fetch(n, slot)` starts the copies of tile n; before the warpgroup's buffer is filled again, all of it has read it.
    """
    slot_of = lambda n: jax.lax.rem(n - start, jnp.int32(STAGES))
    for ahead in range(STAGES):
        pl.when(start + ahead < stop)(partial(fetch, start + ahead, jnp.int32(ahead)))

    def step(hides: bool, n: Any, carry: Any) -> Any:
        slot = slot_of(n)
        carry = body(hides, n, slot, carry)
        mg.publish()
        pl.when(n + STAGES < stop)(lambda: fetch(n + STAGES, slot))
        return carry

    turn = jnp.clip(whole, start, jnp.maximum(start, stop))
    carry = jax.lax.fori_loop(start, turn, partial(step, False), carry)
    return jax.lax.fori_loop(turn, stop, partial(step, True), carry)
