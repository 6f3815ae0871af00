"""Landmark tokens that the model inserts itself: where they go, and how tokens come back out.

After every f tokens of a document, by position, comes one landmark (arXiv 2305.16300). Token p moves to position
p + p // f and the landmark takes the position behind it, so every (f+1)-th position of a document is a landmark.
Shapes stay static: a row of T tokens gets T + ceil(T / f) places, and those that are left over are padding.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from jaxattn.errors import ConfigError
from jaxattn.masks import PADDING
from jaxattn.mechanisms import resolve_mixer
from jaxattn.types import Leaf


@struct.dataclass
class Insertion:
    """The lengthened stream of W = T + ceil(T / f) places.

    A row whose landmarks do not fit (only documents that start inside a block, several to a row, can need more)
    has `fits` False, and `lengthen` makes it NaN.
    """

    places: Leaf  # [B, T], where each token went
    source: Leaf  # [B, W], the token of each place; T for a landmark, T + 1 for nothing
    positions: Leaf  # [B, W], landmarks counted
    segments: Leaf  # [B, W]
    ordinary: Leaf  # [B, W], positions without landmarks; a landmark shares its predecessor's
    fits: Leaf  # [B]

    def lengthen(self, x: Array, landmark: Array) -> Array:
        """Tokens x [B,T,E] and the landmark [E] in their places [B,W,E]; nothing is zeros."""
        batch, width = x.shape[0], x.shape[2]
        rows = [x, jnp.broadcast_to(landmark.astype(x.dtype), (batch, 1, width)), jnp.zeros((batch, 1, width), x.dtype)]
        long = _take(jnp.concatenate(rows, axis=1), self.source)
        return jnp.where(self.fits[:, None, None], long, jnp.nan)

    def shorten(self, x: Array) -> Array:
        """Of x [B,W,...], what belongs to tokens, [B,T,...]."""
        return _take(x, self.places)


def insert(positions: Int[Array, "B T"], segments: Int[Array, "B T"], every: int) -> Insertion:
    """Plan a landmark behind every token whose position is f-1, 2f-1, ... in its document."""
    length = positions.shape[1]
    wide = length + -(-length // every)
    followed = (segments != PADDING) & (positions % every == every - 1)
    before = jnp.cumsum(followed, axis=1, dtype=jnp.int32) - followed
    places = jnp.arange(length, dtype=jnp.int32) + before

    def row(places: Array, followed: Array) -> Array:
        source = jnp.full(wide, length + 1, jnp.int32).at[places].set(jnp.arange(length, dtype=jnp.int32), mode="drop")
        return source.at[jnp.where(followed, places + 1, wide)].set(length, mode="drop")

    source = jax.vmap(row)(places, followed)
    token = source < length
    # A landmark reads its facts from the token in front of it, which is always there.
    at = jnp.where(token, source, jnp.roll(source, 1, axis=1))
    here = source <= length
    fact = lambda x: jnp.where(here, _take(x, jnp.minimum(at, length - 1)), 0)
    ordinary = fact(positions)
    return Insertion(
        places=places,
        source=source,
        positions=jnp.where(here, ordinary + ordinary // every + ~token, 0),
        segments=fact(segments),
        ordinary=ordinary,
        fits=places[:, -1] + followed[:, -1] < wide,
    )


def insertion_block(mixers: tuple[str, ...]) -> int:
    """f of a model whose layers are `mixers`; 0 where nobody wants landmarks.

    Raises:
      ConfigError: two layers want different ones.
    """
    wanted = {}
    for text in mixers:
        choice = resolve_mixer(text)
        block = choice.mechanism.block(choice.spec) if choice.mechanism else 0
        if block:
            wanted.setdefault(block, text)
    if len(wanted) > 1:
        raise ConfigError(
            f"{' and '.join(wanted.values())} insert landmarks after {' and '.join(map(str, wanted))} tokens, but a "
            f"model has one stream: give all of them block={min(wanted)}."
        )
    return next(iter(wanted), 0)


def landmark_labels(
    tokens: Int[Array, "B T"], landmark: int, ignore: tuple[int, ...] = ()
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Next-token labels of token files that already carry landmarks, as the paper trained from scratch.

    The label of a token in front of a landmark is the token behind it. No label, hence no loss: at landmarks, at
    tokens in `ignore` (the paper: end of text), and where the row ends first.
    """
    following = lambda x, n: jnp.pad(x[:, n:], ((0, 0), (0, min(n, x.shape[1]))), constant_values=landmark)
    skip = following(tokens, 1) == landmark
    labels = jnp.where(skip, following(tokens, 2), following(tokens, 1))
    silent = jnp.isin(tokens, np.asarray((landmark, *ignore)))
    return labels, (labels != landmark) & ~silent


def _take(x: Array, index: Array) -> Any:
    """x[b, index[b]] along the second axis; an index past the end, of a row that does not fit, reads the last."""
    return jax.vmap(lambda row, i: row[jnp.minimum(i, row.shape[0] - 1)])(x, index)
