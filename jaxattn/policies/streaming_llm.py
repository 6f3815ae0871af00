"""StreamingLLM: the first tokens of a text and its newest (Efficient Streaming Language Models with Attention Sinks,
arXiv 2309.17453).

Token t (from 0, in its row) reads S `sinks`, W `recent` tokens and itself:

    M[t, j] = j <= t and (j < S or t - j <= W)

which is the paper's released loop: it cuts its cache to S + W tokens behind a step, so a step reads S + W + 1.

Positions are those in the cache, not in the text: the gap between sinks and window is closed. Keys are rotated once, at
their place in the text. A query has two rotations, which is the same as turning the whole cache anew, since scores know
distances alone:

    R(t) q                  for recent keys, whose distance is the true one
    R(min(t, S + W)) q      for sinks, whose place in the text is their place in the cache

Score biases and a layer's own sliding window count in the same two ways. Learned tokens in front of the stream are the
first of the sinks. What is kept does not grow with the text.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from jaxattn.errors import ConfigError
from jaxattn.masks import PADDING, Visibility
from jaxattn.mechanisms._protocol import Core
from jaxattn.policies._protocol import Policy, Site
from jaxattn.policies.parts.key_heads import Tokens, held, place_in_piece
from jaxattn.rope import rotate
from jaxattn.stores import Ring, empty_ring, overwrite, refill
from jaxattn.types import Leaf


@dataclasses.dataclass(frozen=True)
class Spec:
    """sinks: S, first tokens that are kept for good. recent: W, newest tokens besides the one that reads.

    shift: positions are those in the cache; False counts them in the text, of which a model knows as many as it was
    trained on.
    """

    sinks: int = 4
    recent: int = 1020
    shift: bool = True

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ConfigError(f"streaming.sinks is {self.sinks} but must be 0 or more.")
        if self.recent < 1:
            raise ConfigError(f"streaming.recent is {self.recent} but must be at least 1.")

    @property
    def keys(self) -> int:
        """Most keys that a token reads."""
        return self.sinks + self.recent + 1


@struct.dataclass
class State:
    """The first tokens (None without any), the newest, and how many a row had so far."""

    sinks: Leaf  # Ring of `sinks` slots
    ring: Leaf  # Ring of `recent` + 1
    length: Leaf  # [B]


def window_of(spec: Spec, site: Site) -> int:
    """Newest tokens that a token reads, itself included."""
    return min(spec.recent + 1, site.window or spec.recent + 1)


def init(spec: Spec, site: Site, *, batch: int, capacity: int) -> State:
    """An empty state; its size does not depend on `capacity`."""
    ring = lambda slots: empty_ring(
        batch=batch,
        slots=slots,
        kv_heads=site.kv_heads,
        key_dim=site.key_dim,
        value_dim=site.value_dim,
        dtype=site.dtype,
    )
    sinks = ring(spec.sinks) if spec.sinks else None
    return State(sinks, ring(window_of(spec, site)), jnp.zeros(batch, jnp.int32))


def step(
    state: State, q: Array, k: Array, v: Array, here: Any, *, spec: Spec, site: Site, core: Core
) -> tuple[Array, State, Any]:
    """A single token is written and then reads; of several each still needs keys that the last of them overwrites."""
    segments, live = here.segments, here.segments != PADDING
    count = state.length[:, None] + jnp.cumsum(live, axis=1, dtype=jnp.int32)
    at = count - live  # tokens before each, which is its place
    placed = jnp.minimum(at, spec.sinks + spec.recent) if spec.shift else at
    near, far = q, q
    if site.rope is not None:
        tables = site.rope.exact_tables(at, site.key_dim)
        k, near = rotate(k, tables), rotate(q, tables)
        far = rotate(q, site.rope.exact_tables(placed, site.key_dim))
    k, near, far = core.keys(k), core.queries(near), core.queries(far)

    new = (k, v, at, jnp.where(at < spec.sinks, PADDING, segments))
    ring = _turned(state.ring, new, count, spec.sinks)
    read = held(ring, k)
    if k.shape[1] > 1:
        read = tuple(jnp.concatenate(pair, axis=1) for pair in zip(held(state.ring, k), new, strict=True))
    vis = Visibility(at, read[2], segments, read[3], window=window_of(spec, site))
    if not spec.sinks:
        parts = [core.attend(near, *read[:2], vis, stats=not core.alone)]
        return core.join(parts, far, vis), State(None, ring, count[:, -1]), here.carry
    sinks = _filled(state.sinks, (k, v, at, segments), count)
    first = held(sinks, k)
    beside = Visibility(placed, first[2], segments, first[3], window=site.window)
    parts = [core.attend(near, *read[:2], vis), core.attend(far, *first[:2], beside)]
    return core.join(parts, far, beside), State(sinks, ring, count[:, -1]), here.carry


def _turned(ring: Ring, new: Tokens, count: Int[Array, "B T"], sinks: int) -> Ring:
    """The newest tokens behind T `new` ones; `count`: tokens of a row up to and with each."""
    at = new[2]
    if at.shape[1] == 1:  # padding goes where the next token will: in a slot that nobody reads any more
        return overwrite(ring, jnp.maximum(at[:, 0] - sinks, 0) % ring.slots, *new)
    last = count[:, -1:] - 1 - sinks
    wanted = last - (last - jnp.arange(ring.slots)) % ring.slots  # the newest that belongs in each slot
    return refill(ring, jnp.where(wanted < 0, -1, place_in_piece(wanted + sinks, at, count)), *new)


def _filled(ring: Ring, new: Tokens, count: Int[Array, "B T"]) -> Ring:
    """The first tokens, where some of T `new` ones belong to them."""
    at, size = new[2], ring.slots
    if at.shape[1] == 1:
        return overwrite(ring, jnp.minimum(at[:, 0], size - 1), *new, keep=at[:, 0] >= size)
    wanted = jnp.broadcast_to(jnp.arange(size), (len(at), size))
    return refill(ring, place_in_piece(wanted, at, count), *new)


def unfit(spec: Spec, site: Site) -> str:
    """Why a layer cannot stream."""
    rope, most = site.rope, f"sinks={spec.sinks}, recent={spec.recent} and the token itself are {spec.keys} positions"
    if site.position in ("learned", "sinusoid"):
        return f"position {site.position!r} is in its input, so keys have no place but that in the text."
    if rope is not None and rope.scaling.by_length:
        return f"rope_scaling.kind {rope.scaling.kind!r} turns keys by the length of the text, which has no end here."
    if rope is not None and site.maps:
        return "its feature map comes behind the rotation, so that its keys cannot be moved."
    if spec.sinks < site.front:
        return (
            f"the model was trained with {site.front} learned tokens in front, which sinks={spec.sinks} would lose; "
            f"use sinks of at least {site.front}."
        )
    if site.trained and spec.keys > site.trained:
        return f"{most}, more than the {site.trained} it was trained on; {_less(spec, site.trained)}."
    return ""


def _less(spec: Spec, trained: int) -> str:
    left = trained - spec.sinks - 1
    return f"use recent of at most {left}" if left > 0 else "use fewer sinks"


def unlimited(spec: Spec, length: int) -> Spec:
    """Room for `length` tokens, and for no more positions than these."""
    sinks = min(spec.sinks, max(0, length - 2))
    return dataclasses.replace(spec, sinks=sinks, recent=max(1, length - 1 - sinks))


def read(spec: Spec, site: Site, length: int) -> float:
    """Keys a new token reads behind `length` others."""
    return float(min(length + 1, spec.keys, site.window or spec.keys))


POLICY = Policy(
    name="streaming",
    title="StreamingLLM (attention sinks and a window)",
    arxiv="2309.17453",
    keeps="first `sinks` and newest `recent` tokens",
    reads="all kept, at their places in the cache",
    spec=Spec,
    init=init,
    step=step,
    rotates=True,
    bounded=True,
    windows=True,
    biased=True,
    front=True,
    reach=lambda spec, trained: 0 if spec.shift else trained,
    read=read,
    unfit=unfit,
    unlimited=unlimited,
    variants=(Spec(sinks=2, recent=5), Spec(sinks=0, recent=7)),
)
