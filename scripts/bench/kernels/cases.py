"""What is measured: for every case a few contenders that do the same work, and the bar ours should reach."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn.masks import Visibility, self_visibility
from pallas_kernels import Score, flash
from pallas_kernels.block_sparse import block_sparse
from pallas_kernels.linear_scan import linear_scan
from pallas_kernels.paged_decode import paged_decode, pages_of
from pallas_kernels.shapes import Shape
from scripts.bench.kernels import rivals

OURS = "jaxattn"
SEED = 0


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    make: shape of the case -> contenders by name, ours first; each a jitted call without arguments.
    against: the rivals the bar speaks of; ours must be `bar` times as fast as the fastest of them that is here.
    same: contenders compute the same numbers, which is checked before anything is timed.
    """

    name: str
    op: str
    shape: Shape
    make: Callable[[Shape], dict[str, Callable[[], Any]]]
    bar: float | None = None
    against: tuple[str, ...] = ()
    same: bool = True
    flops: float = 0.0


def inputs(shape: Shape, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Random q, k, v."""
    keys = jax.random.split(jax.random.key(SEED), 3)
    draw = lambda key, length, heads, dim: jax.random.normal(key, (shape.batch, length, heads, dim), dtype)
    return (
        draw(keys[0], shape.length, shape.heads, shape.dim),
        draw(keys[1], shape.size, shape.kv_heads, shape.dim),
        draw(keys[2], shape.size, shape.kv_heads, shape.value_dim),
    )


def bound(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """A compiled call without arguments."""
    compiled = jax.jit(function)
    return lambda: compiled(*args)


def reusing(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """Like `bound`, but each call writes its results over those of the call before, as a training step does.

    Results of tens of megabytes would else be fresh memory in every call, which the system clears first.
    """
    compiled = jax.jit(lambda old, *args: function(*args), donate_argnums=0, keep_unused=True)
    old = [jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *args))]

    def call() -> Any:
        old[0] = compiled(old[0], *args)
        return old[0]

    return call


def gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of a sum that weighs entries differently, in q, k and v."""

    def loss(q: Any, k: Any, v: Any) -> Any:
        o = function(q, k, v)
        o = o[0] if isinstance(o, tuple) else o
        return jnp.sum(o.astype(jnp.float32) * jnp.cos(jnp.arange(o.shape[-1], dtype=jnp.float32)))

    return jax.grad(loss, argnums=(0, 1, 2))


def causal_flops(shape: Shape, products: int) -> float:
    """Floating-point operations of `products` matrix products over the causal half."""
    return products * shape.batch * shape.heads * shape.length**2 * shape.dim


def attention(score: Score, *, backward: bool, dtype: Any, window: int | None = None) -> Callable[[Shape], dict]:
    """Causal attention of one score against whoever offers it."""

    def make(shape: Shape) -> dict[str, Callable[[], Any]]:
        q, k, v = inputs(shape, dtype)
        vis = self_visibility(shape.batch, shape.length, window=window)
        scale = 1 / math.sqrt(shape.dim)
        calls = {OURS: lambda q, k, v: flash(q, k, v, vis, score, scale=scale)}
        if score == Score():
            calls |= rivals.softmax(shape, dtype)
        turned = gradient if backward else (lambda f: f)
        found = {name: bound(turned(f), q, k, v) for name, f in calls.items()}
        if score == Score():
            found |= rivals.torch_softmax(q, k, v, backward)
        return found

    return make


def recurrence(*, backward: bool, dtype: Any, rival: bool) -> Callable[[Shape], dict]:
    """Linear attention with a decay per head, against softmax attention over the same tokens (other numbers)."""

    def make(shape: Shape) -> dict[str, Callable[[], Any]]:
        q, k, v = inputs(shape, dtype)
        decay = -(2.0 ** -jnp.arange(1, shape.heads + 1, dtype=jnp.float32))
        turned = gradient if backward else (lambda f: f)
        calls = {OURS: reusing(turned(lambda q, k, v: linear_scan(q, k, v, log_decay=decay)[0]), q, k, v)}
        if rival:
            vis = self_visibility(shape.batch, shape.length)
            soft = lambda q, k, v: flash(q, k, v, vis, Score(), scale=1 / math.sqrt(shape.dim))
            calls["flash"] = reusing(turned(soft), q, k, v)
        return calls | rivals.triton_linear(q, k, v, decay, backward)

    return make


def sparse(share: float, block: int, *, dtype: Any) -> Callable[[Shape], dict]:
    """Causal attention over a share of the key blocks (the own one, the first, others at random), and over all."""

    def make(shape: Shape) -> dict[str, Callable[[], Any]]:
        q, k, v = inputs(shape, dtype)
        vis = self_visibility(shape.batch, shape.length)
        count = -(-shape.length // block)
        width = max(2, round(share * (count + 1) / 2))  # of the causal blocks of a row, (count + 1) / 2 in the mean
        lists = jax.random.randint(jax.random.key(SEED), (shape.batch, shape.kv_heads, count, width), 0, 2**30)
        row = jnp.arange(count)[:, None]
        lists = (lists % (row + 1)).at[..., 0].set(0).at[..., 1].set(jnp.arange(count))
        scale = 1 / math.sqrt(shape.dim)
        ours = lambda q, k, v: block_sparse(q, k, v, vis, blocks=lists, block_q=block, block_k=block, scale=scale)
        dense = lambda q, k, v: flash(q, k, v, vis, Score(), scale=scale)
        calls = {OURS: ours, "flash, dense": dense} | rivals.softmax(shape, dtype)
        return {name: bound(f, q, k, v) for name, f in calls.items()}

    return make


def decode(share: float, page: int, *, dtype: Any) -> Callable[[Shape], dict]:
    """One query over a share of the pages of a cache, and over all of it."""

    def make(shape: Shape) -> dict[str, Callable[[], Any]]:
        one = dataclasses.replace(shape, length=1, keys=shape.size)
        q, k, v = inputs(one, dtype)
        batch, keys = shape.batch, shape.size
        vis = Visibility(
            q_positions=jnp.full((batch, 1), keys - 1),
            k_positions=jnp.tile(jnp.arange(keys), (batch, 1)),
            q_segments=jnp.ones((batch, 1), jnp.int32),
            k_segments=jnp.ones((batch, keys), jnp.int32),
        )
        scale, pages = 1 / math.sqrt(shape.dim), keys // page
        table = jax.random.permutation(jax.random.key(SEED), pages)[: round(share * pages)][None].astype(jnp.int32)
        table = jnp.broadcast_to(table[None], (batch, 1, table.shape[1]))
        k, v = (jnp.swapaxes(x, 1, 2).copy() for x in (k, v))  # heads first, as caches lie
        sparse = lambda q, k, v, table: paged_decode(q, pages_of(k, page), pages_of(v, page), table, scale=scale)[0]
        turn = lambda x: jnp.swapaxes(x, 1, 2)
        dense = lambda q, k, v: flash(q, turn(k), turn(v), vis, Score(), scale=scale)
        plain = lambda q, k, v: flash(q, turn(k), turn(v), vis, Score(), scale=scale, backend="xla")
        xla = lambda q, k, v, table: paged_decode(
            q, pages_of(k, page), pages_of(v, page), table, scale=scale, backend="xla"
        )[0]
        return {
            OURS: bound(sparse, q, k, v, table),
            "paged_decode xla": bound(xla, q, k, v, table),
            "flash, dense": bound(dense, q, k, v),
            "flash xla, dense": bound(plain, q, k, v),
        }

    return make


def whole_cache(page: int, *, dtype: Any) -> Callable[[Shape], dict]:
    """One query over every page of a cache, in an order of their own, against copying the cache.

    A copy moves each byte twice, so decoding at 80 % of its bandwidth takes 1 / 1.6 of its time.
    """

    def make(shape: Shape) -> dict[str, Callable[[], Any]]:
        q, k, v = inputs(dataclasses.replace(shape, length=1, keys=shape.size), dtype)
        k, v = (pages_of(jnp.swapaxes(x, 1, 2).copy(), page) for x in (k, v))
        table = jax.random.permutation(jax.random.key(SEED), shape.size // page).astype(jnp.int32)
        table = jnp.broadcast_to(table, (shape.batch, 1, table.size))
        scale = 1 / math.sqrt(shape.dim)
        ours = lambda q, k, v, table: paged_decode(q, k, v, table, scale=scale)[0]
        return {OURS: bound(ours, q, k, v, table), "copy": bound(lambda k, v: (k.copy(), v.copy()), k, v)}

    return make
