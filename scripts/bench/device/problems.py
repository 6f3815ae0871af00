"""What the numerics of a run are checked on: every op at a few shapes, and what models ask of them besides.

A problem is drawn from a seed; its arrays are what a kernel gets, bfloat16 where kernels multiply.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn.masks import self_visibility
from jaxattn.rope import Alibi
from pallas_kernels import Score, flash
from pallas_kernels.linear_scan import linear_scan
from pallas_kernels.shapes import Shape
from pallas_kernels.typical_calls import CALLS, PAGE

Function = Callable[..., Any]  # of the arrays and of `backend`


@dataclasses.dataclass(frozen=True)
class Problem:
    """`function(*arrays, backend=)`; the first `differentiable` of the arrays have gradients."""

    function: Function
    arrays: tuple[jax.Array, ...]
    differentiable: int


def problem(name: str, shape: Shape, seed: int) -> Problem:
    """Of an op of `pallas_kernels.typical_calls`, or one of `MORE`."""
    key = jax.random.key(seed)
    if name in MORE:
        return MORE[name](shape, key)
    call = CALLS[name](shape, jnp.bfloat16)
    keys = jax.random.split(key, len(call.arguments))
    values = [jax.random.normal(k, x.shape).astype(x.dtype) for k, x in zip(keys, call.arguments, strict=True)]
    if name in FITTED:
        values = FITTED[name](shape, values, key)
    return Problem(call.function, tuple(values), call.differentiable)


def _decaying(shape: Shape, values: list[jax.Array], key: jax.Array) -> list[jax.Array]:
    """Logarithms of decays between -0.3 and 0, and q and k so short that rows stay of one size.

    Each token has its own, as a gradient summed over all tokens is mostly what rounding leaves of it.
    """
    q, k, v, _ = values
    return [q * shape.dim**-0.25, k * shape.dim**-0.25, v, -jax.random.uniform(key, q.shape[:3], maxval=0.3)]


def _contracting(shape: Shape, values: list[jax.Array], key: jax.Array) -> list[jax.Array]:
    """Keys of length 1, so that no step of the memory overshoots."""
    q, k, *rest, start = values
    unit = lambda x: (x / jnp.linalg.norm(x.astype(jnp.float32), axis=-1, keepdims=True)).astype(x.dtype)
    return [unit(q), unit(k), *rest, 0.1 * start]


def _listed(shape: Shape, values: list[jax.Array], key: jax.Array) -> list[jax.Array]:
    """Blocks up to the diagonal; each row lists its own first."""
    q, k, v, lists = values
    row = jnp.arange(lists.shape[2])[:, None]
    drawn = jax.random.randint(key, lists.shape, 0, 1 << 30) % (row + 1)
    drawn = drawn.at[..., 0].set(row[:, 0])
    again = (drawn[..., None] == drawn[..., None, :]) & jnp.tril(jnp.ones((lists.shape[3],) * 2, bool), -1)
    return [q, k, v, jnp.where(again.any(-1), -1, drawn).astype(jnp.int32)]


def _paged(shape: Shape, values: list[jax.Array], key: jax.Array) -> list[jax.Array]:
    """Pages in an order of their own, none twice."""
    q, k, v, tables = values
    rows = jax.random.split(key, tables.shape[0] * tables.shape[1])
    pages = jax.vmap(lambda key: jax.random.permutation(key, max(1, shape.size // PAGE))[: tables.shape[2]])(rows)
    return [q, k, v, pages.reshape(tables.shape).astype(jnp.int32)]


FITTED: dict[str, Callable[[Shape, list[jax.Array], jax.Array], list[jax.Array]]] = {
    "linear_scan": _decaying,
    "neural_memory": _contracting,
    "block_sparse": _listed,
    "paged_decode": _paged,
}


def _qkv(shape: Shape, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(key, 3)
    draw = lambda key, heads, dim: jax.random.normal(key, (shape.batch, shape.length, heads, dim), jnp.bfloat16)
    heads = (shape.heads, shape.dim), (shape.kv_heads, shape.dim), (shape.kv_heads, shape.value_dim)
    q, k, v = (draw(key, *of) for key, of in zip(keys, heads, strict=True))
    return q, k, v


def _documents(shape: Shape) -> jax.Array:
    """Segment ids of three documents and padding behind them."""
    at = jnp.arange(shape.length)
    ids = sum((at >= shape.length * part // 16).astype(jnp.int32) for part in (0, 5, 9))
    return jnp.tile(jnp.where(at < shape.length * 15 // 16, ids, 0), (shape.batch, 1))


def _packed(shape: Shape, key: jax.Array) -> Problem:
    vis = self_visibility(shape.batch, shape.length, window=max(2, shape.length // 4), segment_ids=_documents(shape))
    call = lambda q, k, v, backend: flash(q, k, v, vis, Score(), scale=shape.dim**-0.5, backend=backend)
    return Problem(call, _qkv(shape, key), 3)


def _biased(shape: Shape, key: jax.Array) -> Problem:
    vis = self_visibility(shape.batch, shape.length)
    slopes = 2.0 ** -jnp.arange(1.0, shape.heads + 1)
    key_bias = jax.random.normal(jax.random.fold_in(key, 1), (shape.batch, shape.kv_heads, shape.length))

    def call(q: Any, k: Any, v: Any, slopes: Any, key_bias: Any, backend: str) -> Any:
        more: dict[str, Any] = {"bias": Alibi(slopes), "key_bias": key_bias, "backend": backend}
        return flash(q, k, v, vis, Score(), scale=shape.dim**-0.5, stats=True, **more)

    return Problem(call, (*_qkv(shape, key), slopes, key_bias), 5)


def _carried(shape: Shape, key: jax.Array) -> Problem:
    """Packed documents, a decay per token, and a state of before."""
    q, k, v = _qkv(shape, key)
    decay = -jax.random.uniform(jax.random.fold_in(key, 1), q.shape[:3], maxval=0.3)
    start = jax.random.normal(jax.random.fold_in(key, 2), (shape.batch, shape.heads, shape.dim, shape.value_dim))
    segments = _documents(shape)

    def call(q: Any, k: Any, v: Any, decay: Any, start: Any, backend: str) -> Any:
        more = {"segments": segments, "initial_segment": segments[:, 0], "backend": backend}
        return linear_scan(q, k, v, log_decay=decay, initial_state=start, **more)

    short = shape.dim**-0.25
    return Problem(call, (q * short, k * short, v, decay, start), 5)


MORE: dict[str, Callable[[Shape, jax.Array], Problem]] = {
    "flash, packed and windowed": _packed,
    "flash, ALiBi and key bias": _biased,
    "linear_scan, packed and carried on": _carried,
}
