"""The Hopper kernel: two warpgroups compute, a third fetches keys and values ahead of them (arXiv 2407.08608).

A block of threads has 128 queries of one head, 64 for each computing warpgroup, and walks over the tiles of keys
that some of them see. Weights are handed to the second product in registers. The wider the heads, the smaller the
tiles: see `gpu_tiles.key_tile`. What is added to scores is in `gpu_biases`. The backward pass is in `gpu_backward`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxattn.masks import Visibility, count_visible
from jaxattn.rope import PositionBias
from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels._dispatch import interpret_for
from pallas_kernels.flash import gpu_biases, rows
from pallas_kernels.flash.gpu_backward import gradients
from pallas_kernels.flash.gpu_biases import NONE, Biases, head_of, held, hiding, in_units, keys_of, taken
from pallas_kernels.flash.gpu_tiles import (
    BLOCK,
    LOG2E,
    STAGES,
    WEIGHTS,
    WGS,
    WIDTHS,
    Plan,
    exponents,
    logits,
    nbytes,
    operands,
    places,
    visits,
    walk,
    whoami,
)
from pallas_kernels.flash.gpu_warpgroups import fetcher, share_out, threads
from pallas_kernels.flash.score import Score

NORMALISERS = ("none", "sum", "sum_plus_one", "clipped_sum", "count")


def unfit(
    q: Array, k: Array, v: Array, score: Score, bias: PositionBias | None, key_bias: Array | None = None
) -> str | None:
    """Why this backend cannot serve a call, or None."""
    if reason := mg.missing() or mg.inexact(q=q, k=k, v=v) or gpu_biases.without_kernel(q, k, bias, key_bias):
        return reason
    if score.normaliser not in NORMALISERS:
        have = ", ".join(NORMALISERS)
        return f"backend 'gpu' has the normalisers {have} but this is {score.normaliser!r}: use 'xla'."
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[3] > WIDTHS[-1]:
            return f"backend 'gpu' has head dims up to {WIDTHS[-1]} but {name} has {x.shape[3]}: use 'xla'."
    return None


def flash_gpu(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"],
    vis: Visibility,
    score: Score,
    *,
    scale: float,
    bias: PositionBias | None = None,
    key_bias: Float[Array, "B n S"] | None = None,
    stats: bool = False,
) -> Float[Array, "B T H V"] | tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """See `pallas_kernels.flash.flash`. What is kept for the backward pass: q, k, v, o and a number per row.

    Raises:
      NotImplementedError: see `unfit`, or the process computes on another platform.
    """
    if reason := unfit(q, k, v, score, bias, key_bias):
        raise NotImplementedError(f"flash: {reason}")
    interpret = mg.mode(interpret_for("flash", "gpu"))
    batch, length, heads, _ = q.shape
    keys, v_dim = k.shape[1], v.shape[3]
    counted = score.normaliser == "count"  # XLA counts: neither the kernel's sums nor its gradients need the number
    plan = Plan(
        score=dataclasses.replace(score, normaliser="none") if counted else score,
        scale=float(scale),
        group=heads // k.shape[2],
        causal=vis.causal,
        window=vis.window,
        has_prefix=vis.prefix_len is not None,
        aligned=vis.aligned,
        stats=stats and not counted,
        staged=mg.simulated(),
        interpret=interpret,
        **gpu_biases.settings(k, bias, key_bias, heads // k.shape[2]),
    )
    wide = lambda x, n: jnp.broadcast_to(x, (batch, n)).astype(jnp.int32)
    vis = dataclasses.replace(
        vis,
        q_positions=wide(vis.q_positions, length),
        q_segments=wide(vis.q_segments, length),
        k_positions=wide(vis.k_positions, keys),
        k_segments=wide(vis.k_segments, keys),
    )
    seen = count_visible(vis).astype(jnp.float32)[..., None] if counted else None  # [B, T, 1]
    vis = vis.pad_rows(-length % BLOCK).pad_columns(-keys % BLOCK)
    biases = gpu_biases.gathered(k, bias, key_bias, -keys % BLOCK)
    o, stat = _attend(plan, blocked(q), blocked(k), blocked(v), vis, biases)
    o = o[:, :length, :, :v_dim].astype(v.dtype)
    if seen is not None:
        o = (o / rows.divisor(seen)[..., None]).astype(o.dtype)
        return (o, jnp.broadcast_to(seen, o.shape[:3])) if stats else o
    return (o, rows.reported(jnp.swapaxes(stat[:, :, :length], 1, 2), score)) if stats else o


def blocked(x: Float[Array, "B T H D"], block: int = BLOCK) -> Float[Array, "B t H d"]:
    """In bfloat16, whole blocks of tokens, and a head dim the kernels have."""
    width, x = next(n for n in WIDTHS if n >= x.shape[3]), x.astype(jnp.bfloat16)
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, width - x.shape[3])))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q: Array, k: Array, v: Array, vis: Visibility, biases: Biases) -> tuple[Array, Array]:
    """[B,T,H,D], [B,S,K,D], [B,S,K,V] in whole blocks to [B,T,H,V] and [B,H,T]."""
    return _forward(plan, q, k, v, vis, biases)[0]


def _forward(plan: Plan, q: Array, k: Array, v: Array, vis: Visibility, biases: Biases) -> tuple[Any, Any]:
    o, stat = forward(plan, visits(vis, BLOCK, keys_of(plan, q.shape[3], v.shape[3])), q, k, v, vis, biases)
    return (o, stat), ((q, k, v, vis, o, stat), biases)


def forward(
    plan: Plan, table: Array, q: Array, k: Array, v: Array, vis: Visibility, biases: Biases = NONE
) -> tuple[Array, Array]:
    """As `_attend`, over the tiles of `table`, which `plan.visit` reads."""
    batch, length, heads, dim = q.shape
    v_dim, steps = v.shape[3], length // BLOCK
    block_k = keys_of(plan, dim, v_dim)
    operand = operands(block_k)
    more = [operand(WGS, mg.ROWS, v_dim)] if v_dim != dim else []  # for o where q's place does not fit
    more += [operand(WGS, mg.ROWS, block_k)] if plan.staged else []
    front = [mg.plain(STAGES, block_k)] if plan.biases else []
    out = [
        jax.ShapeDtypeStruct((batch, length, heads, v_dim), v.dtype),
        jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
    ]
    again = block_k * ((dim + v_dim) * 2 + 4 * len(front))
    o, stat = mg.launch(
        mg.Launch(
            f"{plan.OP}_forward",
            grid={"head": heads, "block": steps, "batch": batch},
            threads=threads(v_dim),
            interpret=plan.interpret,
            cost=plan.cost(q, k, v, (BLOCK, block_k), (1, 1), nbytes(q, *out), again),
        ),
        partial(_forward_kernel, plan, steps),
        out,
        [
            *front,
            operand(WGS, mg.ROWS, dim),
            operand(STAGES, block_k, dim),
            operand(STAGES, block_k, v_dim),
            mg.plain(WGS, 2, mg.ROWS, dtype=jnp.int32),
            mg.plain(STAGES, 2, block_k, dtype=jnp.int32),
            mg.plain(WGS, mg.ROWS),
            mg.barriers(WGS, 2),  # q and its places, of each computing warpgroup
            mg.barriers(STAGES, 2 + len(front)),  # k, its places and its biases
            mg.barriers(STAGES),  # v
            mg.barriers(STAGES, WGS),
            mg.barriers(STAGES, WGS),
            *more,
        ],
        table,
        vis.prefix_len if plan.has_prefix else jnp.zeros((batch,), jnp.int32),
        q,
        k,
        v,
        places(vis.q_positions, vis.q_segments),
        places(vis.k_positions, vis.k_segments),
        *in_units(plan, biases).arrays,
    )
    return o, stat


def _forward_kernel(plan: Plan, steps: int, table, prefix, q, k, v, q_at, k_at, *refs):
    biases, (o, stat, *scratch) = taken(plan, refs)
    bias_s, scratch = held(plan, scratch)
    q_s, k_s, v_s, q_at_s, k_at_s, stat_s, ready, k_full, v_full, k_free, v_free, *more = scratch
    b, h, wg = (jax.lax.axis_index(name) for name in ("batch", "head", "wg"))
    i = steps - 1 - jax.lax.axis_index("block")  # the longest rows first
    visit = plan.visit(table, (b, h, i), (q.shape[2], steps))

    def queries() -> None:
        for n in range(WGS):
            rows_of = pl.ds(i * BLOCK + n * mg.ROWS, mg.ROWS)
            mg.fetch(q.at[b, rows_of, h], q_s.at[n], ready.at[n])
            mg.fetch(q_at.at[b, :, rows_of], q_at_s.at[n], ready.at[n])

    def keys_and_values(n: Any, slot: Any) -> None:
        head = jax.lax.div(h, jnp.int32(plan.group))
        keys = pl.ds(visit.tile(n) * k_s.shape[1], k_s.shape[1])
        mg.fetch(k.at[b, keys, head], k_s.at[slot], k_full.at[slot])
        mg.fetch(k_at.at[b, :, keys], k_at_s.at[slot], k_full.at[slot])
        if plan.biases:
            mg.fetch(biases.by_key.at[b, head_of(plan, h), keys], bias_s.at[slot], k_full.at[slot])
        pl.when(n >= STAGES)(lambda: mg.wait(v_free.at[slot]))
        mg.fetch(v.at[b, keys, head], v_s.at[slot], v_full.at[slot])

    def compute(ahead: Callable[[Any], None]) -> None:
        first = i * BLOCK + wg * mg.ROWS
        stage = more[-1].at[wg] if plan.staged else None
        factor = None if biases.by_head is None else biases.by_head[h]
        mg.wait(ready.at[wg])

        def tile(hides: bool, n: Any, slot: Any, carry: Any) -> Any:
            acc, top, mass = carry
            me = whoami(wg, q_s.shape[2], v_s.shape[2], busy=plan.added)
            ahead(n)
            mg.wait(k_full.at[slot])
            s = mg.product(q_s.at[me], mg.turned(k_s.at[slot]))
            own = Biases(bias_s.at[slot] if plan.biases else None, factor)
            hide = hiding(plan, hides, q_at_s.at[me], k_at_s.at[slot], prefix[b], own)
            w, fade, top, mass = _weights(plan, s, hide, top, mass)
            mg.arrive(k_free.at[slot])
            if fade is not None:
                acc = acc * mg.down(fade, acc.shape[1])
            mg.wait(v_full.at[slot])
            acc = mg.add_product(acc, w.astype(v_s.dtype), v_s.at[slot], stage)
            mg.arrive(v_free.at[slot])
            return acc, top, mass

        start = mg.zeros(mg.ROWS, v_s.shape[2]), mg.per_row(_floor(plan)), mg.per_row(0.0)
        acc, top, mass = walk(visit.whole, visit.count, tile, start)
        top = (top + plan.shift) / LOG2E
        z = rows.divisor(rows.normaliser(mass, top, plan.score))
        o_s = q_s if q_s.shape == (*q_s.shape[:2], v_s.shape[2]) else more[0]
        o_s[wg] = (acc * mg.down(1.0 / z, acc.shape[1])).astype(o.dtype)
        stat_s[wg] = rows.saved(mass, top, plan.score)
        mg.store((o_s.at[wg], o.at[b, pl.ds(first, mg.ROWS), h]), (stat_s.at[wg], stat.at[b, h, pl.ds(first, mg.ROWS)]))

    share_out(wg, v_s.shape[2], visit.count, k_free, queries, keys_and_values, compute)
    mg.drain(v_free, visit.count, when=wg == fetcher(v_s.shape[2]))


def _floor(plan: Plan) -> float:
    """Where the running maximum starts, in powers of two and without the logit bias."""
    return rows.floor(plan.score) * LOG2E - plan.shift if plan.score.activation == "exp" else 0.0


def _weights(plan: Plan, s: Array, hide: Callable[[Array], Array], top: Array, mass: Array) -> Any:
    """Weights of a tile, what the sums before fade by (None: not at all), the new maximum and mass."""
    if plan.score.activation != "exp":
        w = WEIGHTS[plan.score.activation](logits(plan, s, hide))
        return w, None, top, mass if plan.plain else mass + jnp.sum(w, axis=1)
    s, factor = exponents(plan, s, hide)
    now = jnp.maximum(top, jnp.max(s, axis=1) * factor)
    w = jnp.exp2(s * factor - mg.down(now, s.shape[1]))
    fade = jnp.exp2(top - now)
    return w, fade, now, mass * fade + jnp.sum(w, axis=1)


def _backward(plan: Plan, saved: Any, d_out: tuple[Array, Array]) -> tuple[Array, Array, Array, None, Biases]:
    dq, dk, dv, d_biases = gradients(plan, saved[0], *d_out, biases=saved[1])
    return dq, dk, dv, None, d_biases


_attend.defvjp(_forward, _backward)
