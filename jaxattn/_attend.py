"""`attend`: any mechanism on raw queries, keys and values."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn import checks
from jaxattn.errors import ConfigError, near, shown
from jaxattn.masks import GLOBAL, Visibility, check_window, default_positions, self_visibility
from jaxattn.mechanisms import Call, Mechanism, get
from jaxattn.mechanisms._protocol import check_call
from jaxattn.rope import PositionBias, Rope


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
    rope: Rope | None = None,
    depth: tuple[int, int] | None = None,
    params: dict[str, Any] | None = None,
    backend: str = "auto",
    core: bool = False,
    **spec: Any,
) -> Float[Array, "B T H V"]:
    """Attention `name` on ``[B, T, H, D]`` arrays, as they are: without projections, and without rotation.

    Args:
      name: a registered mechanism, see `jaxattn.mechanisms.names()`.
      q, k, v: queries, keys, values; H must be a multiple of K.
      causal: a query sees keys at its own position and before.
      positions: of the queries, default 0..T-1; must not decrease inside a segment.
      segment_ids: packed documents 1, 2, ...; 0 = padding, -1 = seen by every document. Default all 1.
      kv_positions, kv_segment_ids: of the keys where they differ from the queries' (cross-attention);
        default: the queries' when S = T, else 0..S-1 and all 1.
      window: a query sees only the last `window` positions, its own included.
      prefix_len: the first prefix_len positions are visible to all queries of their segment (prefix-LM).
      scale: of q·k, default 1/sqrt(D).
      bias: position bias added to the scaled scores (`jaxattn.rope`).
      rope: for the mechanisms that rotate by themselves (`rotary` "raw"); others take rotated q and k.
      depth: (layer, number of layers), for mechanisms that differ over depth (lightning's decay); default (0, 1).
      params: the mechanism's own parameters, where it has any.
      backend: "auto", "xla", "reference", "tpu" or "gpu"; a named backend never falls back.
      core: run a mechanism without what its layer adds around it (gates, norms, rates, inserted tokens), which
        `attend` does not have; `jaxattn.nn.Decoder` does.
      spec: the mechanism's options, e.g. ``train_len=256`` for sigmoid.

    Returns:
      ``[B, T, H, V]`` in v's dtype; rows that see nothing are zeros.

    Raises:
      ConfigError: unknown mechanism or option, arrays that do not fit, wrong parameters, a mechanism whose layer adds
        something and `core` is not set.
      NotImplementedError: a capability or backend the mechanism does not have.
    """
    if not isinstance(name, str):
        raise ConfigError(f"the attention is {shown(name)} but must be the name of one, such as 'softmax'.")
    mechanism = get(name)
    _refuse_unknown(mechanism, spec)
    options = mechanism.make_spec(**spec)
    if not core and (missing := left_out(mechanism, options)):
        raise ConfigError(
            f"{name} is more than attend computes: {missing} would be left out. Use it in a jaxattn.nn.Decoder, or "
            "pass core=True for the mechanism alone."
        )
    self_sure = positions is not None or segment_ids is not None
    checks.heads(q, k, v, sure=self_sure or kv_positions is not None or kv_segment_ids is not None)
    batch, length, keys = q.shape[0], q.shape[1], k.shape[1]
    cross = kv_positions is not None or kv_segment_ids is not None or length != keys
    checks.ids("segment_ids", segment_ids, q.shape, "q", least=GLOBAL)
    checks.ids("kv_segment_ids", kv_segment_ids, k.shape, "k", least=GLOBAL)
    owners = jnp.ones((batch, length), jnp.int32) if segment_ids is None else segment_ids
    checks.ids("positions", positions, q.shape, "q", segments=owners)
    checks.ids("kv_positions", kv_positions, k.shape, "k")
    checks.prefix_len(prefix_len, batch)
    checks.callable_bias(bias)
    checks.number("scale", scale)
    checks.truth("causal", causal)
    check_window(window)
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
    owned = own_parameters(mechanism, options, q, k, v)
    checks.parameters(name, params, owned, f"pass params=get({name!r}).init_params(key, spec, heads=..., ...)")
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    if cross:
        fill = lambda x, default: default if x is None else jnp.asarray(x, jnp.int32)
        q_pos = fill(positions, default_positions(batch, length))
        k_pos = fill(kv_positions, q_pos if keys == length else default_positions(batch, keys))
        q_seg = fill(segment_ids, jnp.ones_like(q_pos))
        vis = Visibility(
            q_positions=q_pos,
            k_positions=k_pos,
            q_segments=q_seg,
            k_segments=fill(kv_segment_ids, q_seg if keys == length else jnp.ones_like(k_pos)),
            prefix_len=prefix_len,
            causal=bool(causal),
            window=window,
        )
    else:
        vis = self_visibility(
            batch,
            length,
            causal=bool(causal),
            positions=positions,
            segment_ids=segment_ids,
            window=window,
            prefix_len=prefix_len,
        )
    _refuse_unused(mechanism, rope, depth)
    call = Call(options, params or {}, scale, bias, rope, depth or (0, 1), backend=backend)
    q, v = mechanism.apply_gains((q, v), q, v, vis.q_positions, call)
    return mechanism.forward(q, k, v, vis, call)


def left_out(mechanism: Mechanism, spec: Any) -> str:
    """What a layer or a model adds to this mechanism, in words; empty where the mechanism is all there is."""
    parts = []
    if mechanism.surround is not None:
        parts.append(mechanism.surround.adds)
    if count := mechanism.prefix_tokens(spec):
        parts.append(f"{count} learned token{'s' * (count > 1)} in front of the sequence")
    if every := mechanism.block(spec):
        parts.append(f"a learned landmark behind every {every} tokens")
    return " and ".join(parts)


MASKS = ("mask", "attn_mask", "attention_mask", "key_padding_mask")
ELSEWHERE = {  # what other libraries call it
    "is_causal": "causal",
    "softmax_scale": "scale",
    "sm_scale": "scale",
    "window_size": "window",
    "sliding_window": "window",
    "local_window_size": "window",
    "alibi_slopes": "bias=jaxattn.rope.Alibi(slopes)",
}


def _refuse_unknown(mechanism: Mechanism, spec: dict[str, Any]) -> None:
    """Name what is meant by an option that neither `attend` nor the mechanism has."""
    own = [f.name for f in mechanism.spec.__dataclass_fields__.values()]
    for option in spec:
        if option in own:
            continue
        if option in MASKS:
            raise ConfigError(
                f"attend takes no {option}: say who sees whom with causal, window, prefix_len and segment_ids (0 is "
                "padding); scores are changed by a function, bias."
            )
        ours = [name for name in inspect.signature(attend).parameters if name not in ("name", "spec")]
        hint = f"{ELSEWHERE[option]} is it called here. " if option in ELSEWHERE else near(option, [*own, *ours])
        raise ConfigError(
            f"{mechanism.name} has no option {shown(option)}; {hint}Its options are: {', '.join(own) or 'none'}."
        )


def _refuse_unused(mechanism: Mechanism, rope: Rope | None, depth: tuple[int, int] | None) -> None:
    """Refuse `rope` and `depth` for mechanisms that have no use for them, and where they are none."""
    if rope is not None:
        if mechanism.rotary != "raw":
            raise ConfigError(
                f"{mechanism.name} takes no rope: rotate q and k before the call with Rope(base)(q, positions)."
            )
        if not isinstance(rope, Rope):
            raise ConfigError(f"rope is {shown(rope)} but must be a jaxattn.rope.Rope, such as Rope(10000.0).")
    if depth is not None:
        if not mechanism.capabilities.depth:
            raise ConfigError(f"{mechanism.name} is the same at every depth: leave depth out.")
        if not (isinstance(depth, tuple) and len(depth) == 2 and 0 <= depth[0] < depth[1]):
            raise ConfigError(f"depth is {shown(depth)} but must be (layer, number of layers), layers counted from 0.")


def own_parameters(mechanism: Mechanism, spec: Any, q: Array, k: Array, v: Array) -> dict[str, Any]:
    """Shapes of the parameters the mechanism owns, without creating them."""
    create = lambda: mechanism.init_params(
        jax.random.key(0), spec, heads=q.shape[2], kv_heads=k.shape[2], key_dim=q.shape[-1], value_dim=v.shape[-1]
    )
    return dict(jax.eval_shape(create))
