"""An op's kernel against its float32 reference on the same numbers: outputs, every gradient, and twice the same."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import interpreted
from pallas_kernels.shapes import Shape
from scripts.bench.device.problems import Problem, problem

TOLERANCE = 2e-2  # of the largest entry; operands are rounded to 2^-9
REPEATS = 3
NO_NUMBER = 1e30  # the error of what is none


def check(name: str, shape: dict[str, Any], seed: int, simulated: bool) -> dict[str, Any]:
    """What the GPU backend gives; `right` where all of it is within `TOLERANCE` and no run differs from another.

    The reference multiplies in float32 indeed: a GPU's own products of float32 are rounded to ten bits.
    """
    task = problem(name, Shape(**shape), seed)
    with jax.default_matmul_precision("highest"):
        exact = tuple(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in task.arrays)
        expected = _numpy(jax.jit(_both(task, "reference"))(*exact))
    with interpreted("plain" if simulated else "off"):
        begun = time.monotonic()
        run = jax.jit(_both(task, "gpu")).lower(*task.arrays).compile()
        compiled = time.monotonic() - begun
        found = _numpy(run(*task.arrays))
        others = [_numpy(run(*task.arrays)) for _ in range(0 if simulated else REPEATS - 1)]
    errors = {part: _error(found[part], expected[part]) for part in expected}
    moved = max((_away(a[part], found[part]) for a in others for part in found), default=0.0)
    finite = all(np.isfinite(x[np.abs(expected[part]) < 1e29]).all() for part, x in found.items())
    return {
        "errors": errors,
        "worst": max(errors.values()),
        "moved": moved,
        "finite": finite,
        "right": finite and moved == 0.0 and max(errors.values()) <= TOLERANCE,
        "compile_s": round(compiled, 2),
        **({} if max(errors.values()) <= TOLERANCE else {"xla": _of_xla(task, expected)}),
    }


def _both(task: Problem, backend: str) -> Any:
    """Outputs by number and gradients of a sum that weighs every entry of every output differently."""

    def loss(*arrays: Any) -> Any:
        out = task.function(*arrays, backend=backend)
        parts = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum(jnp.sum(_weighed(x, n)) for n, x in enumerate(parts)), parts

    def both(*arrays: Any) -> dict[str, Any]:
        if not task.differentiable:
            return {f"output {n}": x for n, x in enumerate(loss(*arrays)[1])}
        which = tuple(range(task.differentiable))
        (_, parts), gradients = jax.value_and_grad(loss, argnums=which, has_aux=True)(*arrays)
        named = {f"gradient {n}": x for n, x in enumerate(gradients)}
        return {f"output {n}": x for n, x in enumerate(parts)} | named

    return both


def _weighed(x: Any, number: int) -> Any:
    """Numbers that mean "nothing is seen" count for nothing."""
    x = x.astype(jnp.float32)
    return jnp.where(jnp.abs(x) < 1e29, x, 0.0) * jax.random.normal(jax.random.key(number), x.shape)


def _numpy(parts: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(x.astype(jnp.float32)) for name, x in parts.items()}


def _away(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference; `NO_NUMBER` where one of two is none."""
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    away = np.where(same, 0.0, np.abs(a.astype(np.float64) - b))
    return min(float(np.nan_to_num(away, nan=np.inf).max(initial=0.0)), NO_NUMBER)


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest entry that means a number."""
    seen = np.abs(expected) < 1e29
    return _away(found[seen], expected[seen]) / max(float(np.abs(expected[seen]).max(initial=0.0)), 1e-6)


def _of_xla(task: Problem, expected: dict[str, np.ndarray]) -> dict[str, float]:
    """The errors of the backend `xla` on the same rounded numbers: what rounding alone does."""
    found = _numpy(jax.jit(_both(task, "xla"))(*task.arrays))
    return {part: _error(found[part], expected[part]) for part in expected}
