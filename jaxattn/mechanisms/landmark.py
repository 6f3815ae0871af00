"""Landmark attention: a two-level softmax over blocks, whose gate later retrieves blocks from a long past.

Random-Access Infinite Context Length for Transformers (arXiv 2305.16300, section 3). After every f tokens of a
document the model inserts one learned landmark, so blocks have L = f + 1 positions and position p is a landmark
where p % L = f. With s_ij = scale · q_i·k_j, for a query of block b:

    A_ij = softmax over { own tokens j <= i } ∪ { landmarks of earlier blocks } of s_i        j in block b
    A_ij = (softmax of s_i within block c)_j · (the weight above of c's landmark)             j in block c < b

and 0 at landmarks. A landmark asks like a token of its block, whose landmark nobody in the block sees, itself
included. Rotation is by positions that count landmarks. Trained in form (c) of the released code: the model
inserts landmarks and drops them before the logits, so that they are neither predicted nor trained on.

`retrieve` = k > 0 changes `step` alone: see `_landmark_retrieval`. Parameters are the same.
`gate` False is an ablation, not the paper's: landmark keys count as zero, so that all blocks weigh alike.

Left out: dropout of the gate, the context-miss token, random jumps of positions at landmarks. No window, no
position bias, no prefix: a block is all or nothing. `GLOBAL` keys belong to no block, and nobody sees them.
The released softmax allows 16 or 64 landmarks a row; here there is no such limit.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxattn.errors import ConfigError
from jaxattn.masks import PADDING, Visibility
from jaxattn.mechanisms import _landmark_cache as cache
from jaxattn.mechanisms._landmark_retrieval import SELECT, longest_chunk, retrieval_step
from jaxattn.mechanisms._protocol import Call, Capabilities, Mechanism, RowWeights, check
from jaxattn.rope import rotate
from pallas_kernels.grouped_softmax import grouped_softmax
from pallas_kernels.grouped_softmax.reference import dense_rows, dense_scores


@dataclasses.dataclass(frozen=True)
class Spec:
    """block: tokens f before each landmark. retrieve: blocks k that a decoding query fetches; 0 attends to all.

    select: who shares a choice of blocks. cache_blocks: complete blocks remembered, the newest; 0 = all that the
    capacity holds. context: tokens, landmarks not counted, the model was trained at. gate: see the module.
    The last five matter to `retrieve` > 0 only (gate: always).
    """

    block: int = 50
    retrieve: int = 0
    select: str = "per_token_and_head"
    cache_blocks: int = 0
    context: int = 512
    gate: bool = True

    def __post_init__(self) -> None:
        for field, least in (("block", 1), ("retrieve", 0), ("cache_blocks", 0), ("context", 1)):
            value = getattr(self, field)
            if value != int(value) or value < least:
                raise ConfigError(f"landmark.{field} is {value} but must be a whole number of at least {least}.")
        if self.select not in SELECT:
            raise ConfigError(f"landmark.select is {self.select!r} but must be one of {', '.join(SELECT)}.")
        if not self.retrieve:
            return
        if 0 < self.cache_blocks < self.retrieve:
            raise ConfigError(
                f"landmark.cache_blocks is {self.cache_blocks} but {self.retrieve} blocks are to be retrieved: "
                f"use at least {self.retrieve}, or 0 for no limit."
            )
        if longest_chunk(self) < self.length:
            most = self.positions // self.length - 2
            remedy = f"use at most {most}, or raise landmark.context" if most > 0 else "raise landmark.context"
            raise ConfigError(
                f"landmark.retrieve is {self.retrieve} but a context of {self.context} tokens has no room for that "
                f"many blocks of {self.block}, one in reserve and one to work in: {remedy}."
            )

    @property
    def length(self) -> int:
        """L, positions of a block."""
        return self.block + 1

    @property
    def positions(self) -> int:
        """Positions the model was trained at: its context and the landmarks in it."""
        return self.context + self.context // self.block


def _gated(k: Array, positions: Array, spec: Spec) -> Array:
    """Keys; without the gate those of landmarks are zero, which scores 0 before and after any rotation."""
    if spec.gate:
        return k
    return jnp.where((positions % spec.length == spec.block)[..., None, None], 0, k)


def _placed(q: Array, k: Array, vis: Visibility, call: Call) -> tuple[Array, Array]:
    """Queries and keys as they meet: rotated at their positions."""
    k, rope = _gated(k, vis.k_positions, call.spec), call.rope
    if rope is None:
        return q, k
    # One table for both: where angles depend on the longest position (dynamic scaling), some rows do not know it.
    join = lambda a, b: jnp.concatenate([a, b], axis=1)
    live = join(vis.q_segments, vis.k_segments) != PADDING
    tables = rope.tables(join(vis.q_positions, vis.k_positions), q.shape[-1], live)
    cos, sin = (jnp.split(table, [q.shape[1]], axis=1) for table in tables)
    return rotate(q, (cos[0], sin[0])), rotate(k, (cos[1], sin[1]))


def _options(q: Array, call: Call) -> dict[str, Any]:
    """The op's view of a call."""
    return {"block": call.spec.length, "scale": call.scale_of(q.shape[-1]), "backend": call.backend}


def weights(q: Array, k: Array, vis: Visibility, call: Call) -> RowWeights:
    check(MECHANISM, q, k, k, vis, call)
    q, k = _placed(q, k, vis, call)
    s = dense_scores(q, k, call.scale_of(q.shape[-1]))
    return RowWeights(dense_rows(s, vis, call.spec.length)[0], s)


def forward(q: Array, k: Array, v: Array, vis: Visibility, call: Call) -> Array:
    check(MECHANISM, q, k, v, vis, call)
    q, k = _placed(q, k, vis, call)
    return grouped_softmax(q, k, v, vis, **_options(q, call))[0]


def reference(q: Array, k: Array, v: Array, vis: Visibility, call: Call) -> Array:
    return forward(q, k, v, vis, dataclasses.replace(call, backend="reference"))


def init_state(
    spec: Spec, *, batch: int, capacity: int, heads: int, kv_heads: int, key_dim: int, value_dim: int, dtype: Any
) -> cache.LandmarkCache:
    """Room for `capacity` tokens of a document and their landmarks, or for a ring of `cache_blocks` blocks."""
    slots = capacity + capacity // spec.block
    if spec.retrieve:  # whole blocks; the one that is being filled has its own place
        blocks = -(-slots // spec.length)
        slots = spec.length * (min(blocks, spec.cache_blocks + 1) if spec.cache_blocks else blocks)
    return cache.empty(batch=batch, slots=slots, kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim, dtype=dtype)


def step(
    state: cache.LandmarkCache, q: Array, k: Array, v: Array, positions: Array, segment_ids: Array, call: Call
) -> tuple[Array, cache.LandmarkCache]:
    check(MECHANISM, q, k, v, None, call)
    k = _gated(k, positions, call.spec)
    if call.spec.retrieve:
        return retrieval_step(state, q, k, v, positions, segment_ids, call)
    state, full = cache.append(state, k, v, positions, segment_ids)
    vis = cache.visibility(state, positions, segment_ids)
    q, keys = _placed(q, state.keys.astype(q.dtype), vis, call)
    values = state.values.astype(v.dtype)
    o, _ = grouped_softmax(q, keys, values, vis, **_options(q, call))
    return jnp.where(full[:, None, None, None], jnp.nan, o), state


def flops(spec: Spec, *, batch: int, queries: int, keys: int, heads: int, key_dim: int, value_dim: int) -> float:
    """As plain attention; landmarks, where the model inserts them, are among the queries and keys."""
    return 2.0 * batch * heads * queries * keys * (key_dim + value_dim)


def advice(spec: Spec, context: int | None) -> str:
    """A context without a whole block has no landmark; retrieval counts positions by the option `context`."""
    if context is None:
        return f"a training context of up to {spec.block} tokens has no landmark, which is softmax attention."
    if context <= spec.block:
        return (
            f"no landmark is ever inserted into {context} tokens with block={spec.block}, so that this is softmax "
            f"attention; use block={max(context // 4, 1)}."
        )
    if spec.retrieve and spec.context != context:
        return f"its option context={spec.context} is not the training context of {context} tokens; context=context is."
    return ""


MECHANISM = Mechanism(
    name="landmark",
    title="Landmark attention",
    arxiv="2305.16300",
    equation="softmax in the block · softmax over own tokens and landmarks",
    spec=Spec,
    reference=reference,
    forward=forward,
    weights=weights,
    init_params=lambda key, spec, **dims: {},
    init_state=init_state,
    step=step,
    flops=flops,
    capabilities=Capabilities(
        noncausal_self=False, noncausal_cross=False, window=False, prefix=False, position_bias=False
    ),
    variants=(Spec(block=7), Spec(block=3, retrieve=5, cache_blocks=6)),
    block=lambda spec: spec.block,
    piece=lambda spec: longest_chunk(spec) // spec.length * spec.block if spec.retrieve else None,
    reads_state=lambda spec: spec.retrieve > 0,
    rotary="raw",
    advice=advice,
)
