"""What the Hopper kernel of the scan does with one chunk's numbers: sizes, weights of scores, tiles in registers."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels import _mosaic_gpu as mg

CHUNK = 64  # tokens; the rows of a product
WORKERS = 2  # computing warpgroups of a block of threads
HALF = CHUNK // WORKERS  # columns of scores of one of them
# What there is for every token, beside a, b and c. What rows and columns of a tile both need is there twice: loads
# of one number for both would be merged by the compiler, which then finds no layout that suits both.
FADE, BOOST, DOCUMENT, AGAIN, READ, WRITE = range(6)


def weighed(
    scores: Float[Array, "64 n"], tokens: Any, first: Any, *, scale: float, decay: bool, reverse: bool
) -> Float[Array, "64 n"]:
    """scale · scores · how much of a column's token a row's token still sees.

    Args:
      tokens: ref [6, 64] of the chunk.
      first: the chunk's token in the first column.
    """
    row, column = (mg.places(scores.shape, axis) for axis in (0, 1))
    column = column + first
    of_row = lambda n: mg.down(mg.load_rows(tokens.at[n]), scores.shape[1])
    of_column = lambda n: mg.across(mg.load_columns(tokens.at[n, pl.ds(first, scores.shape[1])]), CHUNK)
    see = column >= row if reverse else column <= row
    see &= of_row(DOCUMENT) == of_column(AGAIN)
    scores = scores * scale
    if decay:  # what is not seen may be infinite here
        scores = scores * jnp.exp2(of_row(FADE) + of_column(BOOST))
    return jnp.where(see, scores, 0.0)
