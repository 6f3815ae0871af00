"""RazorAttention: retrieval heads keep every token; the others drop most, but not what these were on average.

RazorAttention: Efficient KV Cache Compression Through Retrieval Heads (arXiv 2407.15891).

A prompt of N tokens is read whole. Then a head that is no retrieval head keeps its first `sinks` tokens and its newest
max(`least`, N / `part`), and folds the N_d others into one compensation token, means of keys and values:

    k̂ = (1/N_d) Σ k_n,  v̂ = (1/N_d) Σ v_n,  and log N_d is added to its score: it stands for N_d tokens

Retrieval heads are the `induction` share of heads that attend most to the token behind an earlier occurrence of theirs,
and the `echo` share of those that attend most to that occurrence; over the whole model, and a key head is one if some
of its query heads is. Both scores are head tables [L, H] that `python -m evals.heads` writes. Nothing of the text
decides what is kept, so a later question finds the same cache.

Tokens of an answer push older ones out of the newest, into the running mean, of which the paper says nothing. Keys are
averaged as rotated for their places, which keeps what turns slowly. By Jensen's inequality the compensation token gets
at most the attention that the dropped ones would get.

Deviations: where weights are sigmoids, log N_d is added to the score just the same, which multiplies small weights by
N_d. compensate=False drops instead, as a control. Left out: models with ALiBi, whose heads' lengths the paper bounds.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int

from jaxattn.errors import ConfigError
from jaxattn.masks import PADDING, Visibility
from jaxattn.mechanisms._protocol import Core
from jaxattn.policies import dense
from jaxattn.policies._protocol import Policy, Site
from jaxattn.policies.parts import key_heads
from jaxattn.policies.parts.key_heads import ALL, full_heads, held, of_key_heads, query_heads, rest, together
from jaxattn.stores import empty_cache, empty_ring
from jaxattn.types import Leaf

INDUCTION, ECHO = "induction", "echo"
NEVER = -1e30


@dataclasses.dataclass(frozen=True)
class Spec:
    """sinks, least, part: of what other heads keep. compensate: whether the rest is one token, or gone.

    full: the key heads that keep all, as `jaxattn.policies.parts.key_heads` writes them, or "all"; "" is filled in from
    the head tables, of which the shares `induction` and `echo` of all heads are protected.
    """

    induction: float = 0.14
    echo: float = 0.01
    sinks: int = 4
    least: int = 4000
    part: float = 5.0
    compensate: bool = True
    full: str = ""

    def __post_init__(self) -> None:
        for name in (INDUCTION, ECHO):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"razor.{name} is {getattr(self, name)} but must be a share from 0 to 1.")
        if self.sinks < 0:
            raise ConfigError(f"razor.sinks is {self.sinks} but must be 0 or more.")
        if self.least < 1:
            raise ConfigError(f"razor.least is {self.least} but must be at least 1 token.")
        if not self.part >= 1:
            raise ConfigError(f"razor.part is {self.part} but must be at least 1: the newest are 1/part of a prompt.")
        key_heads.check_full("razor", self.full)

    def newest(self, length: Any) -> Any:
        """Newest tokens that are kept of a prompt of `length`."""
        if isinstance(length, int):
            return max(self.least, math.ceil(length / self.part))
        return jnp.maximum(self.least, jnp.ceil(length / self.part).astype(jnp.int32))


@struct.dataclass
class State:
    """What retrieval heads keep and what the others do (None: there are none).

    full: all tokens. ring: first and newest. keys, values: sums of what was dropped, f32. dropped: how many that were.
    newest: how many newest tokens a row keeps. length: tokens of a row so far.
    """

    full: Leaf  # KVCache
    ring: Leaf  # Ring of sinks + most newest + 1 slots
    keys: Leaf  # [B, K', D]
    values: Leaf  # [B, K', V]
    dropped: Leaf  # [B]
    newest: Leaf  # [B]
    length: Leaf  # [B]


def settle(spec: Spec, tables: dict[str, Any], kv_heads: int) -> Spec:
    """The key heads with one of the largest induction or echo scores."""
    if spec.full or not (INDUCTION in tables and ECHO in tables):
        return spec
    chosen = False
    for name in (INDUCTION, ECHO):
        scores, share = np.asarray(tables[name], np.float64), getattr(spec, name)
        order = np.argsort(-scores, axis=None, kind="stable")[: int(np.ceil(share * scores.size - 1e-9))]
        top = np.zeros(scores.size, bool)
        top[order] = True
        chosen = top.reshape(len(scores), kv_heads, -1).any(axis=2) | chosen
    return dataclasses.replace(spec, full=key_heads.written(np.asarray(chosen)))


def init(spec: Spec, site: Site, *, batch: int, capacity: int) -> State:
    """Room for `capacity` tokens of retrieval heads, and for first and newest of the others."""
    full = full_heads(spec.full, site)
    others = len(rest(full, site))
    dims = {"key_dim": site.key_dim, "value_dim": site.value_dim, "dtype": site.dtype, "batch": batch}
    slots = spec.sinks + min(capacity, spec.newest(capacity)) + 1
    count = jnp.zeros(batch, jnp.int32)
    return State(
        full=empty_cache(capacity=capacity, kv_heads=len(full), **dims) if full else None,
        ring=empty_ring(slots=slots, kv_heads=others, **dims) if others else None,
        keys=jnp.zeros((batch, others, site.key_dim), jnp.float32) if others else None,
        values=jnp.zeros((batch, others, site.value_dim), jnp.float32) if others else None,
        dropped=count,
        newest=count + spec.least,
        length=count,
    )


def step(
    state: State, q: Array, k: Array, v: Array, here: Any, *, spec: Spec, site: Site, core: Core
) -> tuple[Array, State, Any]:
    q, k = core.queries(q), core.keys(k)
    full = full_heads(spec.full, site)
    others, own = rest(full, site), lambda x, heads: of_key_heads(x, heads, site)
    segments, live = here.segments, here.segments != PADDING
    count = state.length[:, None] + jnp.cumsum(live, axis=1, dtype=jnp.int32)
    new = (k, v, count - live, segments)
    vis = Visibility(here.positions, here.positions, segments, segments, aligned=0)
    parts, cache = [], state.full
    if full:
        mapped = dataclasses.replace(core, keys=lambda k: k)
        cache, (keys, values, rules) = dense.kept(cache, own(k, full), own(v, full), here, site, mapped)
        o, stat = core.of(query_heads(full, site))(own(q, full), keys, values, rules)
        parts.append((full, (dense.poisoned(o, cache), stat)))
    after = dataclasses.replace(state, full=cache, length=count[:, -1])
    if others:
        attend, some = core.of(query_heads(others, site)), own(q, others)
        mine = (own(k, others), own(v, others), *new[2:])
        if here.phase == "prompt" and q.shape[1] > 1:
            o, stat = attend(some, *mine[:2], vis)
            o = jnp.where((state.length > 0)[:, None, None, None], jnp.nan, o)  # a second piece is no answer
            after = _compressed(after, mine, count, spec)
            parts.append((others, (o, stat)))
        else:
            cut = lambda t: tuple(x[:, None] for x in t)

            def one(state: State, token: list[Array]) -> tuple[State, Any]:
                q, k, v, at, segments, count = token
                each = cut((k, v, at, segments))
                state = _pushed(state, each, count, spec)
                o, stat = _read(state, q[:, None], each, spec, attend)
                return state, (o[:, 0], None if stat is None else stat[:, 0])

            after, out = jax.lax.scan(one, after, [jnp.swapaxes(x, 0, 1) for x in (some, *mine, count)])
            o, stat = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), out)
            parts.append((others, (o, stat)))
    return together(parts, core, q, vis, site), after, here.carry


def _compressed(state: State, new: key_heads.Tokens, count: Int[Array, "B T"], spec: Spec) -> State:
    """What is left of a prompt: the ring, and the means of the rest."""
    k, v, at, segments = new
    newest = spec.newest(count[:, -1])
    gone = (segments != PADDING) & (at >= spec.sinks) & (at < count[:, -1:] - newest[:, None] - 1)
    total = lambda x: jnp.einsum("bt,btkd->bkd", gone.astype(jnp.float32), x.astype(jnp.float32))
    return dataclasses.replace(
        state,
        ring=key_heads.kept(state.ring, new, count, spec.sinks, newest),
        keys=total(k),
        values=total(v),
        dropped=jnp.sum(gone, axis=1, dtype=jnp.int32),
        newest=newest,
    )


def _pushed(state: State, new: key_heads.Tokens, count: Int[Array, "B"], spec: Spec) -> State:
    """One more token of a row; the one in whose slot it goes becomes a part of the means."""
    at, ring = new[2], state.ring
    slot = jnp.minimum(key_heads.slot_of(at[:, 0], spec.sinks, state.newest), ring.slots - 1)
    cut = lambda x: jnp.take_along_axis(x, slot.reshape(-1, *[1] * (x.ndim - 1)), axis=1)[:, 0]
    gone = (cut(ring.segments) != PADDING) & (at[:, 0] >= spec.sinks)
    added = lambda total, x: total + jnp.where(gone[:, None, None], cut(x).astype(jnp.float32), 0.0)
    return dataclasses.replace(
        state,
        ring=key_heads.kept(ring, new, count[:, None], spec.sinks, state.newest),
        keys=added(state.keys, ring.keys),
        values=added(state.values, ring.values),
        dropped=state.dropped + gone,
    )


def _read(state: State, q: Array, new: key_heads.Tokens, spec: Spec, attend: Any) -> tuple[Array, Array | None]:
    """(o, statistic) of one token over the ring and the compensation token."""
    keys, values, places, owners = held(state.ring, new[0])
    count = jnp.maximum(state.dropped, 1)[:, None, None]
    mean = lambda total, like: (total / count)[:, None].astype(like.dtype)
    front = lambda x, y: jnp.concatenate([y, x], axis=1)
    there = (state.dropped > 0)[:, None] & spec.compensate
    k, v = front(keys, mean(state.keys, keys)), front(values, mean(state.values, values))
    places, owners = front(places, new[2]), front(owners, jnp.where(there, new[3], PADDING))
    bias = jnp.pad(jnp.log(count.astype(jnp.float32)), ((0, 0), (0, 0), (0, keys.shape[1])))
    o, stat = attend(q, k, v, Visibility(new[2], places, new[3], owners), key_bias=bias)
    lost = key_heads.slot_of(new[2], spec.sinks, state.newest[:, None]) >= state.ring.slots
    return jnp.where(lost[..., None, None], jnp.nan, o), stat


def unfit(spec: Spec, site: Site) -> str:
    if not spec.full:
        return (
            f"it is not said which heads keep all: name a file with the head tables {INDUCTION!r} and {ECHO!r} "
            "(--heads FILE, made by python -m evals.heads), or set full."
        )
    return key_heads.unfit_full(spec.full, site)


def read(spec: Spec, site: Site, length: int) -> float:
    """Keys a new token reads behind `length` others, on average over key heads; the compensation token is one."""
    share = len(full_heads(spec.full, site)) / site.kv_heads
    others = min(length + 1, spec.sinks + spec.newest(length) + 1 + spec.compensate)
    return share * (length + 1) + (1 - share) * others


POLICY = Policy(
    name="razor",
    title="RazorAttention",
    arxiv="2407.15891",
    keeps="of retrieval heads all, of the others first and newest tokens and the mean of the rest",
    reads="all kept, the mean as so many tokens",
    spec=Spec,
    init=init,
    step=step,
    depth=lambda spec: key_heads.differs(spec.full),
    one_piece=lambda spec: True,
    read=read,
    settle=settle,
    unfit=unfit,
    unlimited=lambda spec, length: dataclasses.replace(spec, full=ALL),
    variants=(
        Spec(full="1", sinks=2, least=5),
        Spec(full="2.0", sinks=0, least=3, part=6.0),
        Spec(full="2", sinks=1, least=4, compensate=False),
    ),
)
