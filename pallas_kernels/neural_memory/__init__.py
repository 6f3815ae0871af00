"""`neural_memory`: a small MLP per head whose weights are the state and learn by gradient steps (Titans).

For every token t of a document, with t' the newest chunk boundary at or before t,

    u_t = ∇ ||M_{t'}(k_t) - v_t||²     S_t = η_t S_{t-1} - θ_t u_t     M_t = (1 - α_t) M_{t-1} + S_t     y_t = M_t(q_t)

Titans: Learning to Memorize at Test Time (arXiv 2501.00663, Eq. 9-15). Boundaries lie every `chunk` tokens of a
document, so the chunk is part of the model: 1 is the true recurrence, larger chunks take gradients at older weights.
"""

from __future__ import annotations

from itertools import pairwise

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.errors import ConfigError
from pallas_kernels._dispatch import resolve
from pallas_kernels.neural_memory.gpu import neural_memory_gpu
from pallas_kernels.neural_memory.gpu import unfit as unfit_gpu
from pallas_kernels.neural_memory.reference import MemoryState, Weights, empty_memory, mlp, neural_memory_reference
from pallas_kernels.neural_memory.tpu import neural_memory_tpu, unfit
from pallas_kernels.neural_memory.xla import memory_rows, neural_memory_xla

__all__ = ["CHUNK", "MemoryState", "Weights", "empty_memory", "memory_rows", "mlp", "neural_memory"]

IMPLEMENTATIONS = {
    "reference": neural_memory_reference,
    "xla": neural_memory_xla,
    "gpu": neural_memory_gpu,
    "tpu": neural_memory_tpu,
}
CHUNK = 16


def neural_memory(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H V"],
    *,
    eta: Float[Array, "B T H"],
    theta: Float[Array, "B T H"],
    alpha: Float[Array, "B T H"],
    start: Weights,
    state: MemoryState | None = None,
    segments: Int[Array, "B T"] | None = None,
    chunk: int = CHUNK,
    read_after_write: bool = True,
    tangents: bool = False,
    backend: str = "auto",
) -> tuple[Float[Array, "B T H V"], MemoryState]:
    """Reads of the memory and its state after the last token; differentiable in every array, twice through the memory.

    Computed in f32, or f64 where an input is: steps as small as these are lost in lower precision. "gpu" takes bfloat16
    q, k and v, key dims up to 192, and a memory of one matrix; its products read bfloat16, its sums and the state are
    f32.

    Args:
      q, k, v: not normalised here; a linear memory is stable for 2 θ ||k||² < 2 at chunk 1, less at larger chunks.
      eta, theta, alpha: momentum in [0, 1], step size, forgetting in [0, 1].
      start: M_0, the layers' matrices [H, D, W1], [H, W1, W2], ..., [H, ·, V], with GELU between them.
      state: what came before; None: nothing.
      segments: packed documents; each starts from M_0 and S_0 = 0. Padding (0) passes the state through and
        gives zeros. None: one document, no padding.
      chunk: tokens of a document between two renewals of the weights that gradients are taken at.
      read_after_write: y_t = M_t(q_t); otherwise M_{t-1}(q_t).
      tangents: allow forward-mode derivatives (`jax.jvp`), at the price of a slower backward pass.
      backend: "auto", "xla", "gpu", "tpu", "reference"; a named backend never falls back.

    Returns:
      y in v's dtype; the state in f32 or wider.

    Raises:
      ConfigError: shapes that do not fit, or chunk < 1.
      NotImplementedError: a backend this op does not have, or that cannot serve this call.
    """
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ConfigError(f"q {q.shape}, k {k.shape} and v {v.shape} must agree in batch, length, heads and key dim.")
    batch, length, heads, dim = q.shape
    widths = [dim, *(w.shape[-1] for w in start)]
    shapes = [(heads, *pair) for pair in pairwise(widths)]
    if not start or [w.shape for w in start] != shapes or widths[-1] != v.shape[3]:
        raise ConfigError(
            f"start has shapes {[w.shape for w in start]}; make them {heads} matrices a layer, from {dim} inputs "
            f"to {v.shape[3]} outputs."
        )
    if length == 0 or chunk < 1:
        raise ConfigError(f"neural_memory got {length} tokens and chunk {chunk}; both must be at least 1.")
    rates = {"eta": eta, "theta": theta, "alpha": alpha}
    reasons = {
        "gpu": unfit_gpu(q, k, v, rates, start, state, tangents=tangents),
        "tpu": unfit({"q": q, "k": k, "v": v, **rates}, start, state, chunk=chunk, tangents=tangents),
    }
    run = resolve("neural_memory", backend, IMPLEMENTATIONS, default="xla", unfit=reasons)
    exact = jnp.result_type(jnp.float32, q, k, v)
    options = {}
    if run is neural_memory_gpu:
        options["whole"] = segments is None and state is None
    if segments is None:
        segments = jnp.ones((batch, length), jnp.int32)
    if state is None:
        state = empty_memory(batch, start, exact)
    cast = lambda x: x.astype(exact)
    tokens = (q, k, v) if run is neural_memory_gpu else (cast(x) for x in (q, k, v))
    y, state = run(
        *tokens,
        cast(eta),
        cast(theta),
        cast(alpha),
        tuple(cast(w) for w in start),
        state,
        segments,
        chunk=chunk,
        read_after_write=read_after_write,
        tangents=tangents,
        **options,
    )
    return y.astype(v.dtype), state
