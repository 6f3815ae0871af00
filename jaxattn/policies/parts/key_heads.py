"""Layers in which some key heads keep every token and the others the first and the newest ones.

Which heads these are is known when a program is made, because it decides how much is held: a text with one number a
layer, in hexadecimal, whose bit k says that key head k keeps all. `"7.0.3"` is layers of three, no and two such heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxattn.errors import ConfigError, shown
from jaxattn.masks import PADDING, Visibility
from jaxattn.mechanisms._protocol import Core
from jaxattn.policies._protocol import Site
from jaxattn.stores import Ring, overwrite, refill

Tokens = tuple[Array, Array, Array, Array]  # keys [B,S,K,D], values [B,S,K,V], places and segments [B,S]
ALL = "all"


def check_full(name: str, full: str) -> None:
    """Refuse what is no such text.

    Raises:
      ConfigError: naming the option.
    """
    if full in ("", ALL):
        return
    try:
        numbers = [int(number, 16) for number in full.split(".")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise ConfigError(
            f"{name}.full is {shown(full)} but must be {ALL!r} or a hexadecimal number a layer, such as '7.0.3': bit k "
            "for key head k."
        )


def written(full: np.ndarray) -> str:
    """The text of a table [L, K] of truth values."""
    return ".".join(f"{int(sum(1 << int(k) for k in np.flatnonzero(row))):x}" for row in full)


def full_heads(full: str, site: Site) -> tuple[int, ...]:
    """The key heads of a layer that keep all; a text of fewer layers begins again."""
    if full == ALL:
        return tuple(range(site.kv_heads))
    numbers = full.split(".")
    number = int(numbers[site.layer % len(numbers)], 16)
    return tuple(k for k in range(site.kv_heads) if number >> k & 1)


def rest(heads: tuple[int, ...], site: Site) -> tuple[int, ...]:
    """The other key heads."""
    return tuple(k for k in range(site.kv_heads) if k not in heads)


def unfit_full(full: str, site: Site) -> str:
    """Why a text does not fit a layer; "" where it does."""
    if full in ("", ALL):
        return ""
    numbers = full.split(".")
    if int(numbers[site.layer % len(numbers)], 16) >> site.kv_heads:
        return f"it has {site.kv_heads} key heads, but full names one beyond them; make the profile with this model."
    return ""


def differs(full: str) -> bool:
    """Whether layers are not all alike."""
    return len(set(full.split("."))) > 1


def query_heads(heads: Sequence[int], site: Site) -> tuple[int, ...]:
    """The query heads of key heads, in order."""
    group = site.heads // site.kv_heads
    return tuple(k * group + g for k in heads for g in range(group))


def of_key_heads(x: Array, heads: Sequence[int], site: Site) -> Array:
    """The queries [B, T, H, D], or keys or values [B, T, K, D], of some key heads."""
    index = list(heads) if x.shape[2] == site.kv_heads != site.heads else list(query_heads(heads, site))
    return x[:, :, np.asarray(index)]


def together(parts: Sequence[tuple[tuple[int, ...], Any]], core: Core, q: Array, vis: Visibility, site: Site) -> Array:
    """The output of all heads from (key heads, (o, statistic)) of groups of them."""
    parts = [part for part in parts if part[0]]
    order = np.argsort(np.asarray(query_heads([k for heads, _ in parts for k in heads], site)))
    in_order = lambda xs: None if xs[0] is None else jnp.concatenate(xs, axis=2)[:, :, order]
    return core.join([(in_order([p[1][0] for p in parts]), in_order([p[1][1] for p in parts]))], q, vis)


# ------------------------------------------------------------------------------------------ the first and the newest


def slot_of(place: Array, sinks: int, recent: Array | int) -> Array:
    """Where in a ring of `sinks` + `recent` + 1 slots the token of a row's place lies."""
    return jnp.where(place < sinks, place, sinks + (place - sinks) % (recent + 1))


def held(ring: Ring, like: Array) -> Tokens:
    """All that is in a ring."""
    return ring.keys.astype(like.dtype), ring.values.astype(like.dtype), ring.positions, ring.segments


def kept(ring: Ring, new: Tokens, count: Int[Array, "B T"], sinks: int, recent: Array | int) -> Ring:
    """The ring behind T new tokens; `count`: tokens of a row up to and with each; recent: a number or one a row [B]."""
    at = new[2]
    if at.shape[1] == 1:  # padding goes where the next token will: in a slot that nobody reads any more
        slot = slot_of(at[:, 0], sinks, recent)
        return overwrite(ring, jnp.minimum(slot, ring.slots - 1), *new)
    size = jnp.broadcast_to(jnp.asarray(recent) + 1, len(at))[:, None]
    slots, last = jnp.arange(ring.slots), count[:, -1:] - 1
    newest = last - (last - slots) % size  # of the places that belong in a slot behind the sinks
    wanted = jnp.where(slots < sinks, slots, jnp.where(slots < sinks + size, newest, -1))
    wanted = jnp.where((slots >= sinks) & (wanted < sinks), -1, wanted)
    return refill(ring, jnp.where(wanted < 0, -1, place_in_piece(wanted, at, count)), *new)


def place_in_piece(wanted: Int[Array, "B S"], at: Int[Array, "B T"], count: Int[Array, "B T"]) -> Int[Array, "B S"]:
    """Where in the piece the token of a row's place `wanted` is; -1: not in it."""
    place = jax.vmap(jnp.searchsorted)(count, wanted + 1)  # the first that has so many up to it
    return jnp.where((wanted < at[:, :1]) | (wanted >= count[:, -1:]), -1, place)


def attend_first_and_newest(
    attend: Callable[..., Any], merge: Callable[..., Any], q: Array, before: Ring, behind: Ring, new: Tokens,
    segments: Array, *, sinks: int, recent: int, window: int | None,
) -> tuple[Array, Array | None]:  # fmt: skip
    """(o, statistic) of T queries, of which token t sees the first `sinks` and the `recent` newest before it.

    Args:
      attend: for the heads of q [B, T, H, D]. before, behind: the ring without and with the `new` tokens.
      window: of the layer, in positions.
    """
    at = new[2]
    if at.shape[1] == 1:
        keys, values, places, owners = held(behind, new[0])
        return attend(q, keys, values, Visibility(at, places, segments, owners, window=window))
    far = [x[:, :sinks] for x in held(behind, new[0])]
    near = [jnp.concatenate([x[:, sinks:], y], axis=1) for x, y in zip(held(before, new[0]), new, strict=True)]
    owners = jnp.where(near[2] < sinks, PADDING, near[3])
    newest = min(recent + 1, window or recent + 1)
    parts = [attend(q, *near[:2], Visibility(at, near[2], segments, owners, window=newest))]
    if sinks:
        parts.append(attend(q, *far[:2], Visibility(at, far[2], segments, far[3], window=window)))
    return merge(parts)
