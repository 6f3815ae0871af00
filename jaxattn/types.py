"""The axis legend: one letter per axis, in type strings, einsum strings and documentation.

B batch · T query length · S key length · H query heads · K key/value heads · G = H/K query heads per
key head · D key dim · V value dim · E model dim · F feed-forward dim · C chunk · L layers · P slots
(constant keys in front of the sequence) · N vocabulary.

Public border layout is always ``[B, T, H, D]``. Positions and segment ids are explicit ``[B, T]``
integers; segment 0 is padding, segment `GLOBAL` marks keys that every live query sees.
"""

from __future__ import annotations

from typing import Any, Literal

from jaxtyping import Array, Bool, Float, Int

Queries = Float[Array, "B T H D"]
Keys = Float[Array, "B S K D"]
Values = Float[Array, "B S K V"]
Outputs = Float[Array, "B T H V"]
Weights = Float[Array, "B H T S"]
Scores = Float[Array, "B H T S"]
Visible = Bool[Array, "B T S"]
TokenIds = Int[Array, "B T"]
Params = dict[str, Any]
Backend = Literal["auto", "xla", "reference", "gpu", "tpu"]

# A field of a pytree dataclass: usually an array, but JAX also rebuilds trees around placeholders, so a
# shape annotation there would be checked against things that are no arrays. The comment gives the shape.
Leaf = Any
