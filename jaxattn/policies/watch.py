"""Watch: dense attention that also tells, for every query head, which token its newest row gives the largest weight.

What detection of retrieval heads (arXiv 2404.15574) reads in every step of an answer, without rows of attention:

    top_h = position of argmax_j (scale · q_h·k_j + bias_j), of equals the first

over the keys that the newest token sees, as the mechanism scores them, also where it makes other weights of the scores
than a softmax. This row makes the next token: behind a prompt, the first of the answer. Constant slots (k* and its
like) are no tokens and do not take part; a learned token in front of the text does, at a negative position. Weights
that score-space methods change are not looked at; a head that `mask_heads` makes uniform looks at the first token.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

from jaxattn.masks import PADDING
from jaxattn.mechanisms._protocol import Core
from jaxattn.policies import dense
from jaxattn.policies._protocol import Policy, Site
from jaxattn.stores import KVCache, cache_visibility
from jaxattn.types import Leaf
from pallas_kernels.probe import probe

NOTHING = -(2**31)  # no token was read yet


@struct.dataclass
class State:
    """The keys and values, and the position that each head of the newest row looks at most."""

    cache: KVCache
    top: Leaf  # [B, H] int32


def init(spec: Any, site: Site, *, batch: int, capacity: int) -> State:
    cache = dense.init(spec, site, batch=batch, capacity=capacity)
    return State(cache, jnp.full((batch, site.heads), NOTHING, jnp.int32))


def step(
    state: State, q: Array, k: Array, v: Array, here: Any, *, spec: Any, site: Site, core: Core
) -> tuple[Array, State, Any]:
    o, cache, carry = dense.step(state.cache, q, k, v, here, spec=spec, site=site, core=core)
    live = here.segments != PADDING
    at = jnp.max(jnp.where(live, jnp.arange(live.shape[1]), -1), axis=1, keepdims=True)  # the row's newest token
    newest = lambda x: jnp.take_along_axis(x, jnp.maximum(at, 0).reshape(-1, *[1] * (x.ndim - 1)), axis=1)
    vis = cache_visibility(cache, newest(here.positions), newest(here.segments), window=site.window)
    row = core.queries(newest(q))
    bias = None if core.bias is None else jnp.broadcast_to(
        core.bias(vis.q_positions, vis.k_positions)[:, :, 0], (len(q), site.heads, cache.capacity)
    )  # fmt: skip
    found = probe(row, cache.keys.astype(q.dtype), vis, scale=core.scale, want=("top",), key_bias=bias).top_index[:, 0]
    where = jnp.take_along_axis(cache.positions, jnp.maximum(found, 0), axis=1) - site.front
    top = jnp.where(found >= 0, where, state.top)  # padding sees nothing
    return o, State(cache, top), carry


POLICY = Policy(
    name="watch",
    title="Dense, and where each head looks",
    arxiv="2404.15574",
    keeps="all",
    reads="all",
    spec=dense.Spec,
    init=init,
    step=step,
    separates=False,
    windows=True,
    biased=True,
    front=True,
    read=dense.POLICY.read,
)
