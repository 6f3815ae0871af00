"""MInference: prompts are read sparsely, by one of three patterns for each query head; answers read all.

MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention (arXiv 2407.02490).

    a_shape         the first `init` keys and the nearest `local`
    vertical_slash  `vertical` key columns and `slash` diagonals (of one offset, query minus key) in which the last
                    `last` queries of the prompt have most softmax weight
    block           for every block of queries the `blocks` key blocks with the largest product of mean query and key

Always read are in vertical_slash the first `sinks` keys and the nearest `near` offsets, offset 0 before all, and in
block the first block and the query's own; these count towards the budget. All is in whole blocks of `block` tokens from
a row's first token on: budgets in tokens are rounded up, columns and diagonals are weighed and taken by the block, and
a block of diagonals lies in two blocks of keys. Inside blocks attention is causal; each pair counts once.

Heads may differ, by head tables [L, H]: `minference_pattern` (0 a_shape, 1 vertical_slash, 2 block; NaN is answered
where it is something else), and `minference_a` and `minference_b`, its budgets: init and local, vertical and slash, or
blocks and nothing. `jaxattn.analysis.minference_search` makes them.

Deviations: the paper takes single columns and diagonals, which it reads as gathered keys and as ranges that lie on no
grid. `slash` is not raised to 50. p is the softmax of the scores also where a mechanism makes other weights of them or
has a score-space method around it. The paper's "block" forces nothing.

Left out: the last queries of a_shape dense (Tri-shape), and one factor for all budgets, which head tables hold.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxattn.errors import ConfigError
from jaxattn.masks import PADDING, Visibility
from jaxattn.mechanisms._protocol import Core
from jaxattn.policies import dense
from jaxattn.policies._protocol import Policy, Site
from jaxattn.policies.parts.blocks import causal, first_live, lines, most, pooled, ranked, turned
from jaxattn.policies.parts.lots import lots
from jaxattn.stores import KVCache
from jaxattn.types import Leaf
from pallas_kernels.block_sparse import block_lists, density
from pallas_kernels.probe import probe

PATTERNS = ("a_shape", "vertical_slash", "block")  # in the order of their numbers in head tables
PATTERN, A, B = TABLES = ("minference_pattern", "minference_a", "minference_b")
BY = ("attention", "lots")
MOST_LAST = 128  # queries that every backend of the probe takes
FAR = 1 << 20  # tells draws apart


@dataclasses.dataclass(frozen=True)
class Spec:
    """pattern: of every head without a table. init, local, vertical, slash: budgets in tokens. blocks: one in blocks.

    first: layers below read prompts densely. by: "attention", or "lots" for a control that draws columns, diagonals and
    blocks by lot, beside those that are always read.
    """

    pattern: str = "vertical_slash"
    init: int = 128
    local: int = 3968
    vertical: int = 1000
    slash: int = 6096
    blocks: int = 100
    block: int = 64
    last: int = 64
    sinks: int = 30
    near: int = 100
    first: int = 0
    by: str = "attention"

    def __post_init__(self) -> None:
        for field, known in (("pattern", PATTERNS), ("by", BY)):
            if getattr(self, field) not in known:
                raise ConfigError(
                    f"minference.{field} is {getattr(self, field)!r} but must be one of {', '.join(known)}."
                )
        for field in ("init", "vertical", "sinks", "near", "first"):
            if getattr(self, field) < 0:
                raise ConfigError(f"minference.{field} is {getattr(self, field)} but must be 0 or more.")
        for field in ("local", "slash", "blocks", "block", "last"):
            if getattr(self, field) < 1:
                raise ConfigError(f"minference.{field} is {getattr(self, field)} but must be at least 1.")
        if self.last > MOST_LAST:
            raise ConfigError(f"minference.last is {self.last} but must be at most {MOST_LAST} queries.")


@struct.dataclass
class State:
    """The keys and values, and the share of a prompt's tiles below the diagonal that heads read, on average."""

    cache: KVCache
    density: Leaf  # [B] f32, 0 before a prompt


def init(spec: Spec, site: Site, *, batch: int, capacity: int) -> State:
    return State(dense.init(spec, site, batch=batch, capacity=capacity), jnp.zeros(batch, jnp.float32))


def step(
    state: State, q: Array, k: Array, v: Array, here: Any, *, spec: Spec, site: Site, core: Core
) -> tuple[Array, State, Any]:
    if here.phase == "answer" or q.shape[1] == 1 or site.layer < spec.first:
        o, cache, carry = dense.step(state.cache, q, k, v, here, spec=spec, site=site, core=core)
        return o, dataclasses.replace(state, cache=cache), carry
    later = state.cache.length > 0  # a second piece: it must never look like an answer
    cache, _ = dense.kept(state.cache, k, v, here, site, core)
    front = first_live(here.segments)
    tokens = core.queries(q), core.keys(k), v, here.positions, here.segments
    q, k, v, at, segments = (turned(x, front) for x in tokens)
    vis = Visibility(at, at, segments, segments, window=site.window, aligned=0)
    mask, known = chosen(q, k, vis, here.heads or {}, spec=spec, site=site, scale=core.scale)
    how: dict[str, Any] = {"block_q": spec.block, "block_k": spec.block}
    blocks = block_lists(mask, mask.shape[-1])
    share = density(blocks, vis, **how)
    o = core.whole(q, k, v, vis, blocks={"blocks": blocks, **how})
    o = jnp.where(later[:, None, None, None] | ~known[:, None], jnp.nan, turned(o, -front))
    return dense.poisoned(o, cache), State(cache, jnp.mean(share, axis=1)), here.carry


def chosen(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    vis: Visibility,
    tables: dict[str, Array],
    *,
    spec: Spec,
    site: Site,
    scale: float,
) -> tuple[Bool[Array, "B H J J"], Bool[Array, "H"]]:
    """The blocks that each block of queries reads, and which heads have a pattern.

    Args:
      q, k, vis: of prompts that begin at index 0 and end anywhere.
      tables: rows [H] of the head tables.
    """
    heads, count = q.shape[2], -(-q.shape[1] // spec.block)
    fixed = PATTERNS.index(spec.pattern)
    number = tables.get(PATTERN, jnp.full(heads, fixed))
    budget = lambda name, each: jnp.round(tables.get(name, each)).astype(jnp.int32)
    by_number = lambda *each: jnp.array(each)[jnp.clip(number, 0, 2).astype(jnp.int32)]
    a = budget(A, by_number(spec.init, spec.vertical, spec.blocks))
    b = budget(B, by_number(spec.local, spec.slash, 0))
    masks = {0: _a_shape, 1: _vertical_slash, 2: _block}
    used = masks if PATTERN in tables else {fixed: masks[fixed]}
    mask = jnp.zeros((len(q), heads, count, count), bool)
    for n, make in used.items():
        own = (number == n)[:, None, None]
        mask |= own & make(q, k, vis, a, b, spec, site, scale)
    return mask, (number == 0) | (number == 1) | (number == 2)


def _a_shape(
    q: Array, k: Array, vis: Visibility, a: Int[Array, "H"], b: Int[Array, "H"], spec: Spec, site: Site, scale: float
) -> Bool[Array, "1 H J J"]:
    """a first keys and b nearest."""
    start = spec.block * jnp.arange(-(-q.shape[1] // spec.block))
    return lines(start < a[:, None], start < b[:, None])[None]


def _vertical_slash(
    q: Array, k: Array, vis: Visibility, a: Int[Array, "H"], b: Int[Array, "H"], spec: Spec, site: Site, scale: float
) -> Bool[Array, "B H J J"]:
    """a columns and b diagonals."""
    count = -(-q.shape[1] // spec.block)
    start = spec.block * jnp.arange(count)
    if spec.by == "lots":
        own = start < _lengths(vis)[:, None, None]
        columns, diagonals = (jnp.where(own, _lots(jnp.arange(count) + n, site), -1.0) for n in (FAR, 2 * FAR))
    else:
        columns, diagonals = (pooled(x, spec.block) for x in _weights_of_last(q, k, vis, spec.last, scale))
    up = most(jnp.where(start < spec.sinks, jnp.inf, columns), -(-jnp.maximum(a, spec.sinks) // spec.block))
    across = most(jnp.where(start < max(spec.near, 1), jnp.inf, diagonals), -(-jnp.maximum(b, 1) // spec.block))
    return lines(up, across)


def _weights_of_last(
    q: Array, k: Array, vis: Visibility, last: int, scale: float
) -> tuple[Float[Array, "B H T"], Float[Array, "B H T"]]:
    """Softmax weight of the last queries of each row in every column and in every diagonal."""
    last = min(last, q.shape[1])
    at = _lengths(vis)[:, None] - last + jnp.arange(last)
    rows = lambda x: jnp.take_along_axis(x, jnp.maximum(at, 0).reshape(*at.shape, *[1] * (x.ndim - 2)), axis=1)
    segments = jnp.where(at < 0, PADDING, rows(vis.q_segments))
    rules = dataclasses.replace(vis, q_positions=rows(vis.q_positions), q_segments=segments, aligned=None)
    found = probe(rows(q), k, rules, scale=scale, want=("columns", "diagonals"))
    return found.columns, found.diagonals


def _lengths(vis: Visibility) -> Int[Array, "B"]:
    return jnp.sum(vis.k_segments != PADDING, axis=1, dtype=jnp.int32)


def _block(
    q: Array, k: Array, vis: Visibility, a: Int[Array, "H"], b: Int[Array, "H"], spec: Spec, site: Site, scale: float
) -> Bool[Array, "B H J J"]:
    """a blocks for every block of queries."""
    count, kv_heads = -(-q.shape[1] // spec.block), k.shape[2]
    if spec.by == "lots":
        pair = 3 * FAR + FAR * jnp.arange(count)[:, None] + jnp.arange(count)
        scores = _lots(pair.reshape(-1), site).reshape(1, -1, count, count)
    else:
        live = (vis.k_segments != PADDING)[:, :, None, None]
        q, k = (pooled(jnp.where(live, x, 0).astype(jnp.float32), spec.block, axis=1) for x in (q, k))
        rows = q.reshape(len(q), count, kv_heads, -1, q.shape[3])
        scores = jnp.einsum("bikgd,bjkd->bkgij", rows, k).reshape(len(q), -1, count, count)
    return most(ranked(scores), jnp.maximum(a, 1)[:, None]) & causal(count)


def _lots(places: Int[Array, "n"], site: Site) -> Float[Array, "1 H n"]:
    """Drawn numbers; the query heads of a key head share them."""
    return jnp.repeat(lots(places[None], site), site.heads // site.kv_heads, axis=1)


def unfit(spec: Spec, site: Site) -> str:
    if spec.first > site.num_layers:
        return f"it has {site.num_layers} layers, so first={spec.first} is none of them; set it lower."
    return ""


def unlimited(spec: Spec, length: int) -> Spec:
    grown: dict[str, Any] = {
        name: max(getattr(spec, name), length) for name in ("init", "local", "vertical", "slash", "blocks")
    }
    return dataclasses.replace(spec, **grown)


POLICY = Policy(
    name="minference",
    title="MInference",
    arxiv="2407.02490",
    keeps="all",
    reads="of a prompt the blocks that a pattern per head finds, in an answer all",
    spec=Spec,
    init=init,
    step=step,
    windows=True,
    depth=lambda spec: spec.first > 0,
    one_piece=lambda spec: True,
    tables=TABLES,
    unfit=unfit,
    unlimited=unlimited,
    measured=lambda state: {"prompt_density": state.density},
    variants=(
        Spec(vertical=4, slash=4, block=4, last=4, sinks=2, near=2),
        Spec(pattern="a_shape", init=3, local=5, block=2),
        Spec(pattern="block", blocks=3, block=3),
        Spec(vertical=4, slash=4, block=2, sinks=1, near=1, first=1, by="lots"),
    ),
)
