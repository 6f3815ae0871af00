"""DuoAttention: retrieval heads keep every token, streaming heads the first tokens and the newest.

DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads (arXiv 2410.10819).

    retrieval head    M[t, j] = j <= t
    streaming head    M[t, j] = j <= t and (j < S or t - j <= W)      S `sinks`, W `recent`

Which key heads are which is learned (`jaxattn.analysis.duo_gates`): a gate α of every key head mixes both, frozen
weights, and heads whose α reaches the quantile `sparsity` over the whole model keep all. Keys stay rotated for their
places in the text, so the model's context is the limit. A text of heads or the head table `duo` [L, H] says it.

    twins=True    o = α o^F + (1 - α) o^stream for the second half of a batch's rows, o^F being the output of the same
                  row of the first half, which attends to all: the form that the gates are trained in

Deviations: in a prompt a streaming head sees just this, too; the released code lets it see its whole chunk, of 32,000
tokens, which prompt="dense" does (a prompt is then read in one piece). Windows are exact in training too, where it has
blocks of 128.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array

from jaxattn.errors import ConfigError
from jaxattn.masks import PADDING, Visibility
from jaxattn.mechanisms._protocol import Core
from jaxattn.policies import dense
from jaxattn.policies._protocol import Policy, Site
from jaxattn.policies.parts import key_heads
from jaxattn.policies.parts.key_heads import ALL, full_heads, of_key_heads, query_heads, rest, together
from jaxattn.stores import empty_cache, empty_ring
from jaxattn.types import Leaf

TABLE = "duo"
PROMPTS = ("stream", "dense")


@dataclasses.dataclass(frozen=True)
class Spec:
    """sinks, recent: S and W of streaming heads. prompt: "stream", or "dense": these heads see a prompt whole.

    full: the key heads that keep all, as `jaxattn.policies.parts.key_heads` writes them, or "all"; "" is filled in from
    the head table. sparsity: the share of key heads that stream, where the table says which.
    """

    sparsity: float = 0.5
    sinks: int = 64
    recent: int = 256
    prompt: str = "stream"
    full: str = ""
    twins: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            raise ConfigError(f"duo.sparsity is {self.sparsity} but must be a share from 0 to 1.")
        if self.sinks < 0:
            raise ConfigError(f"duo.sinks is {self.sinks} but must be 0 or more.")
        if self.recent < 1:
            raise ConfigError(f"duo.recent is {self.recent} but must be at least 1.")
        if self.prompt not in PROMPTS:
            raise ConfigError(f"duo.prompt is {self.prompt!r} but must be one of {', '.join(PROMPTS)}.")
        key_heads.check_full("duo", self.full)


@struct.dataclass
class State:
    """What retrieval heads and streaming heads keep (None: there are none), and how many tokens a row had so far."""

    full: Leaf  # KVCache
    ring: Leaf  # Ring of sinks + recent + 1 slots
    length: Leaf  # [B]


def settle(spec: Spec, tables: dict[str, Any], kv_heads: int) -> Spec:
    """The heads whose gate reaches the quantile of all."""
    if spec.full or TABLE not in tables:
        return spec
    gates = np.asarray(tables[TABLE], np.float64)
    gates = gates.reshape(len(gates), kv_heads, -1).max(axis=2)
    return dataclasses.replace(spec, full=key_heads.written(largest(gates, 1 - spec.sparsity)))


def largest(scores: np.ndarray, share: float) -> np.ndarray:
    """The share of a table that is largest; of equals the first."""
    chosen = np.zeros(scores.size, bool)
    chosen[np.argsort(-scores, axis=None, kind="stable")[: round(share * scores.size)]] = True
    return chosen.reshape(scores.shape)


def init(spec: Spec, site: Site, *, batch: int, capacity: int) -> State:
    """A cache of `capacity` tokens for retrieval heads, and one of sinks and newest tokens for streaming heads."""
    full = full_heads(spec.full, site) if not spec.twins else ()
    streaming = () if spec.twins else rest(full, site)
    dims = {"key_dim": site.key_dim, "value_dim": site.value_dim, "dtype": site.dtype, "batch": batch}
    slots = spec.sinks + window_of(spec, site)
    return State(
        empty_cache(capacity=capacity, kv_heads=len(full), **dims) if full else None,
        empty_ring(slots=slots, kv_heads=len(streaming), **dims) if streaming else None,
        jnp.zeros(batch, jnp.int32),
    )


def window_of(spec: Spec, site: Site) -> int:
    """Newest tokens that a streaming head reads, the token itself included."""
    return min(spec.recent + 1, site.window or spec.recent + 1)


def step(
    state: State, q: Array, k: Array, v: Array, here: Any, *, spec: Spec, site: Site, core: Core
) -> tuple[Array, State, Any]:
    q, k = core.queries(q), core.keys(k)
    segments, live = here.segments, here.segments != PADDING
    count = state.length[:, None] + jnp.cumsum(live, axis=1, dtype=jnp.int32)
    new = (k, v, count - live, segments)
    if spec.twins:
        return _twins(q, new, here, spec, site, core), dataclasses.replace(state, length=count[:, -1]), here.carry
    full = full_heads(spec.full, site)
    streaming, own = rest(full, site), lambda x, heads: of_key_heads(x, heads, site)
    vis = Visibility(here.positions, here.positions, segments, segments, window=site.window, aligned=0)
    whole = spec.prompt == "dense" and here.phase == "prompt" and q.shape[1] > 1
    parts, cache, ring = [], state.full, state.ring
    if full:
        mapped = dataclasses.replace(core, keys=lambda k: k)
        cache, (keys, values, rules) = dense.kept(cache, own(k, full), own(v, full), here, site, mapped)
        o, stat = core.of(query_heads(full, site))(own(q, full), keys, values, rules)
        parts.append((full, (dense.poisoned(o, cache), stat)))
    if streaming:
        some, attend = own(q, streaming), core.of(query_heads(streaming, site))
        mine = (own(k, streaming), own(v, streaming), *new[2:])
        recent = window_of(spec, site) - 1
        ring = key_heads.kept(state.ring, mine, count, spec.sinks, recent)
        if whole:
            o, stat = attend(some, *mine[:2], vis)
            o = jnp.where((state.length > 0)[:, None, None, None], jnp.nan, o)  # a second piece is no answer
        else:
            o, stat = key_heads.attend_first_and_newest(
                attend, core.merge, some, state.ring, ring, mine, segments,
                sinks=spec.sinks, recent=recent, window=site.window,
            )  # fmt: skip
        parts.append((streaming, (o, stat)))
    return together(parts, core, q, vis, site), State(cache, ring, count[:, -1]), here.carry


def _twins(q: Array, new: tuple[Array, ...], here: Any, spec: Spec, site: Site, core: Core) -> Array:
    """Rows that attend to all, and behind them the same rows through the gates."""
    k, v, at, segments = new
    half, gates = len(q) // 2, here.heads.get(TABLE)
    if gates is None or len(q) % 2:
        raise ConfigError("duo.twins needs an even batch and the gates as head table 'duo'; it is for training them.")
    rules = lambda segments, window: Visibility(at, at, here.segments, segments, window=window, aligned=0)
    o = core.whole(q, k, v, rules(segments, site.window))
    upper = lambda x: jax.tree.map(lambda y: y[half:], x)
    sinks = min(spec.sinks, k.shape[1])
    beside = jnp.where(at < spec.sinks, PADDING, segments)
    parts = [core.attend(*upper((q, k, v)), upper(rules(beside, window_of(spec, site))))]
    if sinks:  # rows have their first token at index 0
        first = upper(rules(segments, site.window)).columns(0, sinks)
        parts.append(core.attend(*upper((q, k[:, :sinks], v[:, :sinks])), first))
    streamed = core.join(parts, upper(q), upper(rules(segments, site.window)))
    gate = gates[:, None].astype(o.dtype)
    mixed = gate * jax.lax.stop_gradient(o[:half]) + (1 - gate) * streamed
    return jnp.concatenate([o[:half], mixed])


def unfit(spec: Spec, site: Site) -> str:
    if not spec.full and not spec.twins:
        return (
            f"it is not said which heads keep all: name a file with the head table {TABLE!r} (--heads FILE, made by "
            "python -m evals.duo_gates), or set full."
        )
    if spec.twins:
        return ""
    return key_heads.unfit_full(spec.full, site)


def read(spec: Spec, site: Site, length: int) -> float:
    """Keys a new token reads behind `length` others, on average over key heads."""
    every = min(length + 1, site.window or length + 1)
    share = 1.0 if spec.twins else len(full_heads(spec.full, site)) / site.kv_heads
    return share * every + (1 - share) * min(every, spec.sinks + window_of(spec, site))


POLICY = Policy(
    name="duo",
    title="DuoAttention",
    arxiv="2410.10819",
    keeps="of retrieval heads all, of the others first `sinks` and newest `recent` tokens",
    reads="all kept",
    spec=Spec,
    init=init,
    step=step,
    windows=True,
    depth=lambda spec: key_heads.differs(spec.full),
    one_piece=lambda spec: spec.prompt == "dense",
    read=read,
    tables=(TABLE,),
    settle=settle,
    unfit=unfit,
    unlimited=lambda spec, length: dataclasses.replace(spec, full=ALL),
    variants=(
        Spec(full="1", sinks=2, recent=5),
        Spec(full="2.0", sinks=0, recent=6),
        Spec(full="1.3", sinks=3, recent=4, prompt="dense"),
    ),
)
