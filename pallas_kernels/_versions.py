"""What the JAX versions that kernels run on call differently: nothing else asks which version it is.

The declared range is tested at 0.10.2, 0.11.2 and the newest release. A name that an older one lacks gets its other
form here, and goes when that version does.
"""

from __future__ import annotations

import inspect
from typing import Any

import jax

SINCE = {  # the oldest JAX that each backend is proved on
    "reference": (0, 10, 2),
    "xla": (0, 10, 2),
    "tpu": (0, 10, 2),
    "gpu": (0, 11, 2),  # older ones have no simulator of GPUs, or miss more names
}


def oldest(backend: str) -> str:
    """The oldest JAX that a backend runs on, as it is written."""
    return ".".join(map(str, SINCE[backend]))


def too_old_for_gpus() -> str | None:
    """Why this JAX builds no kernels for GPUs, or None."""
    if jax.__version_info__ >= SINCE["gpu"]:
        return None
    return f"backend 'gpu' needs JAX {oldest('gpu')} or newer but this is {jax.__version__}: use 'xla'."


def store(api: Any, ref: Any, value: jax.Array) -> None:
    """Stores registers as many numbers at a time as each thread has side by side; `api` is the module `mosaic_gpu`."""
    if hasattr(api, "store"):
        api.store(ref, value, optimized=False)
    else:  # before 0.12 an assignment does not insist on wide stores
        ref[...] = value


def with_cost(kernel: Any, cost: Any) -> dict[str, Any]:
    """The argument by which `plgpu.kernel` takes an estimate of its cost, where it does."""
    return {"cost_estimate": cost} if "cost_estimate" in inspect.signature(kernel).parameters else {}
