"""Choosing the next token from logits: greedy, temperature, top-k, top-p, min-p."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose; the filters apply in the order top-k, top-p, min-p, all after the temperature."""

    temperature: float = 0.0
    """0 takes the most likely token (greedy)."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probabilities sum to at least p (arXiv 1904.09751)."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the most likely one (arXiv 2407.01082)."""

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"temperature is {self.temperature} but must be 0 (greedy) or a positive number.")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k} but must be 0 (all) or positive.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p} but must be above 0 and at most 1.")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p is {self.min_p} but must be from 0 to 1.")


def filtered(logits: Float[Array, "B N"], how: Sampling) -> Float[Array, "B N"]:
    """Logits over the temperature, -inf for tokens that the filters drop; the likeliest always stays."""
    logits = logits.astype(jnp.float32) / how.temperature
    if how.top_k and how.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, how.top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if how.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        least = jnp.min(jnp.where(before < how.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if how.min_p:
        top = jnp.max(logits, axis=-1, keepdims=True)
        logits = jnp.where(logits < top + math.log(how.min_p), -jnp.inf, logits)
    return logits


def sample(logits: Float[Array, "B N"], keys: Array, how: Sampling) -> Int[Array, "B"]:
    """One token a row; `keys` [B] are PRNG keys, one a row, so that a row does not depend on its neighbours."""
    if how.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, filtered(logits, how)).astype(jnp.int32)


def sample_rows(
    logits: Float[Array, "B N"],
    keys: Array,
    temperature: Float[Array, "B"],
    top_k: Int[Array, "B"],
    top_p: Float[Array, "B"],
    min_p: Float[Array, "B"],
) -> Int[Array, "B"]:
    """`sample` with every row's own options: one program for whatever requests come together."""
    greedy = temperature == 0
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Array:
        """The filters of `filtered`, by one sort a row."""
        scaled = logits.astype(jnp.float32) / jnp.where(greedy, 1.0, temperature)[:, None]
        ordered = jnp.sort(scaled, axis=-1, descending=True)
        size = ordered.shape[-1]
        k = jnp.where((top_k == 0) | (top_k > size), size, top_k)
        kept = jnp.arange(size) < k[:, None]
        p = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf), axis=-1)
        before = jnp.cumsum(p, axis=-1) - p
        kept &= (before < top_p[:, None]) | (top_p[:, None] >= 1)
        kept &= ordered >= ordered[:, :1] + jnp.log(min_p)[:, None]
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        drawn = jax.vmap(jax.random.categorical)(keys, jnp.where(scaled < least, -jnp.inf, scaled))
        return jnp.where(greedy, best, drawn.astype(jnp.int32))

    return jax.lax.cond(jnp.all(greedy), lambda: best, draw)
