"""The (maximum, mass, weighted sum) triple of a softmax, and the prefix softmax with the whole T×T matrix.

Attention as an RNN (arXiv 2405.13956, Eq. 1-2 and the ⊕ of its section 3.2); the same merge joins the blocks
of flash attention, ring attention and any softmax whose keys are split.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from jaxattn.types import Leaf
from pallas_kernels.flash.reference import NEVER


@struct.dataclass
class Partial:
    """softmax over some keys, before the division: mass Σ e^s = u·e^m and Σ e^s v = w·e^m.

    `m` is an arbitrary shift, by convention the largest score, so that u and w neither overflow nor vanish.
    What this package returns treats m as a constant: gradients flow through u and w.
    """

    m: Leaf  # [...]
    u: Leaf  # [...]
    w: Leaf  # [..., V]


def empty(shape: tuple[int, ...], value_dim: int, dtype: DTypeLike = jnp.float32) -> Partial:
    """No keys at all, the identity of `merge`: m = -1e30, finite, since (-inf) - (-inf) would be NaN.

    m must not start at 0: with all scores below -104 every later exponential would underflow.
    """
    return Partial(m=jnp.full(shape, NEVER, dtype), u=jnp.zeros(shape, dtype), w=jnp.zeros((*shape, value_dim), dtype))


def merge(a: Partial, b: Partial) -> Partial:
    """Both sets of keys together: associative and commutative. A single key is (s, 1, v)."""
    # The result does not depend on m, so its gradient may be cut; that of a.m and b.m (scores, in a leaf) stays.
    m = jax.lax.stop_gradient(jnp.maximum(a.m, b.m))
    fade_a, fade_b = jnp.exp(a.m - m), jnp.exp(b.m - m)
    return Partial(m=m, u=a.u * fade_a + b.u * fade_b, w=a.w * fade_a[..., None] + b.w * fade_b[..., None])


def output(p: Partial) -> Float[Array, "... V"]:
    """w / u: the softmax-weighted values; zeros without keys."""
    return p.w / jnp.where(p.u == 0, 1.0, p.u)[..., None]


def prefix_softmax_reference(
    s: Float[Array, "B T H"],
    v: Float[Array, "B T H V"],
    live: Bool[Array, "B T"],
    runs: Int[Array, "B T"],
    initial: Partial,
    *,
    chunk: int | None = None,
) -> tuple[Float[Array, "B T H V"], Partial]:
    """Every row's own masked softmax in f32, merged with `initial` in run 0; see `xla` for the arguments."""
    steps = jnp.arange(s.shape[1])
    see = (steps[:, None] >= steps) & (runs[:, :, None] == runs[:, None, :]) & live[:, None, :]  # [B, T, S]
    rows = jnp.moveaxis(s, 1, 2)[:, :, None, :]  # [B, H, 1, S]
    see = see[:, None]
    masked = jnp.where(see, rows, NEVER)
    m = jax.lax.stop_gradient(jnp.max(masked, axis=-1))  # [B, H, T]
    weights = jnp.where(see, jnp.exp(jnp.where(see, masked - m[..., None], 0.0)), 0.0)
    own = Partial(m=m, u=jnp.sum(weights, axis=-1), w=jnp.einsum("bhts,bshv->bhtv", weights, v.astype(weights.dtype)))
    first = (runs == 0)[:, None]  # [B, 1, T], still in the segment of the initial state
    before = Partial(
        m=jnp.where(first, initial.m[..., None], NEVER),
        u=jnp.where(first, initial.u[..., None], 0.0),
        w=jnp.where(first[..., None], initial.w[..., None, :], 0.0),
    )
    every = merge(own, before)
    o = jnp.where(live[:, None, :, None], output(every), 0.0)
    last = Partial(m=every.m[..., -1], u=every.u[..., -1], w=every.w[..., -1, :])
    return jnp.moveaxis(o, 2, 1).astype(v.dtype), last
