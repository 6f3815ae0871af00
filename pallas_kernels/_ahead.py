"""TPUs that programs are compiled for ahead of time, without one: described by their compiler (extra `tpu`)."""

from __future__ import annotations

import os
from typing import Any

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
QUIET = {  # for the TPU's compiler: ask no cloud's servers
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def tpu_devices(chip: str) -> list[Any]:
    """Four devices of a chip, a key of `TOPOLOGIES`; sets the variables of `QUIET` that are not set.

    Raises:
      RuntimeError: libtpu is not installed.
    """
    from jax.experimental import topologies

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices)
