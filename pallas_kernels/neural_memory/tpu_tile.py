"""What the TPU kernels compute for one tile of tokens: pure functions of arrays [n, ·], differentiated inside a kernel.

The recurrences of `xla`, written as products. With E_ij = Π_{j<s<=i} η_s and A_ij = Π_{j<s<=i} (1 - α_s), both zero
unless tokens i and j belong to one section (nothing began between them),

    n = E diag(θ)      G = A E diag(θ)      m, β, f = E, A, A E applied to the rate of the section's first token

No quotients and no logarithms, so rates of exactly 0 and 1 are exact, in the gradient too.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.flash.tiles import dot
from pallas_kernels.neural_memory.reference import activation

ETA, THETA, ALPHA = 0, 1, 2  # rows of `rates`
SECTION, GROUP, FIRST = 0, 1, 2  # rows of `marks`
RESTART, RENEW = 2, 1  # groups from which on the memory is M_0, or gradients are taken at the weights found
NOBODY = -1  # group of a token that is padding; also "no token" in the table of last tokens


class Layer(NamedTuple):
    """One layer's weights, momentum, and the weights at the newest boundary, all [i, o]."""

    M: Array
    S: Array
    frozen: Array


class Tokens(NamedTuple):
    """A tile's inputs that have gradients."""

    q: Array  # [n, D]
    k: Array  # [n, D]
    v: Array  # [n, V]
    rates: Array  # [3, n]


class Rates(NamedTuple):
    """The rates' side of a tile; what a token reads, and the state after its write."""

    beta: Array  # [n, 1]
    f: Array  # [n, 1]
    G: Array  # [n, n]
    beta_after: Array
    f_after: Array
    G_after: Array
    m_after: Array  # [n, 1]
    n_after: Array  # [n, n]


def _places(n: int) -> tuple[Array, Array]:
    """Row and column numbers of an [n, n] matrix."""
    number = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (n, n), axis)
    return number(0), number(1)


def column(row: Float[Array, "1 n"]) -> Float[Array, "n 1"]:
    """Lanes to sublanes, through a diagonal: exact, and at any n."""
    i, j = _places(row.shape[1])
    return jnp.sum(jnp.where(i == j, row, 0.0), axis=1, keepdims=True)


def _down(x: Array, by: int, fill: float) -> Array:
    """Rows moved down, `fill` above them."""
    return jnp.concatenate([jnp.full((by, x.shape[1]), fill, x.dtype), x[:-by]], axis=0)


@jax.custom_vjp
def products(rate: Float[Array, "n 1"]) -> Float[Array, "n n"]:
    """Π_{j<s<=i} rate_s for j <= i, zero above the diagonal; products of neighbours, doubled log2(n) times."""
    n = rate.shape[0]
    i, j = _places(n)
    x, by = jnp.where(i > j, rate, 1.0), 1
    while by < n:
        x, by = x * _down(x, by, 1.0), 2 * by
    return jnp.where(i >= j, x, 0.0)


def _products_forward(rate: Array) -> tuple[Array, Array]:
    p = products(rate)
    return p, p


def _products_backward(p: Array, dp: Array) -> tuple[Array]:
    """Σ over i >= s > j of dp_ij p_is p_{s-1,j}: every factor but rate_s itself, without dividing by it."""
    return (jnp.sum(dot(p, dp, (0, 0)) * _down(p, 1, 0.0), axis=1, keepdims=True),)


products.defvjp(_products_forward, _products_backward)


def rates_of(rates: Float[Array, "3 n"], marks: Float[Array, "3 n"], read_after_write: bool) -> Rates:
    """The coefficients of a tile; padding has rates (1, 0, 0) and changes nothing."""
    n = rates.shape[1]
    i, j = _places(n)
    row = lambda r: rates[r : r + 1]
    eta, theta, keep, first = row(ETA), row(THETA), 1.0 - row(ALPHA), marks[FIRST : FIRST + 1]
    section = marks[SECTION : SECTION + 1]
    same = jnp.broadcast_to(column(section), (n, n)) == section
    E = jnp.where(same, products(column(eta)), 0.0)
    A = jnp.where(same, products(column(keep)), 0.0)
    live = jnp.broadcast_to(column(marks[GROUP : GROUP + 1]), (n, n)) > NOBODY
    AE = dot(A, jnp.where(live, E, 0.0), (1, 0))  # momentum passes through padding without being added there
    total = lambda x, first_rate: jnp.sum(x * first_rate, axis=1, keepdims=True)
    beta, f, m = total(A, first * keep), total(AE, first * eta), total(E, first * eta)
    after = (beta, f, AE * theta)
    if read_after_write:
        return Rates(*after, *after, m, E * theta)
    begins = column(first)
    previous = jnp.where((i == j + 1) & (jnp.broadcast_to(begins, (n, n)) == 0.0), 1.0, 0.0)  # one token up
    A_read, AE_read = dot(previous, A, (1, 0)), dot(previous, AE, (1, 0))
    found = (begins + total(A_read, first * keep), total(AE_read, first * eta), AE_read * theta)
    return Rates(*found, *after, m, E * theta)


def enter(group: Array, layer: Layer, start: Float[Array, "i o"]) -> Layer:
    """The memory as a group of tokens finds it."""
    M = jnp.where(group >= RESTART, start, layer.M)
    return Layer(M, jnp.where(group >= RESTART, 0.0, layer.S), jnp.where(group >= RENEW, M, layer.frozen))


def step(
    memory: tuple[Layer, ...],
    x: Tokens,
    marks: Float[Array, "3 n"],
    group: Array,
    last: Array,
    read_after_write: bool,
    reads: bool = True,
) -> tuple[tuple[tuple[Array, Array], ...], Float[Array, "n V"]]:
    """(M, S) of every layer after a group's last token, and the group's reads, zero in all other rows.

    Args:
      memory: as the group enters it.
      last: the row of the group's last token.
      reads: False: only what is written; the reads are zero.
    """
    member = column(jnp.where(marks[GROUP : GROUP + 1] == group.astype(jnp.float32), 1.0, 0.0))
    only = lambda x: jnp.where(jnp.broadcast_to(member, x.shape) > 0.0, x, 0.0)
    c = rates_of(x.rates, marks, read_after_write)
    after, seen, errors = _write(memory, only(x.k), only(x.v), c, last)
    return after, only(_read(memory, only(x.q), c, seen, errors)) if reads else jnp.zeros_like(x.v)


def _write(
    memory: tuple[Layer, ...],
    k: Float[Array, "n D"],
    v: Float[Array, "n V"],
    c: Rates,
    last: Array,
) -> tuple[tuple[tuple[Array, Array], ...], list[Array], list[Array]]:
    """(M, S) of every layer after the group's last token; what the layers saw of the keys, and their errors.

    Args:
      memory: as the group enters it.
      k, v: zero for tokens of other groups.
    """
    seen, slopes, x = [k], [], k
    for layer in memory[:-1]:
        z = dot(x, layer.frozen, (1, 0))
        x, slope = jax.jvp(activation, (z,), (jnp.ones_like(z),))
        seen.append(x)
        slopes.append(slope)
    errors = [2.0 * (dot(x, memory[-1].frozen, (1, 0)) - v)]
    for layer, slope in zip(memory[:0:-1], slopes[::-1], strict=True):
        errors.append(dot(errors[-1], layer.frozen, (1, 1)) * slope)
    errors = errors[::-1]

    here = jax.lax.broadcasted_iota(jnp.int32, c.beta.shape, 0) == last
    pick = lambda x: jnp.sum(jnp.where(jnp.broadcast_to(here, x.shape), x, 0.0), axis=0, keepdims=True)
    beta, f, m = pick(c.beta_after), pick(c.f_after), pick(c.m_after)
    G, n = column(pick(c.G_after)), column(pick(c.n_after))
    after = tuple(
        (beta * layer.M + f * layer.S - dot(a, G * error, (0, 0)), m * layer.S - dot(a, n * error, (0, 0)))
        for layer, a, error in zip(memory, seen, errors, strict=True)
    )
    return after, seen, errors


def _read(
    memory: tuple[Layer, ...], q: Float[Array, "n D"], c: Rates, seen: list[Array], errors: list[Array]
) -> Float[Array, "n V"]:
    """What every token of the group reads; `seen` and `errors` from `_write`."""
    x = q
    for i, (layer, a, error) in enumerate(zip(memory, seen, errors, strict=True)):
        x = activation(x) if i else x
        written = dot(c.G * dot(x, a, (1, 1)), error, (1, 0))
        x = c.beta * dot(x, layer.M, (1, 0)) + c.f * dot(x, layer.S, (1, 0)) - written
    return x
