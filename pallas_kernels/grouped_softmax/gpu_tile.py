"""The two levels of the softmax on one tile of slots in the registers of a warpgroup: 64 queries, keys in columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels.flash.gpu_tiles import LOG2E, WGS
from pallas_kernels.flash.rows import FLOOR
from pallas_kernels.grouped_softmax import layout
from pallas_kernels.grouped_softmax.layout import FIRST, OWN, SEEN

EIGHT = 8  # columns that products of a warpgroup come in


@dataclasses.dataclass(frozen=True)
class Plan(layout.Plan):
    """All that is known before the kernels are compiled; a slot is a power of two.

    staged: products read their left operand from shared memory, as the simulator wants it.
    """

    staged: bool

    def tiled(self, columns: int) -> Plan:
        """The same pages in smaller tiles, of about so many columns."""
        slots = max(columns // self.slot, 1)
        return dataclasses.replace(self, slots=slots, tiles=self.page // slots)

    @property
    def alone(self) -> bool:
        """Whether each computing warpgroup weighs all queries of a step for itself, as they are so few."""
        return self.block_q == mg.ROWS

    def cost(self, q: Array, keys: int, *, products: tuple[int, int], moved: int, fetched: int) -> pl.CostEstimate:
        """Work of the tiles visited in one page by all heads of q [B, T, H, D].

        Args:
          keys: S.
          products: matrix products of a tile, each over or into D columns: those that every warpgroup does which
            weighs it, and the others.
          moved: bytes of everything that is read or written once.
          fetched: bytes that are fetched for every tile.
        """
        tiles = q.shape[0] * q.shape[2] * self.visits(q.shape[1], keys)
        scores = tiles * self.block_q * self.tile
        weighed = scores * (WGS if self.alone else 1)
        return pl.CostEstimate(
            flops=2 * (weighed * products[0] + scores * products[1]) * q.shape[3],
            transcendentals=weighed,
            bytes_accessed=moved + tiles * fetched,
        )


class Slot(NamedTuple):
    """What the queries of a tile see of one slot. Its weights are e · `share` of the gate's 2^(base - log2 Z).

    e: 2^(score - highest), zero for tokens that are not seen and at the landmark.
    z: sum of e.
    base: score of the slot for the gate, in powers of two; -inf where it is not seen.
    own: whether it is the query's own.
    """

    e: Float[Array, "m slot"]
    z: Float[Array, "m"]
    base: Float[Array, "m"]
    own: Array

    def mass(self, gate: Float[Array, "m"]) -> Float[Array, "m"]:
        """What the slot adds to the gate's denominator, from 2^(base - any number)."""
        return jnp.where(self.own, gate * self.z, gate)

    def share(self, gate: Float[Array, "m"]) -> Float[Array, "m"]:
        """What e is multiplied by: an earlier block has one weight, its landmark's, to give away."""
        return jnp.where(self.own, gate, gate / jnp.where(self.z > 0.0, self.z, 1.0))


def pieces(plan: Plan, s: Float[Array, "m n"]) -> list[Array]:
    """A tile's columns by slots."""
    return [jax.lax.slice(s, (0, at), (s.shape[0], at + plan.slot)) for at in range(0, s.shape[1], plan.slot)]


def _columns(rows: int) -> Array:
    """[rows, 8]: the number of the column."""
    return mg.places((rows, EIGHT), 1)


def _masked(x: Float[Array, "m n"], limit: Array) -> Float[Array, "m n"]:
    """-inf from column `limit` on. A few columns at a time, which share the registers of their numbers."""
    numbers = _columns(x.shape[0])

    def part(at: int) -> Array:
        here = jax.lax.slice(x, (0, at), (x.shape[0], at + EIGHT))
        return jnp.where(numbers < mg.down(limit - at, EIGHT), here, -jnp.inf)

    return joined([part(at) for at in range(0, x.shape[1], EIGHT)])


def levels(plan: Plan, s: Float[Array, "m n"], tokens: Sequence[Any], at: Any, first: Any) -> list[Slot]:
    """The slots of a tile.

    Args:
      s: q·k.
      tokens: ordinary tokens of each slot, -1 without landmark.
      at: ref [3, m], rows FIRST, OWN, SEEN of the queries.
      first: number of the first slot.
    """
    s, factor = (s, plan.scale * LOG2E) if plan.scale > 0 else (s * (plan.scale * LOG2E), 1.0)
    begins, mine, seen = (mg.load_rows(at.at[n]) for n in (FIRST, OWN, SEEN))

    def one(n: int, piece: Array) -> Slot:
        number = first + n
        own = mine == number
        past = (begins <= number) & (mine > number) & (tokens[n] >= 0)
        limit = jnp.where(own, seen, tokens[n])
        x = _masked(piece, limit)
        top = jnp.maximum(jnp.max(x, axis=1), FLOOR) * factor
        e = jnp.exp2(x * factor - mg.down(top, plan.slot))
        end = jax.lax.slice(piece, (0, plan.slot - EIGHT), piece.shape)
        landmark = jnp.sum(jnp.where(_columns(len(end)) == EIGHT - 1, end, 0.0), axis=1) * factor
        base = jnp.where(own, top, jnp.where(past, landmark, -jnp.inf))
        return Slot(e, jnp.sum(e, axis=1), base, own)

    return [one(n, piece) for n, piece in enumerate(pieces(plan, s))]


def weights(plan: Plan, found: Sequence[Slot], log_z: Float[Array, "m"]) -> tuple[Float[Array, "m n"], list[Array]]:
    """A of a tile, and the slots' weights in the gate, each [m]; relative to 2^log_z."""
    gates = [jnp.exp2(slot.base - log_z) for slot in found]
    each = zip(found, gates, strict=True)
    return joined([slot.e * mg.down(slot.share(gate), plan.slot) for slot, gate in each]), gates


def gradients(
    plan: Plan, found: Sequence[Slot], gates: list[Array], a: Float[Array, "m n"], dp: Float[Array, "m n"], delta: Array
) -> Float[Array, "m n"]:
    """Gradients of the scaled scores of a tile, in the form of `tpu_backward`.

    Args:
      gates, a: from `weights`.
      dp: do·v.
      delta: do·o - d log Z.
    """

    def one(slot: Slot, gate: Array, a: Array, dp: Array) -> Array:
        bought = jnp.sum(a * dp, axis=1)  # by the landmark, for the whole block
        centre = jnp.where(slot.own, delta, bought / jnp.where(gate > 0.0, gate, 1.0))
        return _with_last(a * (dp - mg.down(centre, plan.slot)), jnp.where(slot.own, 0.0, bought - gate * delta))

    return joined([one(*x) for x in zip(found, gates, pieces(plan, a), pieces(plan, dp), strict=True)])


def _with_last(x: Float[Array, "m n"], value: Float[Array, "m"]) -> Float[Array, "m n"]:
    """The tile with another last column."""
    at = x.shape[1] - EIGHT
    end = jax.lax.slice(x, (0, at), x.shape)
    end = jnp.where(_columns(len(x)) == EIGHT - 1, mg.down(value, EIGHT), end)
    return joined([jax.lax.slice(x, (0, 0), (len(x), at)), end])


def tokens_of(plan: Plan, tokens: Any, batch: Any, tile: Any) -> list[Any]:
    """`levels(tokens=)` from device memory, [batch · slots of a page]."""
    return [tokens[batch * plan.page + tile * plan.slots + n] for n in range(plan.slots)]


def joined(parts: Sequence[Array]) -> Array:
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def in_slots(x: Float[Array, "B n K D"], index: Int[Array, "B m"]) -> Float[Array, "B m K D"]:
    """The rows at `index`, zero where it is out of range."""
    return jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0))(x, index)
