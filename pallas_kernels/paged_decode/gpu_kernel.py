"""The Hopper kernel of `paged_decode`: keys are the rows of both products, queries their columns.

With K the 64 or 128 keys of a chunk, Q the queries of one key head and w the weights:

    s = K Qᵀ  [keys, queries],   o = Vᵀ w  [V, queries]

A tensor core's tile has 64 rows but as few as 8 columns, so that one query of a few heads neither computes 64 of them
nor holds their sums in registers. One warpgroup walks over its part of a list; pages come by the copy engine into a
ring of chunks, several of them under way while one is computed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels.flash.gpu_tiles import LOG2E
from pallas_kernels.flash.reference import NEVER
from pallas_kernels.flash.rows import FLOOR
from pallas_kernels.paged_decode.gpu_tiles import (
    ENTRIES,
    Lookup,
    Plan,
    clear,
    columns_first,
    fetch_units,
    in_tiles,
    per_column,
    slots,
    turn,
)


def decode(
    plan: Plan,
    q: Float[Array, "B K R D"],
    k: Float[Array, "N K U unit D"],
    v: Float[Array, "N K U unit V"],
    tables: Int[Array, "B _ n"],
    ends: Int[Array, "B _"],
    bias: Float[Array, "B _ chunks rows"],
    limits: Int[Array, "B _ R"] | None,
    angles: tuple[Array, Array] | None,
) -> tuple[Float[Array, "B X K v R"], Float[Array, "B X K R"]]:
    """Outputs, columns of which are queries, and logarithms of the masses, in f32, for every split X.

    Arrays with an axis _ have one head for all or one for each of the K.

    Args:
      tables: pages; -1: none.
      ends: slots at or behind this one are not looked at.
      bias: added to scores of slots, `plan.chunk` of them in a row; NEVER: hidden.
      limits: slots at or behind this one are not seen by a query; None: all are.
      angles: cos and sin [B, _, chunks, rows, half].

    Returns:
      v is V filled up to whole tiles of a product; what is behind V means nothing.
    """
    batch, kv_heads, queries, dim = q.shape
    block, rows, chunk, entries = plan.block, plan.value_rows, plan.chunk, plan.cut.entries
    count, _ = plan.ring()
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    out = [f32(batch, plan.splits, kv_heads, rows, queries), f32(batch, plan.splits, kv_heads, queries)]
    inputs = [tables.reshape(-1), ends.reshape(-1), bias, q, k, v]
    keys, values = (partial(mg.operand, swizzle=2 * width) for width in (plan.key_width, plan.value_width))
    raw = partial(mg.plain, count, chunk, dtype=k.dtype)
    scratch = [
        keys(block, dim),
        raw(dim) if plan.apart else keys(count, chunk, dim),
        raw(plan.v_dim) if plan.apart else values(count, chunk, rows),
        values(block, chunk),  # weights; both operands of a product have tiles of one width
        mg.plain(count, chunk),
        mg.plain(block),
        mg.barriers(1),
        mg.barriers(count, entries + 1),  # keys and what is added to their scores
        mg.barriers(count, entries),
        *([keys(chunk, dim), values(chunk, rows)] if plan.apart else []),
    ]
    if limits is not None:
        inputs.append(limits)
    o, lse = mg.launch(
        mg.Launch(
            "paged_decode_forward",
            grid={"split": plan.splits, "head": kv_heads, "block": queries // block, "batch": batch},
            interpret=plan.interpret,
            cost=plan.cost(batch * kv_heads * bias.shape[2], q, tables, ends, *out),
        ),
        partial(_kernel, plan, limits is not None, [x.shape[1:] for x in (tables, ends)]),
        out,
        scratch,
        *inputs,
        *(angles or ()),
    )
    return o, lse


def _kernel(plan: Plan, limited: bool, shapes: list[tuple[int, ...]], tables, ends, bias, q, k, v, *refs):
    rest = list(refs)
    limits: Any = rest.pop(0) if limited else None
    angles = [rest.pop(0), rest.pop(0)] if plan.half else []
    o, lse, q_s, k_s, v_s, w_s, bias_s, lse_s, ready, k_full, v_full, *rest = rest
    tiles = (rest.pop(0), rest.pop(0)) if plan.apart else None
    b, h, part, n = (jax.lax.axis_index(name) for name in ("batch", "head", "block", "split"))
    (stages, rows), queries, v_wide = bias_s.shape, q_s.shape[0], o.shape[3]
    (table_heads, listed), (end_heads,), entries = *shapes, plan.cut.entries
    of = lambda heads: 0 if heads == 1 else h  # what has one head holds for all
    chunks = jax.lax.div(ends[b * end_heads + of(end_heads)] + jnp.int32(rows - 1), jnp.int32(rows))
    start, stop = (jax.lax.div(chunks * (n + i), jnp.int32(plan.splits)) for i in (0, 1))
    here = pl.ds(part * queries, queries)

    def unit(i: Any) -> Any:
        """The i-th of the list; -1: none."""
        entry = jax.lax.div(i, jnp.int32(plan.cut.parts))
        page = tables[(b * table_heads + of(table_heads)) * listed + jnp.minimum(entry, listed - 1)]
        inside = page * plan.cut.parts + i - entry * plan.cut.parts
        return jnp.where((page >= 0) & (entry < listed), inside, -1)

    def lookup(chunk: Any, count: int, first: Any) -> list[Any]:
        return [unit(chunk * entries + first + c) for c in range(count)]

    def fetch(chunk: Any, slot: Any, units: Lookup | None = None) -> None:
        mg.fetch(bias.at[b, of(bias.shape[1]), chunk], bias_s.at[slot], k_full.at[slot])
        fetch_units(
            plan.cut,
            units or partial(lookup, chunk),
            (k.at[0 if k.shape[0] == 1 else b, h], k_s.at[slot], k_full.at[slot]),
            (v.at[0 if v.shape[0] == 1 else b, h], v_s.at[slot], v_full.at[slot]),
        )

    mg.fetch(q.at[b, h, here], q_s, ready.at[0])
    jax.lax.fori_loop(start, jnp.minimum(start + stages, stop), lambda chunk, _: fetch(chunk, chunk - start), None)
    limit: Any = mg.load_columns(limits.at[b, of(limits.shape[1]), here]) if limited else None
    mg.wait(ready.at[0])

    def step(chunk: Any, carry: Any) -> Any:
        acc, top, mass = carry
        slot, following = jax.lax.rem(chunk - start, jnp.int32(stages)), chunk + stages
        units = lookup(following, entries, 0) if entries <= ENTRIES else []  # on their way while this is computed
        mg.wait(k_full.at[slot])
        keys = in_tiles(k_s.at[slot], tiles and tiles[0], plan.key_width)
        if angles:
            turn(keys, [x.at[b, of(x.shape[1]), chunk] for x in angles], plan.key_width)
        if tiles or angles:
            mg.publish()
        s = mg.product(keys, mg.turned(q_s))
        added = mg.load_rows(bias_s.at[slot])
        see = mg.down(added, queries) > NEVER / 2
        if limited:
            see &= slots(chunk, rows, queries) < mg.across(limit, rows)
        s = jnp.where(see, s * (plan.scale * LOG2E) + mg.down(added * LOG2E, queries), -jnp.inf)
        now = jnp.maximum(top, jnp.max(s, axis=0))
        w = jnp.exp2(s - mg.across(now, rows))
        fade = jnp.exp2(top - now)
        mass = mass * mg.across(fade, rows) + w
        mg.turned(w_s)[...] = columns_first(w.astype(w_s.dtype))
        mg.wait(v_full.at[slot])
        values = in_tiles(v_s.at[slot], tiles and tiles[1], plan.value_width)
        clear(values, added)
        mg.publish()
        acc = acc * mg.across(fade, v_wide) + mg.product(mg.turned(values), mg.turned(w_s))
        mg.publish()  # everyone has read what is overwritten now
        ahead = (lambda *_: units) if units else None
        pl.when(following < stop)(lambda: fetch(following, slot, ahead))
        return acc, now, mass

    begin = mg.zeros(v_wide, queries), per_column(FLOOR, queries), mg.zeros(rows, queries)
    acc, top, mass = jax.lax.fori_loop(start, stop, step, begin)
    total = jnp.sum(mass, axis=0)
    some = total > 0.0
    z = jnp.where(some, total, 1.0)
    mg.put(o.at[b, n, h, :, here], acc * mg.across(1.0 / z, v_wide))
    lse_s[...] = jnp.where(some, top / LOG2E + jnp.log(z), NEVER)
    mg.store((lse_s, lse.at[b, n, h, here]))
