"""`attend`: any parameter-free mechanism on raw queries, keys and values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.errors import ConfigError
from jaxattn.masks import Visibility, check_window, default_positions, self_visibility
from jaxattn.mechanisms import get
from jaxattn.mechanisms._protocol import check_call
from jaxattn.rope import PositionBias


def attend(
    name: str,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"],
    *,
    causal: bool = True,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    kv_positions: Int[Array, "B S"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    window: int | None = None,
    prefix_len: Int[Array, "B"] | None = None,
    scale: float | None = None,
    bias: PositionBias | None = None,
    params: dict[str, Any] | None = None,
    backend: str = "auto",
    **spec: Any,
) -> Float[Array, "B T H V"]:
    """Attention `name` on ``[B, T, H, D]`` arrays.

    Args:
      name: a registered mechanism, see `jaxattn.mechanisms.names()`.
      q, k, v: queries, keys, values; H must be a multiple of K.
      causal: a query sees keys at its own position and before.
      positions: of the queries, default 0..T-1; must not decrease inside a segment.
      segment_ids: packed documents 1, 2, ...; 0 = padding. Default all 1.
      kv_positions, kv_segment_ids: of the keys where they differ from the queries' (cross-attention);
        default: the queries' when S = T, else 0..S-1 and all 1.
      window: a query sees only the last `window` positions, its own included.
      prefix_len: the first prefix_len positions are visible to all queries of their segment (prefix-LM).
      scale: of q·k, default 1/sqrt(D).
      bias: position bias added to the scaled scores (`jaxattn.rope`).
      params: the mechanism's own parameters, where it has any.
      backend: "auto", "xla", "reference", "tpu" or "gpu"; a named backend never falls back.
      spec: the mechanism's options, e.g. ``train_len=256`` for sigmoid.

    Returns:
      ``[B, T, H, V]`` in v's dtype; rows that see nothing are zeros.

    Raises:
      ConfigError: unknown mechanism or option, shapes that do not fit, missing parameters.
      NotImplementedError: a capability or backend the mechanism does not have.
    """
    mechanism = get(name)
    cross = kv_positions is not None or kv_segment_ids is not None or q.shape[1] != k.shape[1]
    check_call(
        mechanism,
        q,
        k,
        v,
        **{f"{'causal' if causal else 'noncausal'}_{'cross' if cross else 'self'}": True},
        segments=segment_ids is not None or kv_segment_ids is not None,
        window=window is not None,
        prefix=prefix_len is not None,
        position_bias=bias is not None,
    )
    options = mechanism.make_spec(**spec)
    needs = mechanism.init_params is not None and bool(_parameter_names(mechanism, options, q, k, v))
    if needs and params is None:
        raise ConfigError(f"{name} owns parameters: pass params=get({name!r}).init_params(key, spec, ...).")
    batch, length, keys = q.shape[0], q.shape[1], k.shape[1]
    if cross:
        check_window(window)
        fill = lambda x, default: default if x is None else jnp.asarray(x, jnp.int32)
        k_pos = fill(kv_positions, default_positions(batch, keys))
        q_pos = fill(positions, default_positions(batch, length))
        vis = Visibility(
            q_positions=q_pos,
            k_positions=k_pos,
            q_segments=fill(segment_ids, jnp.ones_like(q_pos)),
            k_segments=fill(kv_segment_ids, jnp.ones_like(k_pos)),
            prefix_len=prefix_len,
            causal=causal,
            window=window,
        )
    else:
        vis = self_visibility(
            batch,
            length,
            causal=causal,
            positions=positions,
            segment_ids=segment_ids,
            window=window,
            prefix_len=prefix_len,
        )
    q, v = mechanism.apply_gains((q, v), q, v, vis.q_positions, spec=options, params=params or {})
    return mechanism.forward(q, k, v, vis, spec=options, params=params, scale=scale, bias=bias, backend=backend)


def _parameter_names(mechanism: Any, spec: Any, q: Array, k: Array, v: Array) -> list[str]:
    """Names of the parameters the mechanism would create, without creating them."""
    shapes = jax.eval_shape(
        lambda: mechanism.init_params(
            jax.random.key(0),
            spec,
            heads=q.shape[2],
            kv_heads=k.shape[2],
            key_dim=q.shape[-1],
            value_dim=v.shape[-1],
        )
    )
    return list(shapes)
