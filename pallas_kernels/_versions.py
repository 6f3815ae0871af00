"""What the JAX versions that kernels run on call differently: nothing else asks which version it is.

The declared range is tested at 0.10.2, 0.11.2 and the newest release. A name that an older one lacks gets its other
form here, and goes when that version does.
"""

from __future__ import annotations

import inspect
from typing import Any

import jax

GPU_SINCE = (0, 11, 2)  # has a simulator of GPUs, and is the oldest that the kernels for GPUs are proved on


def too_old_for_gpus() -> str | None:
    """Why this JAX builds no kernels for GPUs, or None."""
    if jax.__version_info__ >= GPU_SINCE:
        return None
    return f"backend 'gpu' needs JAX {'.'.join(map(str, GPU_SINCE))} but this is {jax.__version__}: use 'xla'."


def store(api: Any, ref: Any, value: jax.Array) -> None:
    """Stores registers as many numbers at a time as each thread has side by side; `api` is the module `mosaic_gpu`."""
    if hasattr(api, "store"):
        api.store(ref, value, optimized=False)
    else:  # before 0.12 an assignment does not insist on wide stores
        ref[...] = value


def with_cost(kernel: Any, cost: Any) -> dict[str, Any]:
    """The argument by which `plgpu.kernel` takes an estimate of its cost, where it does."""
    return {"cost_estimate": cost} if "cost_estimate" in inspect.signature(kernel).parameters else {}
