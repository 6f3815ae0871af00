"""Plain XLA in tiles of tokens, for memories of any depth, without a single weight matrix per token.

All gradients of a chunk are taken at the same weights W, and a layer's gradient for one token is the outer product
of what the layer saw, a_j, and the error that came back to it, δ_j. Momentum and forgetting are linear, hence the
weights after token i of a tile that was entered with (M, S) are, layer by layer,

    M_i = β_i M + f_i S - Σ_{j<=i} G_ij a_j ⊗ δ_j            S_i = m_i S - Σ_{j<=i} n_ij a_j ⊗ δ_j
    m_i = η_i m_{i-1}            n_ij = η_i n_{i-1,j}, and θ_i at j = i
    f_i = (1 - α_i) f_{i-1} + m_i      G_ij = (1 - α_i) G_{i-1,j} + n_ij      β_i = (1 - α_i) β_{i-1}

and a read needs only x M_i = β_i x M + f_i x S - Σ_j G_ij (x·a_j) δ_j: the shape of linear attention. The recurrences
know no quotients and no logarithms, so rates of exactly 0 and 1 are exact, in the gradient too.

Boundaries are counted inside a document, tiles in the row. A tile no longer than a chunk therefore holds at most
three groups of tokens: those in the chunk that was open before the tile, those behind the one boundary of that same
document, and documents that begin here, all of which start from M_0. The groups follow one another; one that nobody
in the batch has costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxattn.masks import PADDING
from pallas_kernels.linear_scan.xla import documents
from pallas_kernels.neural_memory.reference import MemoryState, Weights, activation

TILE = 64  # tokens at once; a shorter chunk makes shorter tiles
GROUPS = 3


class Group(NamedTuple):
    """Tokens of one tile that share entry weights and frozen weights."""

    live: Array  # [B, n], the tokens of this group
    document: Array  # [B, n], tells apart documents that begin in the tile; else zeros
    rank: Array  # [B, n], tokens of the same document before this one
    restart: Array  # [B], the row enters new documents: from M_0 and S_0
    renew: Array  # [B], the row enters a new chunk: gradients at the weights as they are now


class Memory(NamedTuple):
    """The memory between two groups of tokens: weights M, momentum S, and the weights that gradients are taken at."""

    M: Weights
    S: Weights
    frozen: Weights


class Coefficients(NamedTuple):
    """The rates' side of the module docstring for a tile; zero between tokens of different groups or documents."""

    beta: Array  # [B, H, n], β_i of the weights that token i reads
    G: Array  # [B, H, n, 1 + n], likewise f_i and then G_ij
    beta_after: Array  # the same after token i's write
    G_after: Array
    n_after: Array  # [B, H, n, 1 + n], m_i and then n_ij


def groups_of(
    segments: Int[Array, "B T"], segment: Int[Array, "B"], count: Int[Array, "B"], *, chunk: int, size: int
) -> tuple[Group, Bool[Array, "N B n"], Array, Array]:
    """All groups, leaves [N, 3, B, ...] for N tiles of `size` <= `chunk` tokens, and the row's last document.

    Args:
      segment, count: the document before the row and how many of its tokens were there.

    Returns:
      groups, which tokens begin a chunk, the count after the row [B], the segment after the row [B].
    """
    segments = jnp.pad(segments, ((0, 0), (0, -segments.shape[1] % size)), constant_values=PADDING)
    live, document = documents(segments, segment.astype(segments.dtype))
    total = jnp.cumsum(live, axis=1) - live
    first = document != jnp.pad(document[:, :-1], ((0, 0), (1, 0)))
    begin = jax.lax.cummax(jnp.where(first, total, 0), axis=1)
    rank = total - jnp.where(document == 0, -count[:, None], begin)
    # Neither `//` nor `%`, which ask the attached device how to take a sign; before a document's first token: -1.
    chunk_of = lambda rank: jnp.where(rank < 0, -1, jax.lax.div(rank, jnp.asarray(chunk, rank.dtype)))
    entered = chunk_of(rank + live - 1)  # the chunk that the state after this token is in
    at_end = lambda x, start: jnp.concatenate([start[:, None], x[:, size - 1 : -1 : size]], axis=1)
    spread = lambda x: jnp.repeat(x, size, axis=1)
    same = document == spread(at_end(document, jnp.zeros_like(count)))
    goes_on = same & (chunk_of(rank) == spread(at_end(entered, chunk_of(count - 1))))
    tile = lambda x: jnp.moveaxis(x.reshape(GROUPS, x.shape[1], -1, size), 2, 0)  # [3, B, T] -> [N, 3, B, n]
    each = lambda x: tile(jnp.broadcast_to(x, (GROUPS, *x.shape)))
    members = tile(jnp.stack([goes_on, same & ~goes_on, ~same]) & live)
    entering = jnp.any(members, axis=-1)
    kind = jnp.arange(GROUPS)[:, None]
    groups = Group(
        live=members,
        document=jnp.where((kind == 2)[..., None], each(document), 0),
        rank=each(rank),
        restart=entering & (kind == 2),
        renew=entering & (kind >= 1),
    )
    newest = jnp.max(jnp.where(live, jnp.arange(live.shape[1]), -1), axis=1)
    owner = jnp.take_along_axis(segments, jnp.maximum(newest, 0)[:, None], axis=1)[:, 0]
    last = jnp.where(newest >= 0, owner, segment).astype(segment.dtype)
    begins = cut(live & (jax.lax.rem(rank, jnp.asarray(chunk, rank.dtype)) == 0), size)
    return groups, begins, (rank + live)[:, -1].astype(count.dtype), last


def cut(x: Array, size: int) -> Array:
    """[B, T, ...] in tiles [N, B, size, ...], filled up with zeros."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def over_tiles(
    work: Callable[[Any, Any, Any, Group], tuple[Any, Array]],
    shared: Any,
    carry: Any,
    tiles: Any,
    groups: Group,
    *,
    tangents: bool = False,
) -> tuple[Any, Array]:
    """`work` on every group of every tile in order; keeps one carry a tile for the backward pass.

    Args:
      work: (shared, carry, one tile, group) -> (carry, out [B, n, ...]). It may close over no array.
      tiles: a tree of [N, ...].
      tangents: allow forward-mode derivatives, at the price of a larger and slower backward pass.

    Returns:
      the last carry, and out [B, N n, ...] with zeros at padding.
    """
    visit = partial(_visit, work) if tangents else partial(_visit_and_recompute, work)

    def tile(carry: Any, now: tuple[Any, Group]) -> tuple[Any, Array]:
        x, parts = now
        shape = jax.eval_shape(work, shared, carry, x, jax.tree.map(lambda g: g[0], parts))[1]
        total = (carry, jnp.zeros(shape.shape, shape.dtype))
        return jax.lax.scan(lambda total, group: (visit(shared, total, x, group), None), total, parts)[0]

    body = tile if tangents else jax.checkpoint(tile, prevent_cse=False)
    carry, out = jax.lax.scan(body, carry, (tiles, groups))
    out = jnp.moveaxis(out, 0, 1)
    return carry, out.reshape(out.shape[0], -1, *out.shape[3:])


def _visit(work: Callable[..., Any], shared: Any, total: tuple[Any, Array], x: Any, group: Group) -> tuple[Any, Array]:
    """One group's work, if anybody has such tokens."""

    return jax.lax.cond(jnp.any(group.live), lambda: _run(work, shared, total, x, group), lambda: total)


def _run(work: Callable[..., Any], shared: Any, total: tuple[Any, Array], x: Any, group: Group) -> tuple[Any, Array]:
    carry, out = work(shared, total[0], x, group)
    return carry, jnp.where(group.live.reshape(*group.live.shape, *[1] * (out.ndim - 2)), out, total[1])


# Left to itself, autodiff would keep the union of both branches' intermediates, zeros for the one not taken.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _visit_and_recompute(work: Callable[..., Any], shared: Any, total: Any, x: Any, group: Group) -> tuple[Any, Array]:
    return _visit(work, shared, total, x, group)


def _visit_forward(work: Callable[..., Any], shared: Any, total: Any, x: Any, group: Group) -> tuple[Any, Any]:
    return _visit(work, shared, total, x, group), (shared, total, x, group)


def _visit_backward(work: Callable[..., Any], saved: tuple[Any, Any, Any, Group], out: Any) -> tuple[Any, ...]:
    shared, total, x, group = saved

    def run() -> tuple[Any, ...]:
        return jax.vjp(lambda shared, total, x: _run(work, shared, total, x, group), shared, total, x)[1](out)

    zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    return *jax.lax.cond(jnp.any(group.live), run, lambda: (zeros(shared), out, zeros(x))), None


_visit_and_recompute.defvjp(_visit_forward, _visit_backward)


def enter(memory: Memory, group: Group, start: Weights) -> Memory:
    """The memory as the group finds it."""
    on = lambda rows, new, old: jnp.where(rows[:, None, None, None], new, old)
    M = tuple(on(group.restart, w, m) for w, m in zip(start, memory.M, strict=True))
    S = tuple(on(group.restart, 0, s) for s in memory.S)
    return Memory(M, S, tuple(on(group.renew, m, w) for m, w in zip(M, memory.frozen, strict=True)))


def coefficients(
    eta: Float[Array, "N B n H"],
    theta: Float[Array, "N B n H"],
    alpha: Float[Array, "N B n H"],
    live: Bool[Array, "N B n"],
    begins: Bool[Array, "N B n"],
    read_after_write: bool,
) -> Coefficients:
    """The coefficients of all tiles at once, leaves [N, B, H, ...], one token after the other."""
    shape, size = (*eta.shape[:2], eta.shape[3]), eta.shape[2]
    empty = jnp.zeros((*shape, 1 + size), eta.dtype)
    only_S = empty.at[..., 0].set(1)  # before the first token: β = m = 1, everything else 0
    first = lambda x: jnp.moveaxis(x, 2, 0)

    def token(carry: tuple[Array, Array, Array], now: tuple[Array, ...]) -> tuple[Any, Any]:
        eta, theta, alpha, live, begins, place = now
        live, begins = live[..., None, None], begins[..., None, None]
        found = jax.tree.map(lambda new, old: jnp.where(begins, new, old), (only_S[..., :1], empty, only_S), carry)
        beta, G, n = found
        keep = 1 - alpha[..., None]
        n = eta[..., None] * n + theta[..., None] * place
        after = jax.tree.map(lambda new, old: jnp.where(live, new, old), (keep * beta, keep * G + n, n), found)
        read = after if read_after_write else found
        return after, (read[0], read[1], *after)

    now = (first(eta), first(theta), first(alpha), first(live), first(begins), jnp.eye(size, 1 + size, 1, eta.dtype))
    _, rows = jax.lax.scan(token, (only_S[..., :1], empty, only_S), now)
    beta, G, beta_after, G_after, n_after = (jnp.moveaxis(x, 0, 3) for x in rows)
    return Coefficients(beta[..., 0], G, beta_after[..., 0], G_after, n_after)


def advance(
    memory: Memory,
    q: Float[Array, "B H n D"],
    k: Float[Array, "B H n D"],
    v: Float[Array, "B H n V"],
    c: Coefficients,
    live: Bool[Array, "B n"],
) -> tuple[Memory, Float[Array, "B H n V"], tuple[Array, Array]]:
    """The memory after the live tokens, which are those of one group, every token's read, and what the last layer
    saw: of queries and of keys [B, H, n, W].
    """
    seen, slopes, x = [k], [], k  # a_j and the activation's slopes of every layer, at the frozen weights
    for w in memory.frozen[:-1]:
        z = jnp.matmul(x, w)
        x, slope = jax.jvp(activation, (z,), (jnp.ones_like(z),))
        seen.append(x)
        slopes.append(slope)
    errors = [2 * (jnp.matmul(x, memory.frozen[-1]) - v)]
    for w, slope in zip(memory.frozen[:0:-1], slopes[::-1], strict=True):
        errors.append(jnp.matmul(errors[-1], jnp.swapaxes(w, -1, -2)) * slope)
    errors = errors[::-1]

    M, S, x, top, beta, G, n = [], [], q, q, *_last(c, live)
    for i, (a, error, old_M, old_S) in enumerate(zip(seen, errors, memory.M, memory.S, strict=True)):
        x = top = activation(x) if i else x
        written = jnp.matmul(c.G[..., 1:] * jnp.matmul(x, jnp.swapaxes(a, -1, -2)), error)
        x = c.beta[..., None] * jnp.matmul(x, old_M) + c.G[..., :1] * jnp.matmul(x, old_S) - written
        added = lambda row, a=a, error=error: jnp.matmul(jnp.swapaxes(row[..., 1:, None] * a, -1, -2), error)
        M.append(beta[..., None, None] * old_M + G[..., :1, None] * old_S - added(G))
        S.append(n[..., :1, None] * old_S - added(n))
    return Memory(tuple(M), tuple(S), memory.frozen), x, (top, seen[-1])


def _last(c: Coefficients, live: Bool[Array, "B n"]) -> tuple[Array, Array, Array]:
    """β [B, H], and f, G and m, n [B, H, 1 + n], after the last live token; of no change where there is none."""
    some, size = jnp.any(live, axis=1)[:, None, None], live.shape[1]
    at = jnp.max(jnp.where(live, jnp.arange(size), 0), axis=1)[:, None, None]
    row = lambda x: jnp.take_along_axis(x, at[..., None], axis=2)[:, :, 0]
    nothing = jnp.zeros((1 + size,), c.beta.dtype)
    beta = jnp.where(some[..., 0], jnp.take_along_axis(c.beta_after, at, axis=2)[..., 0], 1)
    return beta, jnp.where(some, row(c.G_after), nothing), jnp.where(some, row(c.n_after), nothing.at[0].set(1))


def _work(
    hidden: bool, start: Weights, memory: Memory, x: tuple[tuple[Array, Array, Array], Coefficients], group: Group
) -> tuple[Memory, Array]:
    memory, y, tops = advance(enter(memory, group, start), *x[0], x[1], group.live)
    return memory, jnp.swapaxes(jnp.concatenate(tops, axis=-1) if hidden else y, 1, 2)


@partial(jax.jit, static_argnames=("chunk", "read_after_write", "tangents"))
def neural_memory_xla(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H V"],
    eta: Float[Array, "B T H"],
    theta: Float[Array, "B T H"],
    alpha: Float[Array, "B T H"],
    start: Weights,
    state: MemoryState,
    segments: Int[Array, "B T"],
    *,
    chunk: int,
    read_after_write: bool,
    tangents: bool = False,
) -> tuple[Float[Array, "B T H V"], MemoryState]:
    """See `pallas_kernels.neural_memory.neural_memory`. Keeps one state a tile for the backward pass."""
    length = q.shape[1]
    groups, tiles, count, segment = _cut_all(
        (q, k, v), (eta, theta, alpha), segments, state.segment, state.count, chunk, read_after_write
    )
    memory = Memory(state.M, state.S, state.frozen)
    memory, y = over_tiles(partial(_work, False), start, memory, tiles, groups, tangents=tangents)
    return y[:, :length], MemoryState(*memory, count=count, segment=segment)


def _cut_all(
    tokens: tuple[Array, ...],
    rates: tuple[Array, ...],
    segments: Array,
    segment: Array,
    count: Array,
    chunk: int,
    read_after_write: bool,
) -> tuple[Group, tuple[tuple[Array, ...], Coefficients], Array, Array]:
    """Groups, tiles of (q, k, v) heads first with their coefficients, and the row's last count and segment."""
    size = min(chunk, TILE, segments.shape[1])
    groups, begins, count, segment = groups_of(segments, segment, count, chunk=chunk, size=size)
    live = segments != PADDING
    # Zeroed padding neither reads nor writes, even where it holds nan.
    heads = tuple(jnp.swapaxes(cut(jnp.where(live[..., None, None], x, 0), size), 2, 3) for x in tokens)
    eta, theta, alpha = (cut(x, size) for x in rates)
    c = coefficients(eta, theta, alpha, cut(live, size), begins, read_after_write)
    return groups, (heads, c), count, segment


@partial(jax.jit, static_argnames=("chunk", "read_after_write"))
def memory_rows(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H V"],
    eta: Float[Array, "B T H"],
    theta: Float[Array, "B T H"],
    alpha: Float[Array, "B T H"],
    start: Weights,
    segments: Int[Array, "B T"],
    *,
    chunk: int,
    read_after_write: bool,
) -> Float[Array, "B H T T"]:
    """A of y_i = β_i h_i M_0^last + Σ_{j<=i} A_ij (v_j - v̂_j), v̂_j what the memory answered to k_j when it learned.

    A_ij = 2 G_ij h_i·a_j with h_i and a_j what the last layer saw of q_i and k_j, and G over the whole document.
    """
    batch, length = q.shape[:2]
    nobody = jnp.zeros((batch,), jnp.int32)
    rates = (eta, theta, alpha)
    groups, tiles, _, _ = _cut_all((q, k, v), rates, segments, nobody, nobody, chunk, read_after_write)
    zeros = tuple(jnp.zeros((batch, *w.shape), w.dtype) for w in start)
    _, tops = over_tiles(partial(_work, True), start, Memory(zeros, zeros, zeros), tiles, groups)
    h, a = jnp.split(jnp.moveaxis(tops[:, :length], 2, 1), 2, axis=-1)
    live, document = documents(segments, nobody)
    begins = live & (document != jnp.pad(document[:, :-1], ((0, 0), (1, 0))))
    whole = coefficients(eta[None], theta[None], alpha[None], live[None], begins[None], read_after_write)
    rows = 2 * whole.G[0, ..., 1:] * jnp.matmul(h, jnp.swapaxes(a, -1, -2))
    return jnp.where(live[:, None, :, None], rows, 0)
