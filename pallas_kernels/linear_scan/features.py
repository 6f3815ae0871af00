"""BASED's feature map: the second-order Taylor polynomial of exp(x·y) as an inner product (arXiv 2402.18668)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

MAPS = ("symmetric", "full")


def feature_width(dim: int, map: str) -> int:
    """D' = 1 + D + (D² or D(D+1)/2)."""
    return 1 + dim + (dim * dim if map == "full" else dim * (dim + 1) // 2)


def taylor(x: Float[Array, "*b D"], map: str) -> Float[Array, "*b F"]:
    """[1, x, products of two entries]: the inner product of two of them is 1 + x·y + (x·y)²/2."""
    dim = x.shape[-1]
    if map == "full":
        pairs = (x[..., :, None] * x[..., None, :] * 0.5**0.5).reshape(*x.shape[:-1], dim * dim)
    else:
        rows, columns = np.triu_indices(dim)
        pairs = x[..., rows] * x[..., columns] * jnp.asarray(np.where(rows == columns, 0.5**0.5, 1.0), x.dtype)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, pairs], axis=-1)


def selections(dim: int, map: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The map as products of matrices: taylor(x) = weight · (y @ first) · (y @ second), y = [x, 1, 0, ...].

    Args:
      width: rows of the matrices, the length of y; at least dim + 1.

    Returns:
      first and second side by side, of zeros and ones, [width, 2, F], and weight [F].
    """
    if map == "full":
        rows, columns = (i.reshape(-1) for i in np.indices((dim, dim)))
        weights = np.full(dim * dim, 0.5**0.5)
    else:
        rows, columns = np.triu_indices(dim)
        weights = np.where(rows == columns, 0.5**0.5, 1.0)
    one = np.full(1 + dim, dim)  # where y is 1: of the first feature both factors, of the next the second one
    first = np.concatenate([[dim], np.arange(dim), rows])
    second = np.concatenate([one, columns])
    picks = np.stack([first, second])[None] == np.arange(width)[:, None, None]
    return picks.astype(np.float32), np.concatenate([np.ones(1 + dim), weights]).astype(np.float32)
