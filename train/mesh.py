"""Data parallelism over every device of every process: batches split, parameters replicated."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxattn.errors import ConfigError


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
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The same value on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows -> the global batch, split over ``data``."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
