"""The Hopper backend of `probe`: normalisers first, then the weights once for each kind of sum that is asked for.

Products are of bfloat16 with f32 sums. Nothing is added up in an order that depends on timing: equal calls give equal
bits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.masks import Visibility
from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels._dispatch import interpret_for
from pallas_kernels.flash.gpu import blocked
from pallas_kernels.flash.gpu_biases import gathered, in_units, settings
from pallas_kernels.flash.gpu_tiles import LOG2E, WIDTHS, Plan
from pallas_kernels.flash.reference import NEVER
from pallas_kernels.flash.score import Score
from pallas_kernels.probe.gpu_rows import block_sums, first
from pallas_kernels.probe.gpu_sums import columns, diagonals
from pallas_kernels.probe.gpu_tiles import KEYS, MOST_KEYS, QUERIES, Inputs
from pallas_kernels.probe.stats import OVER_KEYS, Stats
from pallas_kernels.probe.xla import row_stats, widened

BLOCKS = (8, 16, 32, 64)  # and multiples of 128


def unfit(q: Array, k: Array, want: frozenset[str], block: int) -> str | None:
    """Why this backend cannot serve a call, or None."""
    if reason := mg.missing() or mg.inexact(q=q, k=k):
        return reason
    if q.shape[3] > WIDTHS[-1]:
        return f"backend 'gpu' has head dims up to {WIDTHS[-1]} but q has {q.shape[3]}: use 'xla'."
    if k.shape[1] > MOST_KEYS:
        return f"backend 'gpu' counts {MOST_KEYS} keys but there are {k.shape[1]}: use 'xla'."
    if want & {"blocks", "block_max"} and block not in BLOCKS and block % KEYS:
        sizes = ", ".join(map(str, BLOCKS))
        return f"backend 'gpu' sums blocks of {sizes} or a multiple of {KEYS} keys but block is {block}: take one."
    return None


def probe_gpu(
    q: Float[Array, "B P H D"],
    k: Float[Array, "B S K D"],
    vis: Visibility,
    *,
    scale: float,
    want: frozenset[str],
    block: int,
    key_bias: Float[Array, "B n S"] | None = None,
) -> Stats:
    """See `pallas_kernels.probe.probe`.

    Raises:
      NotImplementedError: see `unfit`, or the process computes on another platform.
    """
    if reason := unfit(q, k, want, block):
        raise NotImplementedError(f"probe: {reason}")
    interpret = mg.mode(interpret_for("probe", "gpu"))
    batch, count, heads, _ = q.shape
    keys = k.shape[1]
    plan = Plan(
        score=Score(),
        scale=float(scale),
        group=heads // k.shape[2],
        causal=vis.causal,
        window=vis.window,
        has_prefix=vis.prefix_len is not None,
        aligned=vis.aligned,
        stats=False,
        staged=mg.simulated(),
        interpret=interpret,
        **settings(k, None, key_bias, heads // k.shape[2]),
    )
    vis = widened(vis, batch, count, keys).pad_rows(-count % QUERIES).pad_columns(-keys % KEYS)
    biases = in_units(plan, gathered(k, None, key_bias, -keys % KEYS))
    inputs = Inputs(plan, vis, blocked(q, QUERIES), blocked(k, KEYS), biases)
    top, mass, index = first(inputs)
    some = mass > 0
    share = jnp.where(some, 1.0 / jnp.where(some, mass, 1.0), 0.0)  # the weight of a row's largest score
    lse = jnp.where(some, top / LOG2E + jnp.log(jnp.where(some, mass, 1.0)), NEVER)
    row = lambda x: x[:, :, :count]
    stats = row_stats(row(lse), row(share), row(jnp.where(some, index, -1.0)).astype(jnp.int32), want)
    if not want & OVER_KEYS:
        return stats
    kept = jnp.stack([top, share], axis=2)
    over_keys: dict[str, Any] = {}
    if "columns" in want:
        over_keys["columns"] = columns(inputs, kept)[:, :, :keys]
    if "diagonals" in want:
        over_keys["diagonals"] = diagonals(inputs, kept, keys)
    if want & {"blocks", "block_max"}:
        for name, x in block_sums(inputs, kept, want, block).items():
            over_keys[name] = x[:, :, :count, : -(-keys // block)]
    return dataclasses.replace(stats, **over_keys)
