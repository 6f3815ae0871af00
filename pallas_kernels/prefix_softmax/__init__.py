"""`prefix_softmax`: for every t the softmax of the scores up to t over their values, with O(T) memory.

o_t = Σ_{i<=t} e^{s_i} v_i / Σ_{i<=t} e^{s_i}

Scores do not depend on t (one fixed query), which makes it a recurrence of constant state: Attention as an RNN
(arXiv 2405.13956). `Partial`, `empty`, `merge` and `output` are that state and its algebra, for any softmax
computed in pieces.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.errors import ConfigError
from jaxattn.masks import PADDING
from pallas_kernels._dispatch import resolve
from pallas_kernels.prefix_softmax.gpu import prefix_softmax_gpu
from pallas_kernels.prefix_softmax.gpu import unfit as unfit_gpu
from pallas_kernels.prefix_softmax.reference import Partial, empty, merge, output, prefix_softmax_reference
from pallas_kernels.prefix_softmax.tpu import prefix_softmax_tpu, unfit
from pallas_kernels.prefix_softmax.xla import prefix_softmax_xla

__all__ = ["Partial", "empty", "merge", "output", "prefix_softmax"]

IMPLEMENTATIONS = {
    "reference": prefix_softmax_reference,
    "xla": prefix_softmax_xla,
    "tpu": prefix_softmax_tpu,
    "gpu": prefix_softmax_gpu,
}
SHORT = 16  # "auto" leaves fewer tokens, such as a step of decoding, to XLA: a kernel would compute a whole chunk


def prefix_softmax(
    s: Float[Array, "B T H"],
    v: Float[Array, "B T H V"],
    *,
    segments: Int[Array, "B T"] | None = None,
    initial: Partial | None = None,
    initial_segment: Int[Array, "B"] | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Float[Array, "B T H V"], Partial]:
    """Softmax over i <= t of the same segment, for all t. Differentiable, also in `initial`.

    Computed in f32, or f64 where s or v is. A segment is a run of equal ids, padding in between allowed; an id
    that comes back after another one starts afresh, as it must with a state of constant size.

    Args:
      s, v: scores and values. The scores must be finite.
      segments: 0 = padding: contributes nothing, gives zeros, leaves the state alone. Default: one segment.
      initial: what came before: m, u [B, H] and w [B, H, V].
      initial_segment: the segment of `initial`; None = that of the first token that is not padding.
      chunk: tokens that are done at once, by "xla" and "tpu"; None: the backend's own.
      backend: "auto", "xla", "tpu", "gpu", "reference"; a named backend never falls back.

    Returns:
      o [B, T, H, V] in v's dtype, and the state after the last token.

    Raises:
      ConfigError: no tokens, or chunk < 1.
      NotImplementedError: a backend this op does not have, or that cannot serve this call.
    """
    if s.shape[1] == 0 or (chunk is not None and chunk < 1):
        raise ConfigError(f"prefix_softmax got {s.shape[1]} tokens and chunk {chunk}; both must be at least 1.")
    short = f"{s.shape[1]} tokens are too few to fill a chunk" if backend == "auto" and s.shape[1] < SHORT else None
    reasons = {"tpu": short or unfit(s, v, chunk), "gpu": short or unfit_gpu(v)}
    run = resolve("prefix_softmax", backend, IMPLEMENTATIONS, "xla", reasons)
    dtype = jnp.promote_types(jnp.promote_types(s.dtype, v.dtype), jnp.float32)
    if initial is None:
        initial = empty((s.shape[0], s.shape[2]), v.shape[3], dtype)
    initial = jax.tree.map(lambda x: x.astype(dtype), initial)
    segments = jnp.ones(s.shape[:2], jnp.int32) if segments is None else segments
    live, runs = segment_runs(segments, initial_segment)
    return run(s.astype(dtype), v, live, runs, initial, chunk=chunk)


def segment_runs(segments: Int[Array, "B T"], initial_segment: Int[Array, "B"] | None) -> tuple[Array, Array]:
    """Not padding [B, T], and the segment's number in order of appearance [B, T], 0 = that of the state.

    Padding belongs to the run before it.
    """
    live = segments != PADDING
    steps = jnp.arange(segments.shape[1])
    newest = jax.lax.cummax(jnp.where(live, steps, -1), axis=1)  # index of the last live token up to t
    held = jnp.take_along_axis(segments, jnp.maximum(newest, 0), axis=1)
    if initial_segment is None:
        first = jnp.argmax(live, axis=1)[:, None]
        initial_segment = jnp.take_along_axis(segments, first, axis=1)[:, 0]
    held = jnp.where(newest >= 0, held, initial_segment[:, None])
    before = jnp.concatenate([initial_segment[:, None], held[:, :-1]], axis=1)
    return live, jnp.cumsum(held != before, axis=1)
