"""What a probe can report."""

from __future__ import annotations

from collections.abc import Iterable

from flax import struct

from jaxattn.errors import ConfigError
from jaxattn.types import Leaf

NAMES = ("lse", "top", "columns", "diagonals", "blocks", "block_max")
OVER_KEYS = frozenset({"columns", "diagonals", "blocks", "block_max"})  # need the weights, so a second pass


@struct.dataclass
class Stats:
    """Reductions of the softmax rows of P probe queries over S keys, f32; None where not asked for.

    With w[p, s] the weight of key s for query p (rows that see nothing have weights 0):
    """

    lse: Leaf = None  # [B, P, H]: log of the normaliser; -1e30 where nothing is seen
    top_index: Leaf = None  # [B, P, H] int32: the key with the largest weight, the first of equals; -1: nothing seen
    top_weight: Leaf = None  # [B, P, H]: its weight
    columns: Leaf = None  # [B, H, S]: Σ_p w[p, s]
    diagonals: Leaf = None  # [B, H, S]: at o the sum of w over pairs with query position - key position = o
    blocks: Leaf = None  # [B, H, P, N]: sums over blocks of keys, the last one may be short
    block_max: Leaf = None  # [B, H, P, N]: the largest weight in the block


def wanted(want: Iterable[str]) -> frozenset[str]:
    """The names as a set.

    Raises:
      ConfigError: one is unknown, or there is none.
    """
    names = frozenset([want] if isinstance(want, str) else want)
    if not names or names - set(NAMES):
        raise ConfigError(f"want is {sorted(names)} but must name some of {', '.join(NAMES)}.")
    return names
