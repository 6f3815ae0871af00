"""The matrix: every registered mechanism x its default and variant settings, and how to call it.

Programs cost much and runs little, so all questions that differ in data alone are asked of one program a case, of
the shape of `standard()`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.masks import PADDING, Visibility, self_visibility
from jaxattn.mechanisms import Call, Mechanism, get, names

TRACES: collections.Counter[tuple[Case, str]] = collections.Counter()  # how often a program of a case was traced


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

    def params_for(self, q, k, v) -> dict[str, Any]:
        return self.params(q.shape[2], k.shape[2], k.shape[3], v.shape[3])

    def forward(self, q, k, v, vis: Visibility | None = None, params: Any = None, **options):
        """The forward, compiled: op by op these tests would take several times as long."""
        params = self.params_for(q, k, v) if params is None else params
        return self._compiled("forward", q, k, v, vis, params, **options)

    def reference(self, q, k, v, vis: Visibility | None = None, params: Any = None, **options):
        params = self.params_for(q, k, v) if params is None else params
        return self._compiled("reference", q, k, v, vis, params, **options)

    def rebuilt(self, q, k, v, vis: Visibility | None = None, params: Any = None, **options):
        """(reference, the output rebuilt from the rows of `weights`, these rows); rebuilt None where they show else."""
        params = self.params_for(q, k, v) if params is None else params
        return self._compiled("rebuilt", q, k, v, vis, params, **options)

    def op_by_op(self, q, k, v):
        """The forward as a caller without `jax.jit` gets it."""
        return self.compute("forward", q, k, v, None, self.params_for(q, k, v))

    @functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="backend")
    def _compiled(self, which: str, q, k, v, vis: Visibility | None, params: Any, **options):
        TRACES[self, which] += 1
        return self.compute(which, q, k, v, vis, params, **options)

    def compute(self, which: str, q, k, v, vis: Visibility | None, params: Any, **options):
        """What `forward`, `reference` or `rebuilt` give, traced into the caller's program."""
        vis = self_visibility(*q.shape[:2]) if vis is None else vis
        q, v = self.gained(q, v, vis, params)
        call = Call(self.spec, params or {}, **options)
        if which != "rebuilt":
            return getattr(self.mechanism, which)(q, k, v, vis, call)
        reference = self.mechanism.reference(q, k, v, vis, call)
        rows = self.mechanism.weights(q, k, vis, dataclasses.replace(call, values=v, queries=q))
        if self.mechanism.shows(self.spec):
            return reference, None, rows
        live = vis.q_segments != PADDING
        return reference, self.mechanism.rebuild(rows, v, live, call), rows

    def gained(self, q, v, vis: Visibility, params: Any):
        """q and v behind the mechanism's factors per token, as its callers apply them."""
        return self.mechanism.apply_gains((q, v), q, v, vis.q_positions, Call(self.spec, params or {}))


def cases_of(name: str) -> list[Case]:
    mechanism = get(name)
    return [Case(mechanism, spec) for spec in (mechanism.spec(), *mechanism.variants)]


CASES = [case for name in names() for case in cases_of(name)]
DEFAULTS = [cases_of(name)[0] for name in names()]

# Members of the two families that run another member's code up to their equation: they are asked the questions that
# cost a program of their own on one shape and in one way. Everybody else, a new mechanism too, is asked all of them.
SHORT = (
    "elu",
    "identity",
    "kernel_elu",
    "kernel_linear",
    "kernel_mlp",
    "kv_bias",
    "linear",
    "softmax_off_by_one",
    "sink_token",
    "v_bias",
)
FULL = [case for case in DEFAULTS if case.mechanism.name not in SHORT]


def grouped(cases: list[Case]) -> list[Any]:
    """Test parameters that keep a mechanism on one worker of pytest-xdist: two would compile its programs twice."""
    return [pytest.param(c, marks=pytest.mark.xdist_group(c.mechanism.name), id=str(c)) for c in cases]


def crossed(pairs: list[tuple[Case, Any]]) -> list[Any]:
    """As `grouped`, for cases with one more parameter, which is the end of the name."""
    mark = lambda case: pytest.mark.xdist_group(case.mechanism.name)
    return [pytest.param(case, x, marks=mark(case), id=f"{case}-{x}") for case, x in pairs]


def able(*capabilities: str, among: list[Case] | None = None) -> list[Case]:
    """Cases (default: one of every mechanism) that can all of this; that the others refuse is asserted elsewhere."""
    cases = DEFAULTS if among is None else among
    return [case for case in cases if all(getattr(case.mechanism.capabilities, c) for c in capabilities)]


def inputs(length: int, *, batch=2, heads=4, kv_heads=2, dim=16, value_dim=16, keys=None, dtype=jnp.float32, seed=0):
    """q, k, v with unit-variance entries."""
    keys = length if keys is None else keys
    shapes = ((length, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, value_dim))
    return tuple(jnp.asarray(normal(3 * seed + i, (batch, *shape)), dtype) for i, shape in enumerate(shapes))


LENGTH = 150  # of `standard`: more than one block of any implementation
SHORTER = 20  # of decoding, and of the first of several documents
DIMS = {"batch": 3, "heads": 6, "kv_heads": 2, "dim": 20, "value_dim": 12}  # nothing divides anything


def arrays(*args, **kwargs) -> tuple[np.ndarray, ...]:
    """`inputs` for NumPy, in which changing them compiles nothing."""
    return tuple(np.array(x) for x in inputs(*args, **kwargs))


def standard(seed: int = 0, length: int = LENGTH) -> tuple[np.ndarray, ...]:
    """q, k, v of the one shape of all questions that differ in data alone."""
    return arrays(length, **DIMS, seed=seed)


def seen(positions=None, segments=None, *, batch: int = 3, length: int = LENGTH) -> Visibility:
    """Causal self-attention; always with arrays, so that one program serves all of them."""
    positions = np.arange(length)[None].repeat(batch, 0) if positions is None else positions
    segments = np.ones((batch, length)) if segments is None else segments
    whole = lambda x: jnp.asarray(np.asarray(x, np.int32))
    return self_visibility(batch, length, positions=whole(positions), segment_ids=whole(segments))


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
    tile = lambda x: jnp.asarray(np.tile(x, (batch, 1)))  # tests/kernels call `.at` on them
    return tile(positions), tile(segments)
