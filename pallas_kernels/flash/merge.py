"""Joining attention over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.errors import ConfigError
from pallas_kernels.flash import rows
from pallas_kernels.flash.score import Score

SOFTMAX = Score()
Part = tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]  # as `flash(stats=True)` returns


def merge(parts: Sequence[Part], score: Score = SOFTMAX) -> Part:
    """Output and statistic of `flash` over all keys from those over disjoint parts of them. Differentiable.

    exp: o = Σ_n e^(L_n - L) o_n, L = log Σ_n e^(L_n) (arXiv 2205.14135, §3.1); others rescale by their row masses.

    Args:
      parts: (o, stats) of every part, each of them any number of keys, also none.
      score: the member they were computed with.

    Raises:
      ConfigError: no part, or exp with sum_plus_one, whose hidden logit every part would count.
    """
    if not parts:
        raise ConfigError("merge got no parts: give it at least one (o, stats).")
    outputs, stats = (jnp.stack([part[n] for part in parts]).astype(jnp.float32) for n in (0, 1))
    if score.activation != "exp":
        size = lambda mass: rows.divisor(rows.normaliser(mass, mass, score))
        total = jnp.sum(stats, axis=0)
        share = size(stats) / size(total)
    elif score.normaliser == "sum_plus_one":
        raise ConfigError(
            "merge cannot join parts of exp with sum_plus_one, each of which counts the hidden logit: compute one "
            "part with it, the others with 'sum', and merge them as 'sum'."
        )
    else:
        top = jax.lax.stop_gradient(jnp.max(stats, axis=0))
        total = top + jnp.log(jnp.sum(jnp.exp(score.power * (stats - top)), axis=0)) / score.power
        share = jnp.exp(stats - total)
    o = jnp.sum(share[..., None] * outputs, axis=0)
    return o.astype(parts[0][0].dtype), total
