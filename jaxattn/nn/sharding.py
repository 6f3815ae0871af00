"""Kernels on several devices: each one attends for its own rows of the batch.

A compiler splits what it has written itself, but not a kernel. So where a kernel may run and a mesh with the axis
`DATA` is set (`jax.set_mesh`), attention is told to be the same function of every device's rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from pallas_kernels import may_be_kernel

DATA = "data"


def over_batch(call: Callable[[Any, Any], Array], batched: Any, shared: Any) -> Array:
    """`call(batched, shared)`, each device on its share of the leading axis of the leaves of `batched`.

    Leaves of `shared` are whole on every device. Where the devices do not divide the batch, each does all of it.
    What is no array (numbers, None) reaches `call` as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    count = 1 if mesh.empty or DATA not in mesh.axis_names else mesh.shape[DATA]
    if count == 1 or not may_be_kernel():
        return call(batched, shared)
    leaves, tree = jax.tree.flatten((batched, shared))
    split = len(jax.tree.leaves(batched))
    traced = [n for n, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
    rows = {leaves[n].shape[0] for n in traced if n < split}
    own = PartitionSpec(DATA) if all(size % count == 0 for size in rows) else PartitionSpec()

    def local(*arrays: Array) -> Array:
        now = dict(zip(traced, arrays, strict=True))
        return call(*jax.tree.unflatten(tree, [now.get(n, leaf) for n, leaf in enumerate(leaves)]))

    specs = tuple(own if n < split else PartitionSpec() for n in traced)
    return jax.shard_map(local, in_specs=specs, out_specs=own, check_vma=False)(*(leaves[n] for n in traced))
