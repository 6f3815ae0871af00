"""The equation with the whole T×S matrix, in the collapsed form, and the row rules the backends share.

With m_i the mean of φ over the visible keys, the paper's two stages (l1 norm, then
relu(A·N - 1)^p, then l1 norm again) are max(φ - m, 0)^p over its row sum: every row scale cancels.
Dividing by the row's largest value before the power keeps it in [0, 1], where p = 15 cannot overflow.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.masks import GLOBAL, Visibility, visible
from jaxattn.rope import PositionBias

UNIFORM = 1e-5  # (max - mean) / max below which a row counts as uniform; f32 noise of φ is 1e-7 to 1e-6
TINY = 1e-30  # a row whose largest φ is below this has nothing left to compare


def softplus(s: Array) -> Array:
    """log(1 + e^s), exact in both tails, with one exponential."""
    return jnp.where(s >= 0, s, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(s)))  # maximum's slope at 0 would not be 1


def row_terms(count: Array, total: Array, top: Array, exempt: int) -> tuple[Array, Array]:
    """The offset m and the factor 1 / (max - m) of every row.

    Args:
      count: N, visible keys of the row.
      total, top: sum and maximum of φ over them.

    Returns:
      (m, factor). factor 0 marks a row that keeps its LSSA weights: uniform rows have no key above their
      mean, so the paper's rule gives 0/0 there. This guard is ours. The factor is a constant of the
      gradient, because it cancels between w and its row sum.
    """
    m = jnp.where(count <= exempt, 0.0, total / jnp.maximum(count, 1).astype(total.dtype))
    top = jax.lax.stop_gradient(top)
    gap = top - jax.lax.stop_gradient(m)
    flat = (gap <= UNIFORM * top) | (top < TINY)
    return jnp.where(flat, 0.0, m), jnp.where(flat, 0.0, 1.0 / jnp.where(flat, 1.0, gap))


def raw_weights(phi: Array, m: Array, factor: Array, p: float | None) -> Array:
    """w before its row sum: φ for LSSA and for uniform rows (factor 0), else (max(φ - m, 0) · factor)^p."""
    if p is None:
        return phi
    r = jnp.where(phi > m, phi - m, 0.0) * factor
    return jnp.where(factor == 0, phi, _power(r, p))


def _power(r: Array, p: float) -> Array:
    """r^p for r in [0, 1]; whole p by repeated squaring (15: five products), others with gradient 0 at 0."""
    if float(p).is_integer():
        return jax.lax.integer_pow(r, int(p))
    return jnp.where(r > 0, jnp.where(r > 0, r, 1.0) ** p, 0.0)


def dense_rows(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    vis: Visibility,
    *,
    scale: float,
    p: float | None,
    exempt: int,
    bias: PositionBias | None = None,
) -> tuple[Float[Array, "B H T S"], Float[Array, "B H T S"]]:
    """Normalised weights A (zeros where a row sees nothing) and the unmasked scores s."""
    kind = jnp.promote_types(q.dtype, jnp.float32)
    see = visible(vis)[:, None]
    count = jnp.sum(see, axis=-1, keepdims=True, dtype=jnp.int32)
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2).astype(kind)
    s = jnp.einsum("bthd,bshd->bhts", q.astype(kind), k, precision=jax.lax.Precision.HIGHEST)
    s = scale * jnp.log(jnp.maximum(count, 1).astype(kind)) * s
    if bias is not None:
        on = (vis.k_segments != GLOBAL)[:, None, None, :]
        s = s + jnp.where(on, bias(vis.q_positions, vis.k_positions), 0.0)
    phi = jnp.where(see, softplus(s), 0.0)
    total, top = jnp.sum(phi, axis=-1, keepdims=True), jnp.max(phi, axis=-1, keepdims=True, initial=0.0)
    w = raw_weights(phi, *row_terms(count, total, top, exempt), p)
    z = jnp.sum(w, axis=-1, keepdims=True)
    return w / jnp.where(z == 0, 1.0, z), s


def softplus_reference(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"],
    vis: Visibility,
    *,
    scale: float,
    p: float | None,
    exempt: int,
    bias: PositionBias | None = None,
) -> Float[Array, "B T H V"]:
    """o = A @ v, in f32 or better; result in v's dtype."""
    a, _ = dense_rows(q, k, vis, scale=scale, p=p, exempt=exempt, bias=bias)
    v_all = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2).astype(a.dtype)
    return jnp.einsum("bhts,bshv->bthv", a, v_all).astype(v.dtype)
