"""H2O: the newest tokens and those that got the most attention so far, chosen by every key head for itself.

H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models (arXiv 2306.14048).

    a_j += Σ_h Σ_i p_hij     attention of new queries i, over the query heads of a key head; never divided or faded
    keep the `recent` newest tokens and of the others the `heavy` with the largest a; the rest is gone for good

A prompt is read whole with full attention, a is its column sums, and then one eviction follows. A token of an answer
attends to all that is kept and to itself; then at most one token is overwritten in its place. Kept keys stay rotated
for their own positions. Sinks stay by themselves: their sums are the largest.

Deviations: the sums are per key head, not per query head, and rows of a batch are on their own; the released code has
one key head per query head and a batch of one. p is the softmax of the scores q·k over the keys at hand, also where the
mechanism makes other weights of them, has constant slots, or has a score-space method around it. Several tokens of an
answer at once are taken one by one. In a layer with a window, tokens beyond it are dropped first.

Left out: slot positions with unrotated keys (the released streaming variant); budgets as a share of the prompt, which
would make the state's size depend on it; and the released lm-eval code's mask for LLaMA, which is no such policy: it
sums the attention of all queries, later ones too, and so looks ahead.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxattn.errors import ConfigError
from jaxattn.masks import PADDING, Visibility
from jaxattn.mechanisms._protocol import Core
from jaxattn.policies._protocol import Policy, Site
from jaxattn.policies.parts.lots import lots
from jaxattn.stores import Kept, choose, empty_kept, place
from pallas_kernels.probe import probe

NEVER = -1e30
QUERIES = 128  # of a prompt, whose attention is summed at a time
BAND = 1024  # and over the keys up to the end of their band; there are at most BANDS
BANDS = 8
BY = ("attention", "lots")


@dataclasses.dataclass(frozen=True)
class Spec:
    """heavy, recent: tokens that a key head keeps by their attention, and as the newest.

    by: "attention", or "lots" for a control that keeps the first token and draws the other heavy ones by lot.
    """

    heavy: int = 48
    recent: int = 2000
    by: str = "attention"

    def __post_init__(self) -> None:
        for field in ("heavy", "recent"):
            if getattr(self, field) < 0:
                raise ConfigError(f"h2o.{field} is {getattr(self, field)} but must be at least 0 tokens.")
        if self.budget < 1:
            raise ConfigError("h2o.heavy and h2o.recent are both 0: keep at least one token.")
        if self.by not in BY:
            raise ConfigError(f"h2o.by is {self.by!r} but must be one of {', '.join(BY)}.")

    @property
    def budget(self) -> int:
        return self.heavy + self.recent


def init(spec: Spec, site: Site, *, batch: int, capacity: int) -> Kept:
    """Room for the budget and the token that comes in; `capacity` does not matter."""
    dims = {"kv_heads": site.kv_heads, "key_dim": site.key_dim, "value_dim": site.value_dim}
    return empty_kept(batch=batch, room=spec.budget + 1, dtype=site.dtype, **dims)


def step(
    state: Kept, q: Array, k: Array, v: Array, here: Any, *, spec: Spec, site: Site, core: Core
) -> tuple[Array, Kept, Any]:
    q, k = core.queries(q), core.keys(k)
    if here.phase == "prompt" and q.shape[1] > 1:
        o, state = _prompt(state, q, k, v, here, spec, site, core)
        return o, state, here.carry

    def one(state: Kept, token: list[Array]) -> tuple[Kept, Array]:
        q, k, v = (x[:, None] for x in token[:3])
        o, state = _token(state, q, k, v, token[3], token[4], spec, site, core)
        return state, o[:, 0]

    columns = q, k, v, here.positions, here.segments != PADDING
    if q.shape[1] == 1:
        state, o = one(state, [x[:, 0] for x in columns])
        return o[:, None], state, here.carry
    state, o = jax.lax.scan(one, state, [jnp.swapaxes(x, 0, 1) for x in columns])
    return jnp.swapaxes(o, 0, 1), state, here.carry


def _prompt(
    state: Kept, q: Array, k: Array, v: Array, here: Any, spec: Spec, site: Site, core: Core
) -> tuple[Array, Kept]:
    """Full attention in a prompt, and what is left of it."""
    where, live = here.positions, here.segments != PADDING
    vis = Visibility(where, where, here.segments, here.segments, window=site.window, aligned=0)
    o = core.whole(q, k, v, vis)
    o = jnp.where(jnp.any(state.positions >= 0), jnp.nan, o)  # a second piece must never look like an answer
    if spec.by == "lots" or not spec.heavy:
        mass = lots(where, site)
    else:
        mass = _grouped(_column_sums(q, k, vis, core.scale), site)
    newest = jnp.max(jnp.where(live, where, -1), axis=1)
    live &= _reached(where, newest[:, None], site)
    recent = where > newest[:, None] - spec.recent
    rank = jnp.where(live[:, None], jnp.where(recent[:, None], jnp.inf, mass), -jnp.inf)
    keep = jnp.sort(jax.lax.top_k(rank, min(spec.budget, q.shape[1]))[1], axis=-1)
    where = jnp.broadcast_to(jnp.where(live, where, -1)[:, None], mass.shape)
    return o, choose(state, k, v, where, mass, keep)


def _token(
    state: Kept, q: Array, k: Array, v: Array, where: Array, live: Array, spec: Spec, site: Site, core: Core
) -> tuple[Array, Kept]:
    """One token of every row, at position `where` [B] if it is `live` [B]: it attends, then the budget is restored."""
    state = place(state, k, v, where, live)
    seen = state.positions >= 0  # what lies beyond a window was dropped behind the token before
    segments = live.astype(jnp.int32)[:, None]
    count = state.positions.shape[2]
    nowhere = jnp.zeros((len(q), count), jnp.int32)  # keys are in the past, wherever they are
    vis = Visibility(where[:, None], nowhere, segments, jnp.ones_like(nowhere))
    keys, values = state.keys.astype(q.dtype), state.values.astype(v.dtype)
    hidden = jnp.where(seen, 0.0, NEVER)
    o = core.whole(q, keys, values, vis, key_bias=hidden, places=state.positions)
    if spec.by == "lots":
        new = state.positions == where[:, None, None]
        mass = jnp.where(new, lots(where[:, None], site), state.mass)
    elif spec.heavy:
        weights = _weights(q, keys, seen & live[:, None, None], core.scale)
        mass = state.mass + _grouped(weights, site)
    else:
        mass = state.mass
    positions = jnp.where(_reached(state.positions, where[:, None, None], site), state.positions, -1)
    old = (positions >= 0) & (positions <= where[:, None, None] - spec.recent)
    worth = jnp.where(old, mass, jnp.inf)
    least = old & (worth == jnp.min(worth, axis=2, keepdims=True))
    last = jnp.argmax(jnp.where(least, positions, -1), axis=2, keepdims=True)  # of equals the newest goes
    full = jnp.all(positions >= 0, axis=2, keepdims=True)
    positions = jnp.where(full & (jnp.arange(count) == last), -1, positions)
    return o, dataclasses.replace(state, positions=positions, mass=mass)


def _reached(positions: Array, newest: Array, site: Site) -> Bool[Array, "..."]:
    """Whether the token behind `newest` sees these positions through the layer's window."""
    return positions > newest + 1 - site.window if site.window is not None else jnp.ones_like(positions, bool)


def _weights(q: Array, keys: Array, seen: Array, scale: float) -> Float[Array, "B H C"]:
    """Softmax rows of one query a row over the keys [B, C, K, D] that each key head has `seen` [B, K, C]."""
    (batch, _, heads, dim), kv_heads = q.shape, keys.shape[2]
    rows = q.astype(jnp.float32).reshape(batch, kv_heads, heads // kv_heads, dim)
    s = scale * jnp.einsum("bkgd,bckd->bkgc", rows, keys.astype(jnp.float32))
    w = jax.nn.softmax(jnp.where(seen[:, :, None], s, NEVER), axis=-1)
    return jnp.where(seen[:, :, None], w, 0.0).reshape(batch, heads, -1)


def _column_sums(q: Array, k: Array, vis: Visibility, scale: float) -> Float[Array, "B H T"]:
    """Attention that every key of a prompt gets, some queries at a time."""
    batch, length, heads, _ = q.shape
    size = min(QUERIES, length)
    pad = -length % size
    q, vis = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))), vis.pad_rows(pad)
    band = BAND * -(-length // (BAND * BANDS))
    total = jnp.zeros((batch, heads, length))
    for start in range(0, length, band):
        stop = min(start + band, length)  # nobody of these sees a key behind it

        def add(total: Array, at: Array, stop: int = stop) -> tuple[Array, None]:
            some, rules = jax.lax.dynamic_slice_in_dim(q, at, size, 1), vis.rows(at, size).columns(0, stop)
            found = probe(some, k[:, :stop], rules, scale=scale, want=("columns",)).columns
            return total.at[:, :, :stop].add(found), None

        total = jax.lax.scan(add, total, jnp.arange(start, stop, size))[0]
    return total


def _grouped(x: Float[Array, "B H S"], site: Site) -> Float[Array, "B K S"]:
    """Sums over the query heads of a key head."""
    return jnp.sum(x.reshape(len(x), site.kv_heads, -1, x.shape[2]), axis=2)


POLICY = Policy(
    name="h2o",
    title="Heavy-Hitter Oracle",
    arxiv="2306.14048",
    keeps="the newest tokens and, per key head, those with most attention so far",
    reads="all that is kept",
    spec=Spec,
    init=init,
    step=step,
    windows=True,
    bounded=True,
    one_piece=lambda spec: True,
    read=lambda spec, site, length: float(min(length + 1, spec.budget + 1, site.window or length + 1)),
    unlimited=lambda spec, length: dataclasses.replace(spec, recent=max(spec.recent, length)),
    variants=(Spec(heavy=3, recent=6), Spec(heavy=4, recent=0)),
)
