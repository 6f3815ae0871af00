"""What the Hopper kernel of `paged_decode` is built from: settings, and tiles of keys and values in shared memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels.flash.gpu_tiles import nbytes
from pallas_kernels.flash.reference import NEVER
from pallas_kernels.paged_decode.units import Units

LEAST = 8  # queries: columns of a product come in eights
STAGES = 6  # chunks under way, at most
TILE = 8  # rows of shared memory that a copy into a product's operand fills whole
ENTRIES = 8  # that are looked up together
WIDE = mg.SWIZZLE // 2  # columns of a tile, at most
REST = 6144  # bytes of shared memory for numbers per query, barriers and alignment
PIECE = 32  # columns that are turned at once, so that what that takes fits in registers


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known before the kernel is compiled."""

    cut: Units
    dim: int
    v_dim: int
    queries: int  # of a key head, in whole blocks
    scale: float
    half: int  # pairs of dims that are turned; 0: none
    interpret: Any
    splits: int = 1  # parts of a list, each done by a block of threads

    @property
    def block(self) -> int:
        """Queries of a block of threads."""
        return min(self.queries, most(self.dim, self.v_dim, self.half > 0))

    @property
    def chunk(self) -> int:
        """Keys that are computed at once."""
        return chunk(self.dim, self.v_dim)

    @property
    def apart(self) -> bool:
        """Whether units do not fill tiles: they arrive as rows and are laid in tiles by the warpgroup."""
        return self.cut.rows < TILE or self.v_dim % mg.ROWS > 0

    @property
    def key_width(self) -> int:
        """Columns of a tile of keys. Where they are turned tiles are narrow, so that both halves are whole tiles."""
        whole = self.half > 0 and self.dim % PIECE == self.half % PIECE == 0
        return PIECE if whole else math.gcd(self.dim, WIDE)

    @property
    def value_width(self) -> int:
        """Columns of a tile of values."""
        return math.gcd(self.v_dim, WIDE)

    @property
    def value_rows(self) -> int:
        """Rows of the second product: values' columns in whole tiles of a tensor core."""
        return -(-self.v_dim // mg.ROWS) * mg.ROWS

    def ring(self) -> tuple[int, int]:
        """Chunks of the ring, and blocks of threads that share a multiprocessor: two if each can have a ring of two."""
        tiles = self.chunk * (self.dim + self.value_rows) * 2
        beside = self.block * (self.dim + self.chunk) * 2 + self.apart * tiles + REST
        two, one = ((room - beside) // (tiles + self.chunk * 4) for room in (mg.SHARED_BYTES // 2, mg.SHARED_BYTES))
        return (min(STAGES, two), 2) if two > 1 else (min(STAGES, one), 1)

    def cost(self, chunks: int, *arrays: Any) -> pl.CostEstimate:
        """Work if all `chunks` are read, which the tables say at run time; `arrays` are what is touched once."""
        rows, passes = chunks * self.chunk, self.queries // self.block
        scores = rows * self.queries
        return pl.CostEstimate(
            flops=2 * scores * (self.dim + self.value_rows) + 6 * rows * passes * self.half,
            transcendentals=scores,
            bytes_accessed=rows * passes * (2 * (self.dim + self.v_dim) + 4 + 8 * self.half) + nbytes(*arrays),
        )


def chunk(dim: int, v_dim: int) -> int:
    """Keys that are computed at once: what is done once for them takes as long as it does for few bytes."""
    return mg.ROWS * (2 if dim + v_dim <= 2 * mg.ROWS else 1)


def most(dim: int, v_dim: int, turned: bool) -> int:
    """Queries of a block of threads, whose sums must fit in registers beside what turns keys."""
    return 32 // (2 if max(dim, v_dim) > 128 else 1) // (2 if turned else 1)


Lookup = Callable[[int, Any], list[Any]]  # so many units of a list from this one on; -1: none


def fetch_units(cut: Units, lookup: Lookup, *copies: tuple[Any, Any, Any]) -> None:
    """Starts the copies of a chunk's units, for each (memory, buffer, barrier); unused entries only arrive."""
    group = min(ENTRIES, cut.entries)

    def some(i: Any) -> None:
        units = lookup(group, i * group)
        for memory, buffer, full in copies:
            for c, unit in enumerate(units):
                target = buffer.at[pl.ds((i * group + c) * cut.rows, cut.rows)]
                source = memory.at[jnp.maximum(unit, 0)]
                pl.when(unit >= 0)(partial(mg.fetch, source, target, full))
                pl.when(unit < 0)(partial(mg.arrive, full))

    if group == cut.entries:
        some(0)
    else:
        jax.lax.fori_loop(0, cut.entries // group, lambda i, _: some(i), None)


def in_tiles(ref: Any, place: Any, width: int) -> Any:
    """A chunk as an operand of products: where it is, or laid in the tiles of `place`, whose rows may be longer."""
    if place is None:
        return ref
    api = mg.plgpu()
    layout = api.Layout.SMEM_GMEM_COPY((ref.shape[0], width), ref.dtype, 2 * width)
    for at in range(0, ref.shape[1], width):
        columns = pl.ds(at, width)
        place.at[:, columns][...] = api.load(ref.at[:, columns], layout=layout, optimized=False)
    return place


def turn(keys: Any, angles: list[Any], wide: int) -> None:
    """Keys of a chunk turned where they lie by [cos, sin], rounded as a cache of turned keys would be.

    Tile by tile, so that little is in registers, where pairs are whole tiles apart; else all that is turned at once.
    """
    half = angles[0].shape[1]
    columns = lambda x, at, size: jax.lax.slice(x, (0, at), (x.shape[0], at + size))

    def turned(one: Array, two: Array, at: int) -> tuple[Array, Array]:
        c, s = (mg.get(x.at[:, pl.ds(at, one.shape[1])]) for x in angles)
        one, two = one.astype(jnp.float32), two.astype(jnp.float32)
        return (one * c - two * s).astype(keys.dtype), (two * c + one * s).astype(keys.dtype)

    if half % wide == 0:
        for at in range(0, half, wide):
            places = [keys.at[:, pl.ds(side + at, wide)] for side in (0, half)]
            one, two = map(mg.get, places)
            places[0][...], places[1][...] = turned(one, two, at)
        return
    whole = mg.get(keys)
    pairs = [
        turned(columns(whole, at, size), columns(whole, half + at, size), at)
        for at in range(0, half, PIECE)
        for size in [min(PIECE, half - at)]
    ]
    rest = [columns(whole, 2 * half, keys.shape[1] - 2 * half)] if keys.shape[1] > 2 * half else []
    keys[...] = jnp.concatenate([*(one for one, _ in pairs), *(two for _, two in pairs), *rest], axis=1)


def clear(values: Any, added: Array) -> None:
    """Zeros in values nobody sees: what was never written or not read may be NaN, and 0 · NaN is."""
    for at in range(0, values.shape[1], WIDE):
        piece = values.at[:, pl.ds(at, WIDE)]
        piece[...] = jnp.where(mg.down(added, WIDE) > NEVER / 2, mg.get(piece), jnp.zeros((), values.dtype))


def columns_first(x: Array) -> Array:
    """A tile as it is stored with rows and columns exchanged."""
    return mg.plgpu().layout_cast(x, mg.plgpu().Layout.WGMMA_TRANSPOSED)


def per_column(value: float, count: int) -> Array:
    return mg.plgpu().layout_cast(jnp.full((count,), value, jnp.float32), mg.plgpu().Layout.WGMMA.reduce(0))


def slots(chunk: Any, rows: int, queries: int) -> Array:
    """Slots [rows, queries] of a chunk."""
    return chunk * rows + mg.places((rows, queries), 0)
