"""Position encodings as plain functions: rotary, sinusoid, ALiBi and relative biases.

Biases are small callables ``bias(q_positions [B,T], k_positions [B,S]) -> [B or 1, H or 1, T, S]`` in
f32, evaluated block by block, so no T×T array exists outside a block.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxattn.types import Leaf

PositionBias = Callable[[Int[Array, "B T"], Int[Array, "B S"]], Float[Array, "b h T S"]]


def rotary_tables(
    positions: Int[Array, "B T"], head_dim: int, base: float, fraction: float = 1.0
) -> tuple[Float[Array, "B T 1 R"], Float[Array, "B T 1 R"]]:
    """cos and sin of the rotary angles in f32, R = rotated dims / 2 (arXiv 2104.09864, Eq. 34).

    Args:
      base: theta; pair m of R turns by position · base^(-m/R).
      fraction: share of the head dim that is rotated (the first dims), rounded down to an even count.
    """
    half = int(head_dim * fraction) // 2
    freq = base ** (-jnp.arange(half, dtype=jnp.float32) / max(half, 1))
    angle = positions[:, :, None, None].astype(jnp.float32) * freq
    # A loop of two steps, because XLA's CPU backend fuses (and repeats) cosines into whatever reads them.
    cos, sin = jax.lax.map(lambda odd: jnp.where(odd, jnp.sin(angle), jnp.cos(angle)), jnp.array([False, True]))
    return cos, sin


def rotate(
    x: Float[Array, "B T H D"], tables: tuple[Float[Array, "B T 1 R"], Float[Array, "B T 1 R"]]
) -> Float[Array, "B T H D"]:
    """Turn the first 2R dims, half-split pairing (dim m with dim m + R); the rest passes through."""
    cos, sin = (jnp.swapaxes(t, 1, 2)[..., None, :] for t in tables)  # [B, 1, T, 1, R]
    half = cos.shape[-1]
    if half == 0:
        return x
    # Heads first, as the kernels want them (their own swap cancels this one); pairs by a flip of an
    # axis of two, because concatenating halves is slow inside XLA's CPU fusions.
    y = jnp.swapaxes(x, 1, 2)
    pair = y[..., : 2 * half].astype(jnp.float32).reshape(*y.shape[:-1], 2, half)
    sign = jnp.array([[-1.0], [1.0]], jnp.float32)
    turned = (pair * cos + pair[..., ::-1, :] * (sin * sign)).reshape(*y.shape[:-1], 2 * half).astype(x.dtype)
    y = turned if 2 * half == x.shape[-1] else jnp.concatenate([turned, y[..., 2 * half :]], axis=-1)
    return jnp.swapaxes(y, 1, 2)


@dataclasses.dataclass(frozen=True)
class Rope:
    """A rotary encoding by its numbers, for mechanisms that choose positions themselves."""

    base: float
    fraction: float = 1.0

    def __call__(self, x: Float[Array, "B T H D"], positions: Int[Array, "B T"]) -> Float[Array, "B T H D"]:
        return rotate(x, rotary_tables(positions, x.shape[-1], self.base, self.fraction))


def sinusoid(positions: Int[Array, "B T"], dim: int, base: float = 10_000.0) -> Float[Array, "B T E"]:
    """Fixed encoding with halves [sin | cos] (arXiv 1706.03762 §3.5, in the sink study's layout)."""
    half = dim // 2
    freq = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None].astype(jnp.float32) * freq
    table = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return jnp.pad(table, ((0, 0), (0, 0), (0, dim - 2 * half)))


def alibi_slopes(num_heads: int) -> Float[Array, "H"]:
    """Geometric slopes 2^(-8h/n) (arXiv 2108.12409); other counts interleave the next power of two."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    extra = [2.0 ** (-4.0 * (2 * h + 1) / power) for h in range(num_heads - power)]
    return jnp.asarray(slopes + extra, jnp.float32)


@struct.dataclass
class Alibi:
    """-slope_h · |i - j|, the full distance: elementwise scores are not shift invariant."""

    slopes: Leaf  # [H]

    def __call__(self, q_pos: Int[Array, "B T"], k_pos: Int[Array, "B S"]) -> Float[Array, "b h T S"]:
        distance = jnp.abs(q_pos[:, None, :, None] - k_pos[:, None, None, :]).astype(jnp.float32)
        return -self.slopes[None, :, None, None] * distance


def relative_bucket(distance: Int[Array, "*s"], buckets: int = 32, max_distance: int = 128) -> Int[Array, "*s"]:
    """T5's causal bucket of a distance i - j >= 0: half exact, half logarithmic (arXiv 1910.10683)."""
    distance = jnp.maximum(distance, 0)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1) / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (buckets - exact)).astype(jnp.int32)
    return jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))


@struct.dataclass
class RelativeBias:
    """A learned per-head value for each distance bucket, table [buckets, H]."""

    table: Leaf  # [buckets, H]

    def __call__(self, q_pos: Int[Array, "B T"], k_pos: Int[Array, "B S"]) -> Float[Array, "b h T S"]:
        bucket = relative_bucket(q_pos[:, :, None] - k_pos[:, None, :], self.table.shape[0])
        return jnp.moveaxis(self.table.astype(jnp.float32)[bucket], -1, 1)


@struct.dataclass
class RawRelativeBias:
    """The bucket INDEX itself added to the score, unlearned: what the sink study's code ran.

    Far keys gain up to buckets - 1, which rewards distance; kept to reproduce that table's row.
    """

    buckets: int = struct.field(pytree_node=False, default=32)

    def __call__(self, q_pos: Int[Array, "B T"], k_pos: Int[Array, "B S"]) -> Float[Array, "b h T S"]:
        distance = q_pos[:, None, :, None] - k_pos[:, None, None, :]
        return relative_bucket(distance, self.buckets).astype(jnp.float32)
