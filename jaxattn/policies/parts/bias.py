"""Methods that multiply the weights of some columns of attention: in score space, around any way to keep keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.errors import ConfigError
from jaxattn.masks import PADDING, Visibility
from jaxattn.mechanisms._protocol import Core
from jaxattn.policies._protocol import Site


def check_factor(name: str, factor: float, first: int, last: int) -> None:
    """Refuse a factor, `name` as "policy.option", or layers that are none; last -1 is the model's last.

    Raises:
      ConfigError: naming the option.
    """
    policy = name.split(".", maxsplit=1)[0]
    if not (factor > 0 and math.isfinite(factor)):
        raise ConfigError(f"{name} is {factor} but must be positive and finite, such as 2.0 or 0.5.")
    if first < 0 or last < -1 or (last != -1 and last < first):
        raise ConfigError(
            f"{policy}.first {first} and last {last} must be layers in order, counted from 0; last=-1 is the model's "
            "last."
        )


def unfit_layers(spec: Any, site: Site) -> str:
    """Why the layers `spec.first` to `spec.last` are not all in the model; "" where they are."""
    last = site.num_layers - 1
    if max(spec.first, spec.last) > last:
        return f"it has layers 0 to {last}, so first={spec.first} and last={spec.last} must be among them."
    return ""


def log_factor(spec: Any, site: Site, factor: float, table: Array | None) -> Float[Array, "n"] | None:
    """Its logarithm, n = 1, or that of the head table [H]; None in layers where nothing changes."""
    last = site.num_layers - 1 if spec.last == -1 else spec.last
    if not spec.first <= site.layer <= last or (table is None and factor == 1.0):
        return None
    return jnp.full(1, math.log(factor)) if table is None else jnp.log(table)


def scaled(core: Core, name: str, site: Site, log_by: Float[Array, "n"], chosen: Callable[[Array], Array]) -> Core:
    """The core with the weights of some columns times a factor: its logarithm is added to their scores.

    Args:
      log_by: [1 or H].
      chosen: which keys, 1 or 0, of their positions [N, 1 or K or H, S]; -1 is padding.

    Raises:
      ConfigError: weights that are no function of the score alone.
    """
    if core.activation not in ("exp", "sigmoid"):
        raise ConfigError(
            f"policy {name} multiplies weights through the logarithm of their scores, which {site.mechanism} does not "
            "take; use a softmax or sigmoid model."
        )

    def make(attend: Callable[..., Any], some: tuple[int, ...] | None) -> Callable[..., Any]:
        own_log = log_by if some is None or len(log_by) == 1 else log_by[jnp.asarray(some)]

        def changed(
            q: Array,
            k: Array,
            v: Array,
            vis: Visibility,
            *,
            key_bias: Array | None = None,
            places: Array | None = None,
            folded: bool = False,
            **how: Any,
        ) -> tuple[Array, Array | None]:
            own_places = jnp.where(vis.k_segments != PADDING, vis.k_positions, -1)[:, None]
            column = chosen(own_places if places is None else places)
            factor = jnp.tile(own_log, q.shape[0] // len(own_log))[:, None, None] if folded else own_log[:, None]
            own = joined(column, factor, jnp.multiply, heads=q.shape[2])
            key_bias = own if key_bias is None else joined(key_bias, own, jnp.add, heads=q.shape[2])
            return attend(q, k, v, vis, key_bias=key_bias, places=places, folded=folded, **how)

        return changed

    return core.around(make)


def joined(
    a: Float[Array, "*a"], b: Float[Array, "*b"], how: Callable[[Array, Array], Array], *, heads: int
) -> Float[Array, "*c"]:
    """how(a, b) of arrays [..., 1 or K or H, S], where H = `heads` is a multiple of K."""
    if 1 < a.shape[-2] != b.shape[-2] > 1:
        spread = lambda x: jnp.repeat(x, heads // x.shape[-2], axis=-2)
        a, b = spread(a), spread(b)
    return how(a, b)
