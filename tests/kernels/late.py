"""Warpgroups or copies that are late: the simulator misses races of products, which a delay shows as wrong values."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from pallas_kernels import _mosaic_gpu as mg
from tests.kernels.simulators import simulator


def delay(monkeypatch: Any, name: str, only: int | None = None, *, seconds: float = 0.03) -> Any:
    """Makes `_mosaic_gpu.<name>` slow, of one warpgroup or of all, and returns a simulator whose memory holds nan."""
    do = getattr(mg, name)

    def sleep(_: Any, wg: Any = None) -> Any:
        time.sleep(seconds if only is None or wg == only else 0.0)
        return np.int32(1)

    def slow(*args: Any, **more: Any) -> Any:
        """The outcome decides what is done next, so that nothing is done before it is there."""
        who = () if only is None else (jax.lax.axis_index("wg"),)
        slept = io_callback(sleep, jax.ShapeDtypeStruct((), jnp.int32), _so_far(args), *who)
        return jax.lax.cond(slept > 0, lambda: do(*args, **more), lambda: do(*args, **more))

    monkeypatch.setattr(mg, name, slow)
    return simulator("gpu")


def _so_far(args: tuple[Any, ...]) -> Any:
    """A number of the sums that are added to, if any: without it the delay would begin, and end, a step earlier."""
    first = args[0] if args else None
    first = first[0] if isinstance(first, tuple) else first
    return first[0, 0] if isinstance(first, jax.Array) else jnp.float32(0)
