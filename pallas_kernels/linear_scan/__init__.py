"""`linear_scan`: attention whose past is one matrix per head.

S_t = exp(g_t) S_{t-1} + k_tᵀ v_t,   o_t = scale · q_t S_t

The shared primitive of linear attention, lightning attention, retention and gated linear attention: they
differ in the decay g, the feature map on q and k, and what is done with o. BASED's map, which makes a head of 16
numbers one of 153, is an option here, so that a kernel can form it on chip.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.errors import ConfigError
from jaxattn.masks import PADDING
from pallas_kernels import _interpret
from pallas_kernels._dispatch import KERNELS, resolve
from pallas_kernels.linear_scan.features import MAPS, feature_width
from pallas_kernels.linear_scan.features import taylor as taylor_features
from pallas_kernels.linear_scan.gpu import linear_scan_gpu
from pallas_kernels.linear_scan.gpu import unfit as unfit_gpu
from pallas_kernels.linear_scan.reference import linear_scan_reference
from pallas_kernels.linear_scan.tpu import linear_scan_tpu, unfit
from pallas_kernels.linear_scan.xla import CHUNK, linear_scan_xla

__all__ = ["CHUNK", "forms_features", "linear_scan"]

IMPLEMENTATIONS = {
    "reference": linear_scan_reference,
    "xla": linear_scan_xla,
    "gpu": linear_scan_gpu,
    "tpu": linear_scan_tpu,
}
SHORT = 16  # "auto" leaves fewer tokens, such as a step of decoding, to XLA: a kernel would compute a whole chunk


def linear_scan(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K V"],
    *,
    log_decay: Float[Array, "H"] | Float[Array, "B T H"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B H F V"] | None = None,
    initial_segment: Int[Array, "B"] | None = None,
    taylor: str | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H F V"]]:
    """Outputs and the final state; differentiable in q, k, v, log_decay, initial_state and both results.

    Args:
      q, k, v: query head h reads key head h // (H // K).
      log_decay: g <= 0, natural logarithm, per head or per token and head; None keeps the state whole.
        A token's decay acts on the state before the token's own key and value are added. -inf forgets all.
      segments: packed documents; a segment other than the last live token's starts from a zero state.
        Padding (0) adds nothing, decays nothing and gives zeros. None: one document, no padding.
      initial_state: the state before token 0, in f32; None: zeros.
      initial_segment: whose state that is; None: the first live token's segment; 0: nobody's.
      taylor: "symmetric" or "full": φ(q) and φ(k), the second-order Taylor features, take the place of q and k, so
        that F = `features.feature_width(D, taylor)`; padding has none. None: q and k as they are, F = D.
      scale: multiplies q, or φ(q).
      chunk: tokens that are done at once, by "xla" and "tpu"; None: the backend's own.
      backend: "auto", "xla", "gpu", "tpu", "reference"; a named backend never falls back. "tpu" and "gpu"
        multiply in the dtype of q and k, on a GPU bfloat16, also where v is wider; sums and states are f32.

    Returns:
      o in v's dtype, the state in f32 (f64 where an input is f64).

    Raises:
      ConfigError: shapes that do not fit.
      NotImplementedError: a backend this op does not have, or that cannot serve this call.
    """
    batch, length, heads, key_dim = q.shape
    if k.shape != (batch, length, k.shape[2], key_dim) or v.shape[:3] != k.shape[:3]:
        raise ConfigError(f"q {q.shape}, k {k.shape} and v {v.shape} must agree in batch, length and key dim.")
    if heads % k.shape[2]:
        raise ConfigError(f"num_heads {heads} is not a multiple of num_kv_heads {k.shape[2]}.")
    if log_decay is not None and log_decay.shape not in ((heads,), (batch, length, heads)):
        raise ConfigError(f"log_decay has shape {log_decay.shape}; make it {(heads,)} or {(batch, length, heads)}.")
    if chunk is not None and chunk < 1:
        raise ConfigError(f"chunk is {chunk} but must be at least 1.")
    if taylor is not None and taylor not in MAPS:
        raise ConfigError(f"taylor is {taylor!r} but must be None or one of {', '.join(MAPS)}.")
    key_dim = key_dim if taylor is None else feature_width(key_dim, taylor)
    run = resolve("linear_scan", backend, IMPLEMENTATIONS, "xla", _unfit(q, k, v, key_dim, chunk, backend))
    exact = jnp.result_type(jnp.float32, q, k, v)
    shape = (batch, heads, key_dim, v.shape[3])
    if initial_state is None:
        initial_state = jnp.zeros(shape, exact)
    elif initial_state.shape != shape:
        raise ConfigError(f"initial_state has shape {initial_state.shape}; make it {shape}, [B, H, F, V].")
    if segments is None:
        segments = jnp.ones((batch, length), jnp.int32)
        initial_segment = segments[:, 0] if initial_segment is None else initial_segment
    elif initial_segment is None:
        live = jnp.argmax(segments != PADDING, axis=1)[:, None]
        initial_segment = jnp.take_along_axis(segments, live, axis=1)[:, 0]
    options = {}
    if taylor is not None and run is linear_scan_tpu:
        options["taylor"] = taylor
    elif taylor is not None:
        kinds = (q.dtype, k.dtype) if run is linear_scan_gpu else (exact, exact)
        q, k = (taylor_features(x.astype(exact), taylor).astype(kind) for x, kind in zip((q, k), kinds, strict=True))
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
        **options,
    )


def forms_features(q: Array, k: Array, v: Array, *, taylor: str, backend: str) -> bool:
    """Whether a kernel serves these Taylor features of a whole sequence: "tpu" forms them on chip, "gpu" reads them in
    the dtype of q and k. Where not, they are f32 arrays of F numbers a token, which callers make for a few at a time.

    A named kernel counts as willing: what it cannot do it says itself.
    """
    if backend != "auto":
        return backend in KERNELS
    key_dim, platform = feature_width(q.shape[3], taylor), _interpret.platform()
    return platform in KERNELS and not _unfit(q, k, v, key_dim, None, backend)[platform]


def _unfit(q: Array, k: Array, v: Array, key_dim: int, chunk: int | None, backend: str) -> dict[str, str | None]:
    """Why kernels cannot serve a call, or why "auto" leaves it to "xla"."""
    short = f"{q.shape[1]} tokens are too few to fill a chunk" if backend == "auto" and q.shape[1] < SHORT else None
    return {
        "gpu": short or unfit_gpu(q, k, v),
        "tpu": short or unfit(q, k, v, key_dim=key_dim, chunk=chunk),
    }
