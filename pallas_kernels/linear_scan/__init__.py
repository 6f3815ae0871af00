"""`linear_scan`: attention whose past is one matrix per head.

S_t = exp(g_t) S_{t-1} + k_tᵀ v_t,   o_t = scale · q_t S_t

The shared primitive of linear attention, lightning attention, retention and gated linear attention: they
differ in the decay g, the feature map on q and k, and what is done with o.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.errors import ConfigError
from jaxattn.masks import PADDING
from pallas_kernels._dispatch import resolve
from pallas_kernels.linear_scan.reference import linear_scan_reference
from pallas_kernels.linear_scan.xla import CHUNK, linear_scan_xla

__all__ = ["CHUNK", "linear_scan"]

IMPLEMENTATIONS = {"reference": linear_scan_reference, "xla": linear_scan_xla}


def linear_scan(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K V"],
    *,
    log_decay: Float[Array, "H"] | Float[Array, "B T H"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B H D V"] | None = None,
    initial_segment: Int[Array, "B"] | None = None,
    scale: float = 1.0,
    chunk: int = CHUNK,
    backend: str = "auto",
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H D V"]]:
    """Outputs and the final state; differentiable in q, k, v, log_decay, initial_state and both results.

    Args:
      q, k, v: query head h reads key head h // (H // K).
      log_decay: g <= 0, natural logarithm, per head or per token and head; None keeps the state whole.
        A token's decay acts on the state before the token's own key and value are added. -inf forgets all.
      segments: packed documents; a segment other than the last live token's starts from a zero state.
        Padding (0) adds nothing, decays nothing and gives zeros. None: one document, no padding.
      initial_state: the state before token 0, in f32; None: zeros.
      initial_segment: whose state that is; None: the first live token's segment; 0: nobody's.
      scale: multiplies q.
      chunk: tokens a block of the "xla" backend.
      backend: "auto", "xla", "reference"; a named backend never falls back.

    Returns:
      o in v's dtype, the state in f32 (f64 where an input is f64).

    Raises:
      ConfigError: shapes that do not fit.
      NotImplementedError: a backend this op does not have.
    """
    run = resolve("linear_scan", backend, IMPLEMENTATIONS, default="xla")
    batch, length, heads, key_dim = q.shape
    if k.shape != (batch, length, k.shape[2], key_dim) or v.shape[:3] != k.shape[:3]:
        raise ConfigError(f"q {q.shape}, k {k.shape} and v {v.shape} must agree in batch, length and key dim.")
    if heads % k.shape[2]:
        raise ConfigError(f"num_heads {heads} is not a multiple of num_kv_heads {k.shape[2]}.")
    if log_decay is not None and log_decay.shape not in ((heads,), (batch, length, heads)):
        raise ConfigError(f"log_decay has shape {log_decay.shape}; make it {(heads,)} or {(batch, length, heads)}.")
    if chunk < 1:
        raise ConfigError(f"chunk is {chunk} but must be at least 1.")
    exact = jnp.result_type(jnp.float32, q, k, v)
    shape = (batch, heads, key_dim, v.shape[3])
    if initial_state is None:
        initial_state = jnp.zeros(shape, exact)
    elif initial_state.shape != shape:
        raise ConfigError(f"initial_state has shape {initial_state.shape}; make it {shape}, [B, H, D, V].")
    if segments is None:
        segments = jnp.ones((batch, length), jnp.int32)
        initial_segment = segments[:, 0] if initial_segment is None else initial_segment
    elif initial_segment is None:
        live = jnp.argmax(segments != PADDING, axis=1)[:, None]
        initial_segment = jnp.take_along_axis(segments, live, axis=1)[:, 0]
    return run(
        q,
        k,
        v,
        log_decay=log_decay,
        segments=segments,
        initial_state=initial_state.astype(exact),
        initial_segment=initial_segment.astype(segments.dtype),
        scale=scale,
        chunk=chunk,
    )
