"""The Hopper kernels that add weights up over queries, each result by the one block of threads that owns it.

Columns: a block owns 64 keys and goes over the queries that see some of them. Diagonals: in the order of the keys, a
query's run of weights lies on neighbouring diagonals; a block owns 128 of those, and of each tile of weights with a
share in them it adds up the rows, each shifted to its place.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from jaxattn.masks import GLOBAL, Visibility, visible
from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels.flash.gpu_biases import head_of, held, taken
from pallas_kernels.flash.gpu_tiles import SEGMENT, Visit, visits
from pallas_kernels.flash.tiles import div
from pallas_kernels.probe.gpu_tiles import KEYS, QUERIES, SHARE, STAGES, TOP, Inputs, scores, stream, weights
from pallas_kernels.probe.xla import NOWHERE, shifts

OWNED = mg.ROWS  # keys of a block of threads, for sums over columns
LINE = 128  # diagonals of a block of threads
AT_ONCE = 8  # rows whose loads are under way together
CHUNK = 1024  # keys whose places are looked at together


def columns(inputs: Inputs, kept: Float[Array, "B H 2 T"]) -> Float[Array, "B H S"]:
    """Σ_p w[p, s]."""
    (batch, length, heads, dim), keys = inputs.q.shape, inputs.k.shape[1]
    out = jax.ShapeDtypeStruct((batch, heads, keys), jnp.float32)
    tiles = batch * heads * inputs.plan.tiles(length, keys, QUERIES, OWNED)
    return mg.launch(
        mg.Launch(
            "probe_columns",
            grid={"head": heads, "block": keys // OWNED, "batch": batch},
            interpret=inputs.plan.interpret,
            cost=inputs.cost(
                tiles, QUERIES, OWNED, QUERIES * (2 * dim + 8), inputs.k, out, *inputs.biases.arrays, more=1
            ),
        ),
        partial(_columns_kernel, inputs),
        out,
        [
            *[mg.plain(OWNED)] * inputs.keyed,
            mg.operand(OWNED, dim),
            mg.operand(STAGES, QUERIES, dim),
            mg.plain(2, OWNED, dtype=jnp.int32),
            mg.plain(STAGES, 2, QUERIES, dtype=jnp.int32),
            mg.plain(STAGES, 2, QUERIES),
            mg.plain(OWNED),
            mg.barriers(1, 2 + inputs.keyed),
            mg.barriers(STAGES, 3),
        ],
        visits(inputs.vis, QUERIES, OWNED, by_key=True),
        *inputs.arrays,
        kept,
    )


def _columns_kernel(inputs: Inputs, table, prefix, q, k, q_at, k_at, *refs):
    biases, (kept, out, *scratch) = taken(inputs.plan, refs)
    bias_s, scratch = held(inputs.plan, scratch)
    k_s, q_s, k_at_s, q_at_s, kept_s, out_s, ready, full = scratch
    b, h, j = (jax.lax.axis_index(name) for name in ("batch", "head", "block"))
    plan, keys = inputs.plan, pl.ds(j * OWNED, OWNED)
    visit = Visit(table, b * (inputs.k.shape[1] // OWNED) + j)

    def fetch(n: Any, slot: Any) -> None:
        queries = pl.ds(visit.tile(n) * QUERIES, QUERIES)
        mg.fetch(q.at[b, queries, h], q_s.at[slot], full.at[slot])
        mg.fetch(q_at.at[b, :, queries], q_at_s.at[slot], full.at[slot])
        mg.fetch(kept.at[b, h, :, queries], kept_s.at[slot], full.at[slot])

    def tile(hides: bool, n: Any, slot: Any, acc: Array) -> Array:
        mg.wait(full.at[slot])
        s = mg.product(k_s, mg.turned(q_s.at[slot]))  # [keys, queries]
        s = scores(plan, hides, s, q_at_s.at[slot], k_at_s, prefix[b], bias_s, by_key=True)
        w = weights(s, *(mg.across(mg.load_columns(kept_s.at[slot, n]), OWNED) for n in (TOP, SHARE)))
        return acc + jnp.sum(w, axis=1)

    mg.fetch(k.at[b, keys, jax.lax.div(h, jnp.int32(plan.group))], k_s, ready.at[0])
    mg.fetch(k_at.at[b, :, keys], k_at_s, ready.at[0])
    if plan.biases:
        mg.fetch(biases.by_key.at[b, head_of(plan, h), keys], bias_s, ready.at[0])
    mg.wait(ready.at[0])
    out_s[...] = stream(jnp.int32(0), visit.whole, visit.count, fetch, tile, mg.per_row(0.0))
    mg.store((out_s, out.at[b, h, keys]))


def diagonals(inputs: Inputs, kept: Float[Array, "B H 2 T"], keys: int) -> Float[Array, "B H S"]:
    """By offset; NaN where key positions do not advance by one over what a query sees. `keys` are no padding."""
    (batch, _, heads, dim), size = inputs.q.shape, inputs.tile
    near, far = _extremes(inputs.vis)
    placed = near != NOWHERE
    base = jnp.where(placed, keys - 1 - inputs.vis.q_positions + near, 0)  # key j of a query lies at base + j
    lines = -(-keys // LINE)
    start, count = _runs(base, placed, lines, inputs.tiles, size)
    out = jax.ShapeDtypeStruct((batch, heads, lines * LINE), jnp.float32)
    each = 1 + -(-(LINE + QUERIES - 2) // size)  # as many tiles as queries in a row need
    tiles = batch * heads * lines * inputs.blocks * min(each, inputs.tiles)
    line = mg.launch(
        mg.Launch(
            "probe_diagonals",
            grid={"head": heads, "line": lines, "batch": batch},
            interpret=inputs.plan.interpret,
            cost=inputs.cost(tiles, QUERIES, size, size * (2 * dim + 4 * inputs.keyed), inputs.q, out, more=1),
        ),
        partial(_diagonals_kernel, inputs, lines),
        out,
        [
            *[mg.plain(STAGES, size)] * inputs.keyed,
            mg.operand(QUERIES, dim),
            mg.operand(STAGES, size, dim),
            mg.plain(2, QUERIES, dtype=jnp.int32),
            mg.plain(STAGES, 2, size, dtype=jnp.int32),
            mg.plain(2, QUERIES),
            mg.plain(QUERIES, dtype=jnp.int32),
            mg.plain(QUERIES, LINE + KEYS + LINE),  # also of smaller tiles: rows of whole lines
            mg.plain(LINE),
            mg.barriers(1, 4),
            mg.barriers(STAGES, 2 + inputs.keyed),
        ],
        jnp.stack([start, count], axis=-1).reshape(-1),
        *inputs.arrays,
        kept,
        base,
    )
    return jnp.where(jnp.all(near >= far), line[..., :keys][..., ::-1], jnp.nan)


def _extremes(vis: Visibility) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """`xla.shifts` over all keys, a few at a time."""
    keys = vis.k_positions.shape[1]
    size = min(CHUNK, keys)
    vis = vis.pad_columns(-keys % size)

    def look(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], None]:
        part = vis.columns(i * size, size)
        low, high = shifts(part, visible(part), i * size)
        return (jnp.minimum(carry[0], low), jnp.maximum(carry[1], high)), None

    nowhere = jnp.full(vis.q_positions.shape, NOWHERE, jnp.int32)
    return jax.lax.scan(look, (nowhere, -nowhere), jnp.arange(-(-keys // size)))[0]


def _runs(
    base: Int[Array, "B T"], placed: Bool[Array, "B T"], lines: int, tiles: int, size: int
) -> tuple[Array, Array]:
    """First and number of the tiles of `size` keys that a block of queries has in a line, [B, lines, blocks]."""
    cut = lambda x: x.reshape(x.shape[0], 1, -1, QUERIES)
    low = jnp.min(jnp.where(cut(placed), cut(base), NOWHERE), axis=-1)
    high = jnp.max(jnp.where(cut(placed), cut(base), -NOWHERE), axis=-1)
    at = (jnp.arange(lines, dtype=jnp.int32) * LINE)[None, :, None]
    inside = lambda x: div(jnp.clip(x, 0, tiles * size - 1), size)
    start, stop = inside(at - high), inside(at + LINE - 1 - low)
    some = (low <= high) & (at + LINE - 1 - low >= 0) & (at - high < tiles * size)
    return start, jnp.where(some, stop - start + 1, 0)


def _diagonals_kernel(inputs: Inputs, lines: int, table, prefix, q, k, q_at, k_at, *refs):
    biases, (kept, base, out, *scratch) = taken(inputs.plan, refs)
    bias_s, scratch = held(inputs.plan, scratch)
    q_s, k_s, q_at_s, k_at_s, kept_s, base_s, w_s, out_s, ready, full = scratch
    b, h, line = (jax.lax.axis_index(name) for name in ("batch", "head", "line"))
    plan, head, size = inputs.plan, jax.lax.div(h, jnp.int32(inputs.plan.group)), inputs.tile
    api = mg.plgpu()
    along = api.Layout.WG_STRIDED((LINE,), vec_size=1)  # says where a line lies; the compiler would search for long
    put = lambda at, x: mg.put(w_s.at[:, pl.ds(at, x.shape[1])], x)
    for margin in (0, LINE + size):
        put(margin, mg.zeros(QUERIES, LINE))

    def block(i: Any, acc: Array) -> Array:
        entry = 2 * ((b * lines + line) * inputs.blocks + i)
        queries = pl.ds(i * QUERIES, QUERIES)
        start, count = table[entry], table[entry + 1]

        def fetch(n: Any, slot: Any) -> None:
            keys = pl.ds((start + n) * size, size)
            mg.fetch(k.at[b, keys, head], k_s.at[slot], full.at[slot])
            mg.fetch(k_at.at[b, :, keys], k_at_s.at[slot], full.at[slot])
            if plan.biases:
                mg.fetch(biases.by_key.at[b, head_of(plan, h), keys], bias_s.at[slot], full.at[slot])

        def tile(hides: bool, n: Any, slot: Any, acc: Array) -> Array:
            mg.wait(full.at[slot])
            s = mg.product(q_s, mg.turned(k_s.at[slot]))
            bias = bias_s.at[slot] if plan.biases else None
            s = scores(plan, hides, s, q_at_s, k_at_s.at[slot], prefix[b], bias)
            w = weights(s, *(mg.down(mg.load_rows(kept_s.at[n]), size) for n in (TOP, SHARE)))
            has_place = mg.across(mg.load_columns(k_at_s.at[slot, SEGMENT]), QUERIES) != GLOBAL
            put(LINE, jnp.where(has_place, w, 0.0))
            mg.publish()
            at = line * LINE - (start + n) * size

            def add(some: Any, acc: Array) -> Array:
                for n in range(AT_ONCE):
                    p = some * AT_ONCE + n
                    shift = jnp.minimum(jnp.maximum(at - base_s[p], -LINE), size)  # further away there are margins
                    acc += api.load(w_s.at[p, pl.ds(LINE + shift, LINE)], layout=along, optimized=False)
                return acc

            return jax.lax.fori_loop(0, QUERIES // AT_ONCE, add, acc)

        mg.publish()  # everyone is done with the block before
        mg.fetch(q.at[b, queries, h], q_s, ready.at[0])
        mg.fetch(q_at.at[b, :, queries], q_at_s, ready.at[0])
        mg.fetch(kept.at[b, h, :, queries], kept_s, ready.at[0])
        mg.fetch(base.at[b, queries], base_s, ready.at[0])
        mg.wait(ready.at[0])
        return stream(jnp.int32(0), jnp.int32(0), count, fetch, tile, acc)

    acc = jax.lax.fori_loop(0, inputs.blocks, block, api.layout_cast(jnp.zeros((LINE,), jnp.float32), along))
    out_s[...] = acc
    mg.store((out_s, out.at[b, h, pl.ds(line * LINE, LINE)]))
