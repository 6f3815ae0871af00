"""The matrix: every registered mechanism x its default and variant settings, and how to call it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.masks import Visibility, self_visibility
from jaxattn.mechanisms import Mechanism, get, names


@dataclasses.dataclass(frozen=True)
class Case:
    mechanism: Mechanism
    spec: Any

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self.spec, f.name)}"
            for f in dataclasses.fields(self.spec)
            if getattr(self.spec, f.name) != f.default
        ]
        return "-".join([self.mechanism.name, *changed])

    @functools.cache  # noqa: B019 (cases live as long as the session)
    def params(self, heads: int, kv_heads: int, key_dim: int, value_dim: int) -> dict[str, Any]:
        def away(x: jax.Array) -> jax.Array:
            """From small or zero initial values, so that a forgotten parameter shows."""
            x = 10 * x if x.ndim == 2 and min(x.shape) < 8 else x
            return x if np.any(x) else jnp.asarray(0.3 * normal(8, x.shape), x.dtype)

        # Values, whoever asks first: a test whose `jax.jit` does would else cache its tracers for the others.
        with jax.ensure_compile_time_eval():
            params = self.mechanism.init_params(
                jax.random.key(7), self.spec, heads=heads, kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim
            )
            return jax.tree.map(away, params)

    def forward(self, q, k, v, vis: Visibility | None = None, params: Any = None, **options):
        """The forward, compiled: op by op these tests would take several times as long."""
        params = self.params(q.shape[2], k.shape[2], k.shape[3], v.shape[3]) if params is None else params
        return self._compiled("forward", q, k, v, vis, params, **options)

    def reference(self, q, k, v, vis: Visibility | None = None, params: Any = None, **options):
        params = self.params(q.shape[2], k.shape[2], k.shape[3], v.shape[3]) if params is None else params
        return self._compiled("reference", q, k, v, vis, params, **options)

    def op_by_op(self, q, k, v):
        """The forward as a caller without `jax.jit` gets it."""
        return self._run("forward", q, k, v, None, self.params(q.shape[2], k.shape[2], k.shape[3], v.shape[3]))

    @functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="backend")
    def _compiled(self, which: str, q, k, v, vis: Visibility | None, params: Any, **options):
        return self._run(which, q, k, v, vis, params, **options)

    def _run(self, which: str, q, k, v, vis: Visibility | None, params: Any, **options):
        vis = self_visibility(*q.shape[:2]) if vis is None else vis
        q, v = self.gained(q, v, vis, params)
        return getattr(self.mechanism, which)(q, k, v, vis, spec=self.spec, params=params, **options)

    def gained(self, q, v, vis: Visibility, params: Any):
        """q and v behind the mechanism's factors per token, as its callers apply them."""
        return self.mechanism.apply_gains((q, v), q, v, vis.q_positions, spec=self.spec, params=params)


CASES = [Case(get(n), spec) for n in names() for spec in (get(n).spec(), *get(n).variants)]
DEFAULTS = [Case(get(n), get(n).spec()) for n in names()]


def able(*capabilities: str) -> list[Case]:
    """Default cases that can all of this; that the others refuse is asserted in test_transforms.py."""
    return [case for case in DEFAULTS if all(getattr(case.mechanism.capabilities, c) for c in capabilities)]


def inputs(length: int, *, batch=2, heads=4, kv_heads=2, dim=16, value_dim=16, keys=None, dtype=jnp.float32, seed=0):
    """q, k, v with unit-variance entries."""
    keys = length if keys is None else keys
    shapes = ((length, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, value_dim))
    return tuple(jnp.asarray(normal(3 * seed + i, (batch, *shape)), dtype) for i, shape in enumerate(shapes))


def normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers from NumPy, which compiles no program for each new shape."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def close(actual, expected, *, rtol: float = 2e-5) -> None:
    """Equal up to `rtol` of the largest expected magnitude."""
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(actual, expected, atol=rtol * max(1.0, float(np.abs(expected).max())), rtol=rtol)


def packed(lengths: list[int], total: int, batch: int = 2):
    """positions and segment ids [batch, total] of documents laid end to end; the rest is padding."""
    positions, segments = np.zeros(total, np.int32), np.zeros(total, np.int32)
    at = 0
    for i, n in enumerate(lengths):
        positions[at : at + n], segments[at : at + n] = np.arange(n), i + 1
        at += n
    tile = lambda x: jnp.asarray(np.tile(x, (batch, 1)))
    return tile(positions), tile(segments)
