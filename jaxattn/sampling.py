"""Choosing the next token from logits: greedy, temperature, top-k, top-p, min-p."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxattn.errors import ConfigError

# Where f32 has a reciprocal that is not flushed to zero: colder is greedy, hotter is no more uniform.
COLDEST = float(np.finfo(np.float32).tiny)
HOTTEST = 1 / COLDEST
LOWEST = np.iinfo(np.int32).min
LANES = 128  # weights are drawn by group first, then in the group: no running sum over a whole vocabulary


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose; the filters apply in the order top-k, top-p, min-p, all after the temperature."""

    temperature: float = 0.0
    """0 takes the most likely token (greedy)."""
    top_k: int = 0
    """Keep the k most likely tokens, and those as likely as the last of them; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probabilities sum to at least p (arXiv 1904.09751), never none."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the most likely one (arXiv 2407.01082)."""

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"temperature is {self.temperature} but must be 0 (greedy) or a positive number.")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, Integral) or not 0 <= self.top_k < 1 << 31:
            raise ConfigError(f"top_k is {self.top_k} but must be 0 (all) or a whole number up to {(1 << 31) - 1}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p} but must be above 0 and at most 1.")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p is {self.min_p} but must be from 0 to 1.")

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST

    def knobs(self) -> dict[str, np.ndarray]:
        """The options as scalars for `sample_rows`."""
        low = math.log(self.min_p) if self.min_p else -np.inf
        return {
            "temperature": np.asarray(0 if self.greedy else min(self.temperature, HOTTEST), np.float32),
            "top_k": np.asarray(self.top_k, np.int32),
            "top_p": np.asarray(self.top_p, np.float32),
            "low": np.asarray(low, np.float32),
        }


def sample(logits: Float[Array, "B N"], keys: Array, how: Sampling) -> Int[Array, "B"]:
    """One token a row; `keys` [B] are PRNG keys, one a row, so that a row does not depend on its neighbours.

    A logit that is NaN counts as -inf. Where all are, a greedy row takes token 0 and a drawn one any.
    """
    if how.greedy:
        return likeliest(logits)
    return sample_rows(logits, keys, **_every_row(how, len(logits)))


def sample_rows(
    logits: Float[Array, "B N"],
    keys: Array,
    temperature: Float[Array, "B"],
    top_k: Int[Array, "B"],
    top_p: Float[Array, "B"],
    low: Float[Array, "B"],
) -> Int[Array, "B"]:
    """`sample` with every row's own `Sampling.knobs`: one program for whatever requests come together.

    What no row asks for costs nothing, and filters cost only the rows that ask.
    """
    greedy = temperature == 0

    def draw() -> Array:
        plain = jnp.where(greedy, 0, top_k), jnp.where(greedy, 1, top_p), jnp.where(greedy, -jnp.inf, low)
        drawn = _drawn(jnp.exp(filtered_rows(logits, temperature, *plain)), keys)
        return jnp.where(greedy, likeliest(logits), drawn)

    return jax.lax.cond(jnp.all(greedy), lambda: likeliest(logits), draw)


def likeliest(logits: Float[Array, "B N"]) -> Int[Array, "B"]:
    """The first of the largest logits; by two plain reductions, which XLA's CPU backend makes faster than argmax."""
    logits = _numbers(logits)
    top = jnp.max(logits, axis=-1, keepdims=True)
    at = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return jnp.min(jnp.where(logits == top, at, logits.shape[-1]), axis=-1)


def filtered(logits: Float[Array, "B N"], how: Sampling) -> Float[Array, "B N"]:
    """Logits over the temperature, less the largest; -inf for tokens that the filters drop."""
    return filtered_rows(logits, **_every_row(how, len(logits)))


def filtered_rows(
    logits: Float[Array, "B N"],
    temperature: Float[Array, "B"],
    top_k: Int[Array, "B"],
    top_p: Float[Array, "B"],
    low: Float[Array, "B"],
) -> Float[Array, "B N"]:
    """`filtered` with every row's own `Sampling.knobs`."""
    scaled = _scaled(logits, temperature)
    return jnp.where(_kept(scaled, top_k, top_p, low), scaled, -jnp.inf)


def _every_row(how: Sampling, count: int) -> dict[str, Array]:
    return {name: jnp.full(count, x) for name, x in how.knobs().items()}


def _numbers(logits: Array) -> Array:
    return jnp.where(jnp.isnan(logits), -jnp.inf, logits.astype(jnp.float32))


def _scaled(logits: Array, temperature: Array) -> Array:
    """(logits - largest) / temperature: at most 0 and 0 at the largest, whatever the numbers are."""
    logits = _numbers(logits)
    top = jnp.max(logits, axis=-1, keepdims=True)
    below = (logits - top) / jnp.where(temperature == 0, 1, temperature)[:, None]
    return jnp.where((logits == top) | (below == 0), 0.0, below)  # no -0, whose code differs


def _kept(scaled: Array, top_k: Array, top_p: Array, low: Array) -> Bool[Array, "B N"]:
    """Which tokens pass the filters."""
    asked = ((top_k > 0) & (top_k < scaled.shape[-1])) | (top_p < 1) | (low > -jnp.inf)

    def row(args: tuple) -> Array:
        asks, *rest = args
        return jax.lax.cond(asks, lambda: _least(*rest), lambda: jnp.int32(LOWEST))

    # One after another on a CPU, so that a row that asks for nothing costs nothing.
    rows = lambda *args: jax.lax.map(row, args)
    least = jax.lax.cond(
        jnp.any(asked),
        lambda: jax.lax.platform_dependent(
            asked, scaled, top_k, top_p, low, cpu=rows, default=lambda *args: jax.vmap(lambda *a: row(a))(*args)
        ),
        lambda: jnp.full(len(scaled), LOWEST, jnp.int32),
    )
    return _code(scaled) >= least[:, None]


def _least(scaled: Array, top_k: Array, top_p: Array, low: Array) -> Array:
    """The code of the smallest number of one row [N] that all filters keep.

    No sort: a threshold is found bit by bit, each by one pass over the row.
    """
    code, weights = _code(scaled), jnp.exp(scaled)
    k = jnp.where(top_k == 0, scaled.shape[-1], top_k).astype(jnp.float32)
    least = jax.lax.cond(
        k < scaled.shape[-1],
        lambda: _largest(lambda at: jnp.sum((code >= at).astype(jnp.float32)) >= k),
        lambda: jnp.int32(LOWEST),
    )
    mass = lambda at: jnp.sum(jnp.where(code >= at, weights, 0))
    enough = top_p * mass(least)
    nucleus = lambda: _largest(lambda at: mass(jnp.maximum(at, least)) >= enough)
    least = jax.lax.cond(top_p < 1, lambda: jnp.maximum(least, nucleus()), lambda: least)
    return jnp.minimum(jnp.maximum(least, _code(low)), _code(jnp.float32(0)))  # the largest number is 0


def _code(x: Array) -> Int[Array, "..."]:
    """Integers in the order of the f32 numbers."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)


def _largest(holds: Callable[[Array], Array]) -> Array:
    """The largest i32 for which `holds`, which holds up to there and not beyond, and for the lowest."""

    def bit(i: Array, found: Array) -> Array:
        trial = jnp.where(i == 0, 0, found | (jnp.int32(1) << (31 - i)))
        return jnp.where(holds(trial), trial, found)

    return jax.lax.fori_loop(0, 32, bit, jnp.int32(LOWEST))


def _drawn(weights: Float[Array, "B N"], keys: Array) -> Int[Array, "B"]:
    """An index a row, in proportion to its weights."""
    count, size = weights.shape
    groups = jnp.pad(weights, ((0, 0), (0, -size % LANES))).reshape(count, -1, LANES)
    groups = jax.lax.optimization_barrier(groups)  # exp once, not in every consumer
    where, inside = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys).T
    group = _pick(jnp.sum(groups, axis=-1), where)
    own = jnp.take_along_axis(groups, group[:, None, None], axis=1)[:, 0]
    return group * LANES + _pick(own, inside)


def _pick(weights: Float[Array, "B n"], u: Float[Array, "B"]) -> Int[Array, "B"]:
    """The first index behind whose weight the running sum exceeds u of the total; never one of weight 0."""
    total = jnp.cumsum(weights, axis=-1)
    positive = weights > 0
    beyond = positive & (total > u[:, None] * total[:, -1:])
    last = weights.shape[-1] - 1 - jnp.argmax(positive[:, ::-1], axis=-1)  # where rounding leaves nothing beyond
    return jnp.where(jnp.any(beyond, axis=-1), jnp.argmax(beyond, axis=-1), last).astype(jnp.int32)
