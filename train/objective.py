"""Next-token cross-entropy over the tokens that count, without ever holding [B·T, N] logits."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CHUNK = 1024  # tokens whose logits exist at one time


def cross_entropy(
    hidden: Float[Array, "B T E"],
    unembedding: Float[Array, "E N"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    chunk: int = CHUNK,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of -log p(target) in nats over masked-in tokens, and their count.

    Logits live for one chunk of tokens. Under differentiation both gradients are formed in the same
    pass, while the chunk's logits are there; nothing of size N is kept per token.
    """
    tokens = targets.size
    chunk = min(chunk, tokens)
    pad = -tokens % chunk
    x, y = hidden.reshape(tokens, -1), targets.reshape(tokens)
    w = mask.reshape(tokens).astype(jnp.float32)
    if pad:
        x, y, w = jnp.pad(x, ((0, pad), (0, 0))), jnp.pad(y, (0, pad)), jnp.pad(w, (0, pad))
    return _summed(x, unembedding, y, w, chunk), jnp.sum(w)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _summed(x: Array, kernel: Array, y: Array, w: Array, chunk: int) -> Array:
    def one(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        xc, yc, wc = part
        logits = _logits(xc, kernel)
        return total + jnp.sum(wc * (jax.nn.logsumexp(logits, axis=-1) - _pick(logits, yc))), None

    return jax.lax.scan(one, jnp.zeros((), jnp.float32), _chunks((x, y, w), chunk))[0]


def _summed_forward(x: Array, kernel: Array, y: Array, w: Array, chunk: int):
    def one(carry, part):
        total, d_kernel = carry
        xc, yc, wc = part
        logits = _logits(xc, kernel)
        top = jnp.max(logits, axis=-1, keepdims=True)
        e = jax.lax.optimization_barrier(jnp.exp(logits - top))  # stored once, used twice
        mass = jnp.sum(e, axis=-1, keepdims=True)
        loss = jnp.sum(wc * ((jnp.log(mass) + top)[:, 0] - _pick(logits, yc)))
        hot = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == yc[:, None]
        d = (wc[:, None] * (e / mass - hot)).astype(xc.dtype)
        dx = jnp.einsum("tn,en->te", d, kernel.astype(xc.dtype), preferred_element_type=jnp.float32)
        transposed = jax.lax.optimization_barrier(xc.T)  # a row-major product: faster on XLA's CPU
        dw = jnp.matmul(transposed, d, preferred_element_type=jnp.float32)
        return (total + loss, d_kernel + dw), dx.astype(xc.dtype)

    zero = (jnp.zeros((), jnp.float32), jnp.zeros(kernel.shape, jnp.float32))
    (total, d_kernel), dx = jax.lax.scan(one, zero, _chunks((x, y, w), chunk))
    return total, (dx.reshape(x.shape), d_kernel.astype(kernel.dtype))


def _summed_backward(chunk: int, residuals: tuple[Array, Array], g: Array):
    dx, d_kernel = residuals
    return (g * dx).astype(dx.dtype), (g * d_kernel).astype(d_kernel.dtype), None, None


_summed.defvjp(_summed_forward, _summed_backward)


def _chunks(arrays: tuple[Array, Array, Array], chunk: int) -> tuple[Array, Array, Array]:
    x, y, w = (a.reshape(-1, chunk, *a.shape[1:]) for a in arrays)
    return x, y, w


def _logits(x: Array, kernel: Array) -> Array:
    return jnp.einsum("te,en->tn", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)


def _pick(logits: Array, y: Array) -> Array:
    return jnp.take_along_axis(logits, y[:, None], axis=-1)[:, 0]


def token_losses(logits: Float[Array, "B T N"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """-log p(target) of every token, for evaluation."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked
