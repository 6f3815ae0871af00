"""Decoding with a mechanism alone: through its own state, or, where it has none, the dense cache of its keys."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxattn.mechanisms import Call, Mechanism
from jaxattn.nn.stream import Stream
from jaxattn.policies import Site, dense


def site_of(q: Any, k: Any, v: Any, window: int | None = None, **more: Any) -> Site:
    """A layer with the shapes of q [B,T,H,D], k [B,T,K,D], v [B,T,K,V]."""
    return Site("test", 0, 1, q.shape[2], k.shape[2], q.shape[3], v.shape[3], str(jnp.dtype(q.dtype)), window, **more)


def core_of(mechanism: Mechanism, key_dim: int, *, spec: Any = None, params: Any = None, bias: Any = None) -> Any:
    """The mechanism over keys that the caller keeps."""
    spec = mechanism.spec() if spec is None else spec
    return mechanism.core(Call(spec, params or {}, bias=bias), key_dim)


def init_state(mechanism: Mechanism, spec: Any, q: Any, k: Any, v: Any, capacity: int, **more: Any) -> Any:
    """A state for tokens of these shapes."""
    if mechanism.core is not None:
        return dense.init(dense.Spec(), site_of(q, k, v), batch=q.shape[0], capacity=capacity)
    dims = {"heads": q.shape[2], "kv_heads": k.shape[2], "key_dim": q.shape[3], "value_dim": v.shape[3]}
    return mechanism.init_state(spec, batch=q.shape[0], capacity=capacity, dtype=q.dtype, **dims, **more)


def step(
    mechanism: Mechanism, spec: Any, state: Any, q: Any, k: Any, v: Any, positions: Any, segments: Any, *,
    params: Any = None, window: int | None = None, bias: Any = None, backend: str = "auto", **more: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """(o, state) behind T new tokens."""
    call = Call(spec, params or {}, bias=bias, backend=backend, **more)
    if mechanism.core is None:
        return mechanism.step(state, q, k, v, positions, segments, dataclasses.replace(call, window=window))
    core = mechanism.core(call, q.shape[3])
    here = Stream(jnp.asarray(positions), jnp.asarray(segments))
    o, state, _ = dense.step(state, q, k, v, here, spec=dense.Spec(), site=site_of(q, k, v, window), core=core)
    return o, state
