"""x @ w, with a weight gradient that suits the platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

store = jax.lax.optimization_barrier  # keeps an explicit transpose from being folded into the product


@jax.custom_vjp
def linear(x: Float[Array, "n i"], w: Float[Array, "i o"]) -> Float[Array, "n o"]:
    """The plain product. Only its gradient is special: dw = xᵀ g contracts the first axis of both, which
    XLA's CPU backend gives to a slower library than row-major products; there the narrower operand is
    turned first.
    """
    return x @ w


def _backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = saved
    dw = jax.lax.platform_dependent(x, g, cpu=_weight_gradient_cpu, default=lambda x, g: x.T @ g)
    return g @ w.T, dw


def _weight_gradient_cpu(x: Array, g: Array) -> Array:
    if x.shape[1] > g.shape[1]:
        return store(jnp.matmul(store(g.T), x)).T
    return jnp.matmul(store(x.T), g)


linear.defvjp(lambda x, w: (x @ w, (x, w)), _backward)
