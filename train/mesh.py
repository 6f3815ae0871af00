"""Data parallelism over every device of every process: batches split, parameters replicated."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxattn.errors import ConfigError
from jaxattn.nn.sharding import DATA


def data_mesh(batch_size: int, micro_batches: int = 1) -> Mesh:
    """One Auto axis ``data`` over all devices.

    Raises:
      ConfigError: the devices do not divide a micro-batch.
    """
    count = jax.device_count()
    if batch_size // micro_batches % count:
        raise ConfigError(
            f"data.batch_size {batch_size} in {micro_batches} micro-batches does not split over {count} devices; "
            f"make data.batch_size a multiple of {count * micro_batches}."
        )
    return jax.make_mesh((count,), (DATA,), axis_types=(AxisType.Auto,))


def inside(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """Where programs know the mesh, so that kernels split over its devices; nothing for a single device."""
    return jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext()


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The same value on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows -> the global batch, split over ``data``."""
    sharding = NamedSharding(mesh, PartitionSpec(DATA))
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
