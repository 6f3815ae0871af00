"""One typical call of every op from a `Shape`: what support tables, ahead-of-time compiles and memory tables look at.

Arguments are shapes; nothing is computed. FLOPs are those of the equation, causal where the op is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct as Struct

from jaxattn.masks import self_visibility
from pallas_kernels.block_sparse import block_sparse
from pallas_kernels.flash import Score, flash
from pallas_kernels.grouped_softmax import grouped_softmax
from pallas_kernels.linear_scan import linear_scan
from pallas_kernels.neural_memory import neural_memory
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.prefix_softmax import prefix_softmax
from pallas_kernels.probe import probe
from pallas_kernels.shapes import Shape
from pallas_kernels.softplus import softplus_attention

LANDMARK = 64  # tokens of a landmark block in these calls
BLOCK = 128  # tokens of a block of block-sparse attention
PAGE = 64  # tokens of a page of a cache
FEATURES = 16  # head dim of q and k under BASED's feature map


@dataclasses.dataclass(frozen=True)
class Call:
    """`function(*arrays, backend=)` and the shapes of its arrays; the first `differentiable` of them have gradients."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    differentiable: int
    flops: float

    def run(self, backend: str) -> Callable[..., Any]:
        """The forward pass."""
        return lambda *arrays: self.function(*arrays, backend=backend)

    def gradient(self, backend: str) -> Callable[..., Any]:
        """Gradients of a sum over the first output."""

        def loss(*arrays: Any) -> Any:
            return jnp.sum(jax.tree.leaves(self.function(*arrays, backend=backend))[0].astype(jnp.float32))

        return jax.grad(loss, argnums=tuple(range(self.differentiable)))

    @property
    def bytes(self) -> int:
        """Every argument read and an output like the last value array written once."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self.arguments))


def _heads(shape: Shape, dtype: Any) -> tuple[Struct, Struct, Struct]:
    return (
        Struct((shape.batch, shape.length, shape.heads, shape.dim), dtype),
        Struct((shape.batch, shape.size, shape.kv_heads, shape.dim), dtype),
        Struct((shape.batch, shape.size, shape.kv_heads, shape.value_dim), dtype),
    )


def _pairs(shape: Shape) -> float:
    """Visible pairs of a causal call, over all heads."""
    return shape.batch * shape.heads * shape.length * (shape.length + 1) / 2


def _attention(function: Callable[..., Any], shape: Shape, dtype: Any) -> Call:
    flops = 2 * _pairs(shape) * (shape.dim + shape.value_dim)
    vis = self_visibility(shape.batch, shape.length)
    return Call(lambda q, k, v, backend: function(q, k, v, vis, backend), _heads(shape, dtype), 3, flops)


def _flash(score: Score) -> Callable[[Shape, Any], Call]:
    call = lambda q, k, v, vis, backend: flash(q, k, v, vis, score, scale=q.shape[-1] ** -0.5, backend=backend)
    return lambda shape, dtype: _attention(call, shape, dtype)


def _softplus(shape: Shape, dtype: Any) -> Call:
    call = lambda q, k, v, vis, backend: softplus_attention(q, k, v, vis, scale=1.0, p=15.0, backend=backend)
    return _attention(call, shape, dtype)


def _grouped(shape: Shape, dtype: Any) -> Call:
    call = lambda q, k, v, vis, backend: grouped_softmax(
        q, k, v, vis, block=LANDMARK, scale=q.shape[-1] ** -0.5, backend=backend
    )[0]
    return _attention(call, shape, dtype)


def _recurrence(shape: Shape, dtype: Any) -> Call:
    """Linear attention with a decay per head."""
    flops = 4.0 * shape.batch * shape.heads * shape.length * shape.dim * shape.value_dim
    call = lambda q, k, v, g, backend: linear_scan(q, k, v, log_decay=g, backend=backend)[0]
    return Call(call, (*_heads(shape, dtype), Struct((shape.heads,), jnp.float32)), 4, flops)


def _memory(shape: Shape, dtype: Any) -> Call:
    """Titans' linear memory: a read, a gradient and a write of [D, V] a token."""
    shape = dataclasses.replace(shape, kv_heads=shape.heads)
    rate = Struct((shape.batch, shape.length, shape.heads), jnp.float32)
    start = Struct((shape.heads, shape.dim, shape.value_dim), jnp.float32)
    flops = 8.0 * shape.batch * shape.heads * shape.length * shape.dim * shape.value_dim

    def call(q: Any, k: Any, v: Any, eta: Any, theta: Any, alpha: Any, start: Any, backend: str) -> Any:
        rates = {"eta": jax.nn.sigmoid(eta), "theta": 0.01 * jax.nn.sigmoid(theta), "alpha": jax.nn.sigmoid(alpha)}
        return neural_memory(q, k, v, **rates, start=(start,), chunk=64, backend=backend)[0]

    return Call(call, (*_heads(shape, dtype), rate, rate, rate, start), 7, flops)


def _prefix(shape: Shape, dtype: Any) -> Call:
    scores = Struct((shape.batch, shape.length, shape.heads), jnp.float32)
    values = Struct((shape.batch, shape.length, shape.heads, shape.value_dim), dtype)
    call = lambda s, v, backend: prefix_softmax(s, v, backend=backend)[0]
    return Call(call, (scores, values), 2, 4.0 * math.prod(values.shape))


def _block_sparse(shape: Shape, dtype: Any) -> Call:
    """A tenth of the causal blocks, one list per key head."""
    count = -(-shape.length // BLOCK)
    width = max(2, round(count / 20))
    lists = Struct((shape.batch, shape.kv_heads, count, width), jnp.int32)
    vis = self_visibility(shape.batch, shape.length)
    flops = 2.0 * shape.batch * shape.heads * count * width * BLOCK**2 * (shape.dim + shape.value_dim)

    def call(q: Any, k: Any, v: Any, blocks: Any, backend: str, **more: Any) -> Any:
        sizes = {"block_q": BLOCK, "block_k": BLOCK}
        return block_sparse(q, k, v, vis, blocks=blocks, **sizes, scale=q.shape[-1] ** -0.5, backend=backend, **more)

    return Call(call, (*_heads(shape, dtype), lists), 3, flops)


def _paged(shape: Shape, dtype: Any) -> Call:
    """One query over a sixteenth of a cache of `shape.size` tokens."""
    pages = max(1, shape.size // PAGE)
    listed = max(1, pages // 16)
    pool = lambda dim: Struct((shape.batch, shape.kv_heads, pages, PAGE, dim), dtype)
    query = Struct((shape.batch, 1, shape.heads, shape.dim), dtype)
    tables = Struct((shape.batch, shape.kv_heads, listed), jnp.int32)
    flops = 2.0 * shape.batch * shape.heads * listed * PAGE * (shape.dim + shape.value_dim)
    call = lambda q, k, v, tables, backend: paged_decode(q, k, v, tables, scale=q.shape[-1] ** -0.5, backend=backend)
    return Call(call, (query, pool(shape.dim), pool(shape.value_dim), tables), 0, flops)


def _probe(shape: Shape, dtype: Any) -> Call:
    """Column sums, diagonals and row sums' logarithms of the last 64 queries."""
    count = min(64, shape.length)
    query = Struct((shape.batch, count, shape.heads, shape.dim), dtype)
    keys = Struct((shape.batch, shape.size, shape.kv_heads, shape.dim), dtype)
    vis = self_visibility(shape.batch, shape.size).rows(shape.size - count, count)
    flops = 4.0 * shape.batch * shape.heads * count * shape.size * shape.dim  # q·k twice
    call = lambda q, k, backend, **more: probe(
        q, k, vis, scale=q.shape[-1] ** -0.5, want=("columns", "diagonals", "lse"), backend=backend, **more
    )
    return Call(call, (query, keys), 0, flops)


CALLS: Mapping[str, Callable[[Shape, Any], Call]] = {
    "flash": _flash(Score()),
    "flash, sigmoid": _flash(Score("sigmoid", "none", logit_bias=-8.0)),
    "softplus_attention": _softplus,
    "linear_scan": _recurrence,
    "grouped_softmax": _grouped,
    "neural_memory": _memory,
    "prefix_softmax": _prefix,
    "block_sparse": _block_sparse,
    "paged_decode": _paged,
    "probe": _probe,
}
