"""Threads for the simulator of GPUs: each simulated warpgroup holds one of those of JAX's CPU client."""

from __future__ import annotations

import os

from jax._src import xla_bridge

if not xla_bridge.backends_are_initialized():  # later it would change nothing, and the simulator wait for ever
    os.environ.setdefault("NPROC", "8")
