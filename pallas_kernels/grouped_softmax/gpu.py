"""The Hopper kernel: two warpgroups compute, a third fetches keys and values ahead of them (arXiv 2407.08608).

A block of keys is a slot of a tile (see `layout`), so its maximum and sums are over neighbouring columns. Each slot
enters the running softmax of a query with one number and shares that weight out, as in `tpu`. A block of threads has
128 queries of one head, 64 for each computing warpgroup, and walks over the tiles that hold slots of their documents
up to their own. Tiles of wide heads are smaller, and the sums of the widest leave no registers for a warpgroup that
only fetches: see `pallas_kernels.flash.gpu_warpgroups`. The backward pass is in `gpu_backward`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxattn.masks import Visibility
from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels._dispatch import interpret_for
from pallas_kernels.flash.gpu_tiles import BLOCK, LOG2E, STAGES, WGS, Visit, nbytes, ring, whoami, wide
from pallas_kernels.flash.gpu_warpgroups import fetcher, share_out, threads
from pallas_kernels.flash.merge import merge
from pallas_kernels.flash.rows import FLOOR
from pallas_kernels.grouped_softmax import layout
from pallas_kernels.grouped_softmax.gpu_backward import backward
from pallas_kernels.grouped_softmax.gpu_tile import Plan, in_slots, levels, tokens_of, weights
from pallas_kernels.grouped_softmax.layout import Page, Places
from pallas_kernels.grouped_softmax.reference import NEVER

TILE, WIDE_TILE = 128, 64  # rows of a tile of keys, and of wide heads, two tiles of which would not fit
SLOTS = (16, 32, 64)  # rows of one
WIDTHS = (64, 128, 192, 256)  # head dims the kernels have; others are padded


def unfit(q: Array, k: Array, v: Array, block: int) -> str | None:
    """Why this backend cannot serve a call, or None."""
    if reason := mg.missing() or mg.inexact(q=q, k=k, v=v):
        return reason
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[3] > WIDTHS[-1]:
            return f"backend 'gpu' has head dims up to {WIDTHS[-1]} but {name} has {x.shape[3]}: use 'xla'."
    if block > SLOTS[-1]:
        return (
            f"backend 'gpu' keeps at most {SLOTS[-1]} tokens of a block in registers but block is {block}: use 'xla'."
        )
    return None


def grouped_softmax_gpu(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"],
    vis: Visibility,
    *,
    block: int,
    scale: float,
    page: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """See `pallas_kernels.grouped_softmax.grouped_softmax`. For the backward pass q, k, v, o and log Z are kept.

    Beside them memory is for copies of k and v, each block padded to a power of two of rows. Keys and values are
    padded to the same head dim.

    Args:
      page: slots there is memory for at least, see `layout`; None: a quarter more than one long document has.

    Raises:
      NotImplementedError: see `unfit`, or the process computes on another platform.
    """
    if reason := unfit(q, k, v, block):
        raise NotImplementedError(f"grouped_softmax: {reason}")
    interpret = mg.mode(interpret_for("grouped_softmax", "gpu"))
    batch, length, heads, _ = q.shape
    keys, v_dim = k.shape[1], v.shape[3]
    width = next(n for n in WIDTHS if n >= max(q.shape[3], v_dim))
    slot = next(n for n in SLOTS if n >= block)
    slots = (WIDE_TILE if wide(width, width) else TILE) // slot
    plan = Plan(
        block=block,
        slot=slot,
        slots=slots,
        tiles=-(-(page or layout.default_page(keys, block)) // slots),
        block_q=BLOCK,
        group=heads // k.shape[2],
        scale=float(scale),
        aligned=vis.aligned,
        interpret=interpret,
        staged=mg.simulated(),
    )
    fill = -length % BLOCK
    spread = lambda x, n: jnp.broadcast_to(x, (batch, n)).astype(jnp.int32)
    vis = Visibility(
        q_positions=spread(vis.q_positions, length),
        q_segments=spread(vis.q_segments, length),
        k_positions=spread(vis.k_positions, keys),
        k_segments=spread(vis.k_segments, keys),
    ).pad_rows(fill)
    filled = lambda x, rows=0: jnp.pad(x.astype(jnp.bfloat16), ((0, 0), (0, rows), (0, 0), (0, width - x.shape[3])))
    o, log_z = _attend(plan, filled(q, fill), filled(k), filled(v), layout.places(vis, plan))
    return o[:, :length, :, :v_dim].astype(v.dtype), jnp.swapaxes(log_z, 1, 2)[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q: Array, k: Array, v: Array, place: Places) -> tuple[Array, Array]:
    """[B,T,H,D], [B,S,K,D], [B,S,K,D] to [B,T,H,D] and log Z [B,H,T]; T is in whole blocks."""
    return _forward(plan, q, k, v, place)[0]


def _forward(plan: Plan, q: Array, k: Array, v: Array, place: Places):
    """Pages are merged as disjoint keys are, in bfloat16: a document without gaps lies in two of them at most."""

    def one(n: Any) -> tuple[Array, Array]:
        here = layout.page(place, plan, n)
        return _page_forward(plan, q, in_slots(k, here.source), in_slots(v, here.source), here, k.shape[1])

    turned = lambda part: (part[0], jnp.swapaxes(part[1], 1, 2))
    both = lambda n, before: turned(merge([turned(before), turned(one(n))]))
    o, log_z = jax.lax.fori_loop(1, layout.pages(place, plan), both, one(jnp.int32(0)))
    return (o, log_z), (q, k, v, place, o, log_z)


def _page_forward(plan: Plan, q: Array, k: Array, v: Array, here: Page, keys: int) -> tuple[Array, Array]:
    """Outputs [B,T,H,D] and log Z [B,H,T] of the keys of one page, which are in slots."""
    batch, length, heads, dim = q.shape
    steps = length // BLOCK
    out = [jax.ShapeDtypeStruct(q.shape, v.dtype), jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)]
    o, log_z = mg.launch(
        mg.Launch(
            "grouped_softmax_forward",
            grid={"head": heads, "block": steps, "batch": batch},
            threads=threads(dim),
            interpret=plan.interpret,
            cost=plan.cost(q, keys, products=(1, 1), moved=nbytes(q, *out), fetched=plan.tile * 2 * dim * 2),
        ),
        partial(_kernel, plan, steps),
        out,
        [
            mg.operand(WGS, mg.ROWS, dim),
            mg.operand(STAGES, plan.tile, dim),
            mg.operand(STAGES, plan.tile, dim),
            mg.plain(WGS, 3, mg.ROWS, dtype=jnp.int32),
            mg.plain(WGS, mg.ROWS),
            mg.barriers(WGS, 2),  # q and its places, of each computing warpgroup
            mg.barriers(STAGES),  # k
            mg.barriers(STAGES),  # v
            mg.barriers(STAGES, WGS),
            mg.barriers(STAGES, WGS),
            *([mg.operand(WGS, mg.ROWS, plan.tile)] if plan.staged else []),
        ],
        layout.tables(here, plan)[0],
        here.tokens[..., 0, 0].reshape(-1),
        q,
        k,
        v,
        here.of_query,
    )
    return o, log_z


def _kernel(plan: Plan, steps: int, table, tokens, q, k, v, at, o, log_z, *scratch):
    q_s, k_s, v_s, at_s, z_s, ready, k_full, v_full, k_free, v_free, *staging = scratch
    b, h, wg = (jax.lax.axis_index(name) for name in ("batch", "head", "wg"))
    i = steps - 1 - jax.lax.axis_index("block")  # the longest rows first
    visit = Visit(table, b * steps + i)

    def queries() -> None:
        for n in range(WGS):
            rows = pl.ds(i * BLOCK + n * mg.ROWS, mg.ROWS)
            mg.fetch(q.at[b, rows, h], q_s.at[n], ready.at[n])
            mg.fetch(at.at[b, :, rows], at_s.at[n], ready.at[n])

    def keys_and_values(n: Any, slot: Any) -> None:
        head = jax.lax.div(h, jnp.int32(plan.group))
        keys = pl.ds(visit.tile(n) * plan.tile, plan.tile)
        mg.fetch(k.at[b, keys, head], k_s.at[slot], k_full.at[slot])
        pl.when(n >= STAGES)(lambda: mg.wait(v_free.at[slot]))
        mg.fetch(v.at[b, keys, head], v_s.at[slot], v_full.at[slot])

    def compute(ahead: Callable[[Any], None]) -> None:
        rows = pl.ds(i * BLOCK + wg * mg.ROWS, mg.ROWS)
        stage = staging[0].at[wg] if plan.staged else None
        mg.wait(ready.at[wg])

        def tile(n: Any, slot: Any, carry: Any) -> Any:
            acc, top, mass = carry
            me = whoami(wg, q_s.shape[2], v_s.shape[2])
            j = visit.tile(n)
            here = tokens_of(plan, tokens, b, j)  # asked for before the wait, which hides how long it takes
            ahead(n)
            mg.wait(k_full.at[slot])
            s = mg.product(q_s.at[me], mg.turned(k_s.at[slot]))
            mg.arrive(k_free.at[slot])
            found = levels(plan, s, here, at_s.at[me], j * plan.slots)
            now = functools.reduce(jnp.maximum, (x.base for x in found), top)
            fade = jnp.exp2(top - now)
            w, gates = weights(plan, found, now)
            mass = mass * fade
            for x, gate in zip(found, gates, strict=True):
                mass += x.mass(gate)
            acc = acc * mg.down(fade, acc.shape[1])
            mg.wait(v_full.at[slot])
            acc = mg.add_product(acc, w.astype(v_s.dtype), v_s.at[slot], stage)
            mg.arrive(v_free.at[slot])
            return acc, now, mass

        start = mg.zeros(mg.ROWS, v_s.shape[2]), mg.per_row(FLOOR), mg.per_row(0.0)
        acc, top, mass = ring(jnp.int32(0), visit.count, tile, start)
        safe = jnp.where(mass > 0.0, mass, 1.0)
        q_s[wg] = (acc * mg.down(1.0 / safe, acc.shape[1])).astype(o.dtype)
        z_s[wg] = jnp.where(mass > 0.0, top / LOG2E + jnp.log(safe), NEVER)
        mg.store((q_s.at[wg], o.at[b, rows, h]), (z_s.at[wg], log_z.at[b, h, rows]))

    share_out(wg, v_s.shape[2], visit.count, k_free, queries, keys_and_values, compute)
    mg.drain(v_free, visit.count, when=wg == fetcher(v_s.shape[2]))


def _backward(plan: Plan, saved: Any, cotangents: tuple[Array, Array]) -> tuple[Array, Array, Array, None]:
    return *backward(plan, saved, *cotangents), None


_attend.defvjp(_forward, _backward)
