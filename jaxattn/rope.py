"""Position encodings as plain functions: rotary, sinusoid, ALiBi and relative biases.

Biases are small callables ``bias(q_positions [B,T], k_positions [B,S]) -> [B or 1, H or 1, T, S]`` in
f32, evaluated block by block, so no T×T array exists outside a block.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxattn.errors import ConfigError
from jaxattn.types import Leaf

PositionBias = Callable[[Int[Array, "B T"], Int[Array, "B S"]], Float[Array, "b h T S"]]


MOST_POSITIONS = 2**31 - 1  # positions are int32

Scaling = Literal["none", "linear", "dynamic", "yarn", "llama3", "longrope"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary angles are stretched beyond the context a model was trained at.

    linear   every angle / factor (position interpolation, arXiv 2306.15595)
    dynamic  a larger base once a sequence is longer than `original_length`, by its length ("NTK-aware")
    yarn     slow pairs / factor, fast pairs as they are, a ramp between; cos and sin times
             `attention_factor` (arXiv 2309.00071)
    llama3   slow pairs / factor, fast pairs as they are, smooth between (Llama 3.1)
    longrope every pair / its own factor, `short_factors` in sequences of up to `original_length` tokens, else
             `long_factors`; cos and sin times `attention_factor` (arXiv 2402.13753)
    """

    kind: Scaling = "none"
    """none, linear, dynamic, yarn, llama3 or longrope."""
    factor: float = 1.0
    """How many times longer the context becomes."""
    original_length: int = 0
    """Context (tokens) of the pretraining; dynamic, yarn, llama3 and longrope need it."""
    low_freq_factor: float = 1.0
    """llama3: pairs that turn fewer times than this over `original_length` are slow."""
    high_freq_factor: float = 4.0
    """llama3: pairs that turn more often than this are fast."""
    beta_fast: float = 32.0
    """yarn: turns over `original_length` from which a pair is fast."""
    beta_slow: float = 1.0
    """yarn: turns below which a pair is slow."""
    attention_factor: float = 0.0
    """yarn, longrope: factor of cos and sin; 0 is the paper's, 0.1 ln(factor) + 1 or sqrt(1 + log_original(factor))."""
    truncate: bool = True
    """yarn: round the ends of the ramp outwards to whole pairs."""
    short_factors: tuple[float, ...] = ()
    """longrope: divisor of each rotated pair's angle in sequences of up to `original_length` tokens."""
    long_factors: tuple[float, ...] = ()
    """longrope: the same in longer sequences."""

    def __post_init__(self) -> None:
        if self.kind not in typing.get_args(Scaling):
            raise ConfigError(
                f"rope_scaling.kind is {self.kind!r} but must be one of {', '.join(typing.get_args(Scaling))}."
            )
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise ConfigError(f"rope_scaling.factor is {self.factor} but must be a finite number of at least 1.")
        if self.kind in ("dynamic", "yarn", "llama3", "longrope") and self.original_length < 1:
            raise ConfigError(
                f"rope_scaling.original_length is {self.original_length} but {self.kind} needs the context of "
                "the pretraining in tokens."
            )
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"rope_scaling.low_freq_factor is {self.low_freq_factor} but must be positive and below "
                f"high_freq_factor {self.high_freq_factor}."
            )
        if self.kind == "yarn" and not all(1e-6 <= beta <= 1e6 for beta in (self.beta_slow, self.beta_fast)):
            raise ConfigError(
                f"rope_scaling.beta_fast is {self.beta_fast} and beta_slow {self.beta_slow} but both must be from 1e-6 "
                "to 1e6."
            )
        if not 0 <= self.attention_factor < math.inf:
            raise ConfigError(f"rope_scaling.attention_factor is {self.attention_factor} but must be 0 or positive.")
        if self.attention_factor and self.kind not in ("yarn", "longrope"):
            raise ConfigError(
                f"rope_scaling.attention_factor is {self.attention_factor} but {self.kind} has none: leave it 0, or "
                "use longrope."
            )
        self._check_factors()

    def _check_factors(self) -> None:
        short, long = self.short_factors, self.long_factors
        if self.kind != "longrope":
            if short or long:
                raise ConfigError(f"rope_scaling.short_factors and long_factors are longrope's, not of {self.kind}.")
            return
        if not short or len(short) != len(long):
            raise ConfigError(
                f"rope_scaling.short_factors has {len(short)} numbers and long_factors {len(long)}, but longrope needs "
                "one for every rotated pair in both."
            )
        if not all(0 < x < math.inf for x in (*short, *long)):
            raise ConfigError("rope_scaling.short_factors and long_factors must be positive and finite.")
        if self.original_length < 2 and not self.attention_factor:
            raise ConfigError(
                "rope_scaling.original_length is 1 but longrope's attention_factor divides by its logarithm."
            )

    @property
    def amplitude(self) -> float:
        """The factor of cos and sin."""
        if self.attention_factor or self.kind not in ("yarn", "longrope"):
            return self.attention_factor or 1.0
        if self.kind == "yarn":
            return 0.1 * math.log(self.factor) + 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))

    @property
    def by_length(self) -> bool:
        """Whether the angles of a position depend on how long its sequence is."""
        return self.kind == "dynamic" or (self.kind == "longrope" and self.short_factors != self.long_factors)

    def reach(self, context: int) -> int:
        """Tokens that a model of this `context` can read: the longer of it and what the scaling stretches it to."""
        if self.kind == "none":
            return context
        return max(context, min(int((self.original_length or context) * self.factor), MOST_POSITIONS))


def frequencies(head_dim: int, base: float, fraction: float = 1.0, scaling: RopeScaling | None = None) -> np.ndarray:
    """Angle per position of each rotated pair, f64 [R], in a sequence of up to `original_length` tokens."""
    half = int(head_dim * fraction) // 2
    plain = base ** (-np.arange(half) / max(half, 1))
    if scaling is None or scaling.kind in ("none", "dynamic"):
        return plain
    if scaling.kind == "longrope":
        return plain / _divisors(scaling.short_factors, half)
    slow = plain / scaling.factor
    if scaling.kind == "linear":
        return slow
    turns = scaling.original_length * plain / (2 * math.pi)
    if scaling.kind == "llama3":
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    else:  # pair index at which a pair makes `beta` turns, then linear between the two
        if base == 1:
            raise ConfigError("rope_base is 1 but yarn tells pairs apart by their speed: use another base.")
        pair = lambda beta: half * math.log(scaling.original_length / (beta * 2 * math.pi)) / math.log(base)
        low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        keep = 1 - (np.arange(half) - low) / (high - low or 1e-3)
    keep = np.clip(keep, 0, 1)
    return keep * plain + (1 - keep) * slow


def _divisors(factors: tuple[float, ...], half: int) -> np.ndarray:
    if len(factors) != half:
        raise ConfigError(f"rope_scaling has factors for {len(factors)} pairs but {half} pairs are rotated.")
    return np.asarray(factors, np.float64)


def rotary_tables(
    positions: Int[Array, "B T"],
    head_dim: int,
    base: float,
    fraction: float = 1.0,
    scaling: RopeScaling | None = None,
    live: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T 1 R"], Float[Array, "B T 1 R"]]:
    """cos and sin of the rotary angles in f32, R = rotated dims / 2 (arXiv 2104.09864, Eq. 34).

    Args:
      base: theta; pair m of R turns by position · base^(-m/R).
      fraction: share of the head dim that is rotated (the first dims), rounded down to an even count.
      scaling: for contexts beyond the pretraining's. `dynamic` and `longrope` take the largest position of a row as
        its length.
      live: where there are tokens; positions elsewhere do not count as length. Default: everywhere.
    """
    freq = jnp.asarray(frequencies(head_dim, base, fraction, scaling), jnp.float32)
    if scaling is not None and scaling.by_length and freq.size:
        longest = jnp.max(positions if live is None else positions * live, axis=1)
        freq = _of_length(freq, longest[:, None, None, None] + 1, scaling)
    angle = positions[:, :, None, None].astype(jnp.float32) * freq
    # A loop of two steps, because XLA's CPU backend fuses (and repeats) cosines into whatever reads them.
    cos, sin = jax.lax.map(lambda odd: jnp.where(odd, jnp.sin(angle), jnp.cos(angle)), jnp.array([False, True]))
    amplitude = 1.0 if scaling is None else scaling.amplitude
    return (cos, sin) if amplitude == 1.0 else (amplitude * cos, amplitude * sin)


def _of_length(freq: Array, length: Array, scaling: RopeScaling) -> Array:
    """The frequencies of short sequences [R] turned into those of sequences of `length` [B, 1, 1, 1] tokens."""
    if scaling.kind == "longrope":
        ratio = np.asarray(scaling.short_factors) / np.asarray(scaling.long_factors)
        return jnp.where(length > scaling.original_length, freq * jnp.asarray(ratio, jnp.float32), freq)
    half = freq.size
    if half == 1:
        return freq
    length = jnp.maximum(length, scaling.original_length).astype(jnp.float32)
    stretch = scaling.factor * length / scaling.original_length - (scaling.factor - 1)
    return freq * stretch ** (-jnp.arange(half, dtype=jnp.float32) / (half - 1))  # base · stretch^(R/(R-1))


def _angles(positions: Array, freq: np.ndarray) -> Array:
    """positions · freq modulo whole turns, from -π to π in f32.

    Counted in whole numbers of 2^-64 turns, which wrap by themselves.
    """
    steps = [int(turn * 2.0**64) for turn in (freq / (2 * math.pi)) % 1.0]
    high, low = (jnp.asarray([n >> shift & 0xFFFFFFFF for n in steps], jnp.uint32) for shift in (32, 0))
    at = jnp.asarray(positions).astype(jnp.uint32)
    half = lambda x: (x >> 16, x & 0xFFFF)
    (a, b), (c, d) = half(at), half(low)
    carry = a * d + (b * d >> 16)
    turns = at * high + a * c + (carry >> 16) + (b * c + (carry & 0xFFFF) >> 16)  # the upper half of 64 bits
    return jax.lax.bitcast_convert_type(turns, jnp.int32).astype(jnp.float32) * (2 * math.pi / 2**32)


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
    scaling: RopeScaling = RopeScaling()

    def tables(
        self, positions: Int[Array, "B T"], head_dim: int, live: Bool[Array, "B T"] | None = None
    ) -> tuple[Array, Array]:
        """cos and sin, see `rotary_tables`."""
        return rotary_tables(positions, head_dim, self.base, self.fraction, self.scaling, live)

    def exact_tables(self, positions: Int[Array, "B T"], head_dim: int) -> tuple[Array, Array]:
        """`tables` within 1e-6 at every position of an int32, where products of floats lose the fast pairs' angles.

        Raises:
          ConfigError: angles that depend on how long a sequence is.
        """
        if self.scaling.by_length:
            raise ConfigError(f"rope_scaling.kind {self.scaling.kind} has angles of a length, not of a position alone.")
        angle = _angles(positions[:, :, None, None], frequencies(head_dim, self.base, self.fraction, self.scaling))
        amplitude = self.scaling.amplitude
        return amplitude * jnp.cos(angle), amplitude * jnp.sin(angle)

    def __call__(self, x: Float[Array, "B T H D"], positions: Int[Array, "B T"]) -> Float[Array, "B T H D"]:
        return rotate(x, self.tables(positions, x.shape[-1]))


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
