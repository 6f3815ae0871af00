"""The Hopper kernels that go over the keys of a block of queries: normalisers and top keys, then sums of blocks.

Few queries see many keys, so a block's tiles are dealt out to several blocks of threads, whose parts XLA joins.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels.flash.gpu_biases import Biases, head_of, taken
from pallas_kernels.flash.gpu_biases import held as held_biases
from pallas_kernels.flash.gpu_tiles import LOG2E, Tile, Visit, visits
from pallas_kernels.flash.rows import FLOOR
from pallas_kernels.probe.gpu_tiles import QUERIES, SHARE, STAGES, TOP, Inputs, held, scores, stream, weights

BUSY = 264  # blocks of threads that keep the 132 multiprocessors of an H100 busy
MASS, INDEX = 1, 2  # what a part reports beside TOP
NO_KEY = 2.0**30


def splits(inputs: Inputs) -> int:
    """Blocks of threads that share one block of queries."""
    batch, _, heads, _ = inputs.q.shape
    return max(1, min(inputs.tiles, BUSY // (batch * heads * inputs.blocks)))


def first(inputs: Inputs) -> tuple[Array, Array, Array]:
    """The largest score in powers of two, the mass relative to it and the first key that has it, [B, H, T]."""
    batch, length, heads, _ = inputs.q.shape
    parts = splits(inputs)
    out = jax.ShapeDtypeStruct((batch, heads, parts, 3, length), jnp.float32)
    x = _launch(inputs, "probe_rows", partial(_rows_kernel, inputs, parts), [out], [mg.plain(3, QUERIES)])[0]
    top, mass, index = x[:, :, :, TOP], x[:, :, :, MASS], x[:, :, :, INDEX]
    best = jnp.max(top, axis=2)
    index = jnp.min(jnp.where(top == best[:, :, None], index, NO_KEY), axis=2)
    return best, jnp.sum(mass * jnp.exp2(top - best[:, :, None]), axis=2), index


def block_sums(inputs: Inputs, kept: Float[Array, "B H 2 T"], want: frozenset[str], block: int) -> dict[str, Array]:
    """Sums and largest weights of blocks of keys, [B, H, T, N]."""
    batch, length, heads, _ = inputs.q.shape
    size = min(block, inputs.tile)
    names = [name for name in ("blocks", "block_max") if name in want]
    out = jax.ShapeDtypeStruct((batch, heads, inputs.k.shape[1] // size, length), jnp.float32)
    scratch = [mg.plain(2, QUERIES), mg.barriers(1), *[mg.plain(inputs.tile // size, QUERIES)] * len(names)]
    body = partial(_blocks_kernel, inputs, splits(inputs), names)
    results = _launch(inputs, "probe_blocks", body, [out] * len(names), scratch, kept)
    seen = jnp.swapaxes(held(visits(inputs.vis, QUERIES, inputs.tile), (batch, inputs.blocks), inputs.tiles), 1, 2)
    seen = jnp.repeat(jnp.repeat(seen, inputs.tile // size, axis=1), QUERIES, axis=2)[:, None]
    joined = {}
    for name, x in zip(names, results, strict=True):
        x = jnp.swapaxes(jnp.where(seen, x, 0.0), 2, 3)  # tiles that nobody visits are written by nobody
        if block > size:
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -x.shape[3] % (block // size))))
            x = x.reshape(*x.shape[:3], -1, block // size)
            x = jnp.sum(x, axis=4) if name == "blocks" else jnp.max(x, axis=4)
        joined[name] = x
    return joined


def _launch(inputs: Inputs, name: str, body: Any, outs: list[Any], scratch: list[Any], *kept: Array) -> list[Array]:
    (batch, length, heads, dim), tile, keyed = inputs.q.shape, inputs.tile, inputs.keyed
    tiles = batch * heads * inputs.plan.tiles(length, inputs.k.shape[1], QUERIES, tile)
    return mg.launch(
        mg.Launch(
            name,
            grid={"head": heads, "part": inputs.blocks * splits(inputs), "batch": batch},
            interpret=inputs.plan.interpret,
            cost=inputs.cost(
                tiles, QUERIES, tile, tile * (2 * dim + 4 * keyed), inputs.q, *outs, *kept, more=len(kept)
            ),
        ),
        body,
        outs,
        [
            *[mg.plain(STAGES, tile)] * keyed,
            mg.operand(QUERIES, dim),
            mg.operand(STAGES, tile, dim),
            mg.plain(2, QUERIES, dtype=jnp.int32),
            mg.plain(STAGES, 2, tile, dtype=jnp.int32),
            mg.barriers(1, 2),
            mg.barriers(STAGES, 2 + keyed),
            *scratch,
        ],
        visits(inputs.vis, QUERIES, tile),
        *inputs.arrays,
        *kept,
    )


class _Part:
    """What one block of threads goes through; `scratch` is what it leaves of the kernel's."""

    def __init__(self, inputs: Inputs, parts: int, table, prefix, q, k, q_at, k_at, biases: Biases, scratch):
        self.plan, self.k, self.k_at, self.biases = inputs.plan, k, k_at, biases
        self.bias_s, scratch = held_biases(self.plan, scratch)
        self.q_s, self.k_s, self.q_at_s, self.k_at_s, self.ready, self.full, *self.scratch = scratch
        self.b, self.h = jax.lax.axis_index("batch"), jax.lax.axis_index("head")
        part = jax.lax.axis_index("part")
        i, self.part = jax.lax.div(part, jnp.int32(parts)), jax.lax.rem(part, jnp.int32(parts))
        self.queries, self.prefix = pl.ds(i * QUERIES, QUERIES), prefix[self.b]
        self.visit = Visit(table, self.b * inputs.blocks + i)
        each = jax.lax.div(self.visit.count + (parts - 1), jnp.int32(parts))
        self.start = self.part * each
        self.stop = jnp.minimum(self.visit.count, self.start + each)
        mg.fetch(q.at[self.b, self.queries, self.h], self.q_s, self.ready.at[0])
        mg.fetch(q_at.at[self.b, :, self.queries], self.q_at_s, self.ready.at[0])

    def fetch(self, n: Any, slot: Any) -> None:
        size = self.k_s.shape[1]
        keys = pl.ds(self.visit.tile(n) * size, size)
        head = jax.lax.div(self.h, jnp.int32(self.plan.group))
        mg.fetch(self.k.at[self.b, keys, head], self.k_s.at[slot], self.full.at[slot])
        mg.fetch(self.k_at.at[self.b, :, keys], self.k_at_s.at[slot], self.full.at[slot])
        if self.plan.biases:
            own = self.biases.by_key.at[self.b, head_of(self.plan, self.h), keys]
            mg.fetch(own, self.bias_s.at[slot], self.full.at[slot])

    def each(self, body: Any, carry: Any) -> Any:
        """`carry = body((scores, factor), which tile, carry)` over all tiles."""

        def step(hides: bool, n: Any, slot: Any, carry: Any) -> Any:
            mg.wait(self.full.at[slot])
            s = mg.product(self.q_s, mg.turned(self.k_s.at[slot]))
            bias = self.bias_s.at[slot] if self.plan.biases else None
            s = scores(self.plan, hides, s, self.q_at_s, self.k_at_s.at[slot], self.prefix, bias)
            return body(s, self.visit.tile(n), carry)

        mg.wait(self.ready.at[0])
        return stream(self.start, self.visit.whole, self.stop, self.fetch, step, carry)


def _rows_kernel(inputs: Inputs, parts: int, table, prefix, q, k, q_at, k_at, *refs):
    biases, (out, *scratch) = taken(inputs.plan, refs)
    part = _Part(inputs, parts, table, prefix, q, k, q_at, k_at, biases, scratch)
    out_s, keys = part.scratch[0], inputs.tile
    place = lambda: mg.places((QUERIES, keys), 1).astype(jnp.float32)

    def tile(scored: tuple[Tile, float], j: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        (s, factor), (top, mass, index) = scored, carry
        largest = jnp.max(s, axis=1)
        here = jnp.min(jnp.where(s == mg.down(largest, keys), place(), float(keys)), axis=1)
        here = here + (j * keys).astype(jnp.float32)
        best = largest * factor
        index = jnp.where((best > top) | ((best == top) & (here < index)), here, index)
        now = jnp.maximum(top, best)
        return now, mass * jnp.exp2(top - now) + jnp.sum(jnp.exp2(s * factor - mg.down(now, keys)), axis=1), index

    start = mg.per_row(FLOOR * LOG2E), mg.per_row(0.0), mg.per_row(NO_KEY)
    for n, x in enumerate(part.each(tile, start)):
        out_s[n] = x
    mg.store((out_s, out.at[part.b, part.h, part.part, :, part.queries]))


def _blocks_kernel(inputs: Inputs, parts: int, names: list[str], table, prefix, q, k, q_at, k_at, *refs):
    biases, (kept, *refs) = taken(inputs.plan, refs)
    outs, scratch = refs[: len(names)], refs[len(names) :]
    part = _Part(inputs, parts, table, prefix, q, k, q_at, k_at, biases, scratch)
    kept_s, got, *outs_s = part.scratch
    mg.fetch(kept.at[part.b, part.h, :, part.queries], kept_s, got.at[0])
    mg.wait(got.at[0])
    count = outs_s[0].shape[0]
    size = inputs.tile // count

    def tile(scored: tuple[Tile, float], j: Any, carry: None) -> None:
        w = weights(scored, *(mg.down(mg.load_rows(kept_s.at[n]), inputs.tile) for n in (TOP, SHARE)))
        for n in range(count):
            piece = jax.lax.slice(w, (0, n * size), (QUERIES, (n + 1) * size))
            for name, out_s in zip(names, outs_s, strict=True):
                out_s[n] = jnp.sum(piece, axis=1) if name == "blocks" else jnp.max(piece, axis=1)
        rows = pl.ds(j * count, count)
        mg.store(*((x, out.at[part.b, part.h, rows, part.queries]) for x, out in zip(outs_s, outs, strict=True)))

    part.each(tile, None)
