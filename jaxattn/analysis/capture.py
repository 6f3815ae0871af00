"""Run a decoder once and look inside: per-layer tensors, rebuilt into what the probes need.

Capturing is Flax's own `sow`: it costs nothing unless the collection ``capture`` is mutable.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.errors import ConfigError
from jaxattn.masks import GLOBAL, PADDING, Visibility, default_positions, self_visibility
from jaxattn.mechanisms import Call, Mechanism, RowWeights
from jaxattn.mechanisms._protocol import for_heads
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder, unstack_layers
from jaxattn.nn.attention import HEADS, position_bias
from jaxattn.nn.decoding import variables_of
from jaxattn.nn.insertion import insert, insertion_block
from jaxattn.nn.transformer import behind
from jaxattn.rope import PositionBias


@dataclasses.dataclass(frozen=True)
class LongStream:
    """A layer's inputs with the landmarks that the model inserted, W places; token t is at places[:, t]."""

    places: Int[Array, "B T"]
    queries: Float[Array, "B W H D"]
    keys: Float[Array, "B W K D"]
    values: Float[Array, "B W K V"]
    vis: Visibility


@dataclasses.dataclass(frozen=True)
class AttentionView:
    """One attention layer of one forward pass. T counts sink tokens in front, where the model has them.

    Inserted landmarks are in `long` alone: everything else, rows and columns of `weights` too, is of the tokens.
    A mechanism that weighs landmarks like tokens then has rows that miss this weight.

    inputs: the layer's input, where the mechanism's layer computes from it (`Surround`); surround: its parameters.
    """

    layer: int
    mechanism: Mechanism
    call: Call
    queries: Float[Array, "B T H D"]
    keys: Float[Array, "B T K D"]
    values: Float[Array, "B T K V"]
    heads_out: Float[Array, "B T H V"]
    output_kernel: Float[Array, "H V E"]
    output_bias: Float[Array, "E"] | None
    vis: Visibility
    inputs: Float[Array, "B T E"] | None = None
    surround: dict[str, Any] = dataclasses.field(default_factory=dict)
    long: LongStream | None = None

    @property
    def shows(self) -> str:
        """What the rows are, where they do not rebuild the layer's output (`Mechanism.shows`); else empty."""
        return self.mechanism.shows(self.call.spec)

    def weights(self, start: int | Array = 0, rows: int | None = None) -> RowWeights:
        """Dense rows [start, start + rows) of the attention matrix (all of them by default)."""
        found = self._rows(start, rows)
        if self.long is None:
            return found
        slots = jnp.broadcast_to(jnp.arange(found.slots), (self.queries.shape[0], found.slots))
        columns = jnp.concatenate([slots, found.slots + self.long.places], axis=1)
        keep = jax.vmap(lambda x, at: x[..., at])
        return RowWeights(keep(found.values, columns), keep(found.scores, columns), found.slots)

    def _rows(self, start: int | Array, rows: int | None) -> RowWeights:
        """`weights` on all columns, inserted landmarks among them."""
        rows = self.queries.shape[1] if rows is None else rows
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, rows, axis=1)
        all_keys = self if self.long is None else self.long
        vis = self.vis.rows(start, rows)
        if self.long is not None:
            queries = {"q_positions": vis.q_positions, "q_segments": vis.q_segments}
            vis = dataclasses.replace(self.long.vis, **queries, aligned=None)
        call = dataclasses.replace(self.call, values=all_keys.values, queries=all_keys.queries)
        return self.mechanism.weights(cut(self.queries), all_keys.keys, vis, call)

    def rebuild(self, start: int | Array = 0, rows: int | None = None) -> Float[Array, "B T H V"]:
        """`heads_out` once more, from the rows of `weights`: proof that these are what the model computed.

        Raises:
          NotImplementedError: the mechanism's rows are not all of its output; the text says what they are.
        """
        rows = self.queries.shape[1] if rows is None else rows
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, rows, axis=1)
        values = self.values if self.long is None else self.long.values
        live = cut(self.vis.q_segments) != PADDING
        o = self.mechanism.rebuild(self._rows(start, rows), values, live, self.call).astype(values.dtype)
        around = self.mechanism.surround
        if around is None or around.finish is None:
            return o
        assert self.inputs is not None
        return around.finish(o, cut(self.inputs), spec=self.call.spec, params=self.surround)

    def projected(self, heads: Float[Array, "B T H V"]) -> Float[Array, "B T E"]:
        """Heads behind W_O: of `heads_out` the layer's output, `attn_out` of `ForwardView.components`."""
        y = jnp.einsum("bthv,hve->bte", heads, self.output_kernel.astype(heads.dtype))
        return y if self.output_bias is None else y + self.output_bias.astype(y.dtype)

    def value_norms(self) -> Float[Array, "B H T"]:
        """||W_O^h v_j||: values seen through their head's slice of the output projection."""
        v = for_heads(self.values, self.queries.shape[2]).astype(jnp.float32)
        return jnp.linalg.norm(jnp.einsum("bthv,hve->bthe", v, self.output_kernel), axis=-1).swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class ForwardView:
    """One forward pass: logits, the attention layers, and the residual stream after every block.

    front: sink tokens in front of the sequence, included in every T axis but the logits'.
    """

    logits: Float[Array, "B T N"]
    attention: tuple[AttentionView, ...]
    residuals: Float[Array, "L B Tf E"]
    components: tuple[dict[str, Array], ...]
    front: int


def look(
    cfg: ModelConfig,
    params: dict[str, Any],
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    prefix_len: Int[Array, "B"] | None = None,
) -> ForwardView:
    """Run the model with every capture point on. `params` as trained (scanned or not), or variables with head tables;
    the rest as `Decoder` has it. Score-space policies show; one that leaves keys out has no such map.

    Raises:
      ConfigError: an input that does not fit; parameters of another model; a policy that leaves keys out.
    """
    keeping = cfg.keeping
    if keeping.policy.name != "dense":
        raise ConfigError(
            f"policy {keeping.policy.name} leaves keys out when it decodes, so there is no attention map of it: name a "
            "policy in score space, such as zero_tuning, or none."
        )
    for policy, _ in keeping.wraps:
        if policy.score_bias is None:
            raise ConfigError(
                f"policy {policy.name} changes what heads do by more than their scores, so there is no attention map "
                "of it: leave it out to see the heads as they are."
            )
    variables = variables_of(params)
    params = variables["params"]
    if cfg.scan_layers:
        params = unstack_layers(params, cfg)
    cfg = dataclasses.replace(cfg, scan_layers=False, remat=False)
    variables = variables | {"params": params}
    logits, sown = Decoder(cfg).apply(variables, tokens, positions, segment_ids, prefix_len, mutable="capture")
    captured = sown["capture"]
    batch, length = tokens.shape
    front = cfg.prefix_tokens
    pos = (default_positions(batch, length) if positions is None else positions) + front
    seg = jnp.ones_like(pos) if segment_ids is None else segment_ids
    prefix = behind(front, prefix_len)
    if front:
        pos = jnp.concatenate([default_positions(batch, front), pos], axis=1)
        seg = jnp.concatenate([jnp.full((batch, front), GLOBAL, seg.dtype), seg], axis=1)

    every = insertion_block(cfg.mixers)
    plan = insert(pos, seg, every) if every else None
    short = plan.shorten if plan else lambda x: x
    if plan:
        pos, seg = plan.positions, plan.segments
    sees = lambda pos, seg, window: self_visibility(
        *pos.shape, positions=pos, segment_ids=seg, window=window, prefix_len=prefix
    )

    views, components = [], []
    for layer in range(cfg.num_layers):
        here: Any = captured[f"layer_{layer}"]
        choice = cfg.mixer(layer)
        names = ("attn_out", "mlp_out", "block_out")
        components.append({name: short(here[name][0]) for name in names if name in here})
        if choice.mechanism is None:
            continue
        own: Any = params[f"layer_{layer}"]["attn"]
        seen: Any = here["attn"]
        q, k, v = (seen[name][0] for name in ("queries", "keys", "values"))
        vis = sees(pos, seg, choice.window)
        long = LongStream(plan.places, q, k, v, vis) if plan else None
        if plan:
            q, k, v, vis = short(q), short(k), short(v), sees(short(pos), short(seg), choice.window)
        views.append(
            AttentionView(
                layer=layer,
                mechanism=choice.mechanism,
                call=Call(
                    choice.spec,
                    own.get("mechanism", {}),
                    bias=_bias(cfg, layer, own.get("relative"), variables),
                    rope=cfg.rope,
                    depth=(layer, cfg.num_layers),
                    rates=seen["rates"][0] if "rates" in seen else None,
                    backend=cfg.backend,
                ),
                queries=q,
                keys=k,
                values=v,
                heads_out=short(seen["head_out"][0]),
                output_kernel=own["o"]["kernel"].reshape(cfg.num_heads, cfg.v_dim, cfg.d_model),
                output_bias=own["o"].get("bias"),
                vis=vis,
                inputs=short(seen["input"][0]) if "input" in seen else None,
                surround=own.get("surround", {}),
                long=long,
            )
        )
    residuals = jnp.stack([c["block_out"] for c in components])
    return ForwardView(logits, tuple(views), residuals, tuple(components), front)


def _bias(cfg: ModelConfig, layer: int, table: Array | None, variables: dict[str, Any]) -> PositionBias | None:
    """What is added to a layer's scores: its position bias and what score-space policies add."""
    own, plan = position_bias(cfg, table), cfg.keeping
    mechanism = cfg.mixer(layer).mechanism
    if not plan.wraps or mechanism is None or mechanism.core is None:
        return own
    heads = variables.get(HEADS, {}).get(f"layer_{layer}", {}).get("attn", {})
    site, parts = cfg.site(layer), [] if own is None else [own]
    for policy, spec in plan.wraps:
        assert policy.score_bias is not None, "`look` refuses others"
        added = policy.score_bias(spec, site, heads)
        parts += [] if added is None else [added]
    total = lambda q, k: functools.reduce(jnp.add, [part(q, k) for part in parts])
    return total if parts else None
