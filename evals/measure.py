"""Everything the sink study reads off a model, as one jitted function of (params, tokens).

Sink metric: arXiv 2410.10781 section 3.2. Extreme-token probes and Bigram-Backcopy risks: arXiv 2410.13835.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxattn.analysis import alpha_of, look, probes, sink_rate
from jaxattn.analysis.capture import ForwardView
from jaxattn.models import ModelConfig
from train.objective import token_losses

POSITIONS = 16  # Sink_k is reported for k = 1..POSITIONS
TOKENS_AT_ONCE = 16_384


@dataclasses.dataclass(frozen=True)
class BigramTask:
    """What the Bigram-Backcopy probes need: trigger ids and log P(next | current) [V, V]."""

    trigger_ids: tuple[int, ...]
    log_p: np.ndarray


def make_measure(
    cfg: ModelConfig, *, task: BigramTask | None = None
) -> Callable[[Any, np.ndarray], dict[str, np.ndarray]]:
    """Build ``measure(params, tokens [n, T]) -> dict of arrays``.

    Per sequence: alpha [n, L, H, k], alpha_slot [n, L, H] (largest over slots and sink tokens, -1 without
    any). Averaged: first_token_weight_raw, sink_logit, sink_logit_std, value_norm_first, value_norm_rest
    [L, H]; residual_norm_first, residual_norm_rest [all layers]. With a task also first_token_weight and
    its proxy on trigger / non-trigger queries [L, H] and the risks in nats. L counts attention layers.
    """

    @jax.jit
    def one(params: Any, tokens: Array) -> dict[str, Array]:
        view = look(cfg, params, tokens)
        out = _alphas(view)
        live = jnp.ones((tokens.shape[0], tokens.shape[1] + view.front), bool)
        plain = live
        if task is not None:
            trigger = jnp.isin(tokens, jnp.asarray(task.trigger_ids))
            pad = lambda m: jnp.pad(m, ((0, 0), (view.front, 0)))
            plain = pad(~trigger)
            out |= _split(view, plain, pad(trigger)) | _risks(view.logits, tokens, trigger, task)
        layers = view.attention
        stack = lambda f: jnp.stack([f(layer) for layer in layers])
        logit = [probes.sink_logit(layer, plain, view.front) for layer in layers]
        norms = [probes.value_norms(layer, live, view.front) for layer in layers]
        first, rest = probes.residual_norms(view, live)
        return out | {
            "first_token_weight_raw": stack(lambda a: probes.first_token_weight(a, live, view.front)),
            "sink_logit": jnp.stack([m for m, _ in logit]),
            "sink_logit_std": jnp.stack([s for _, s in logit]),
            "value_norm_first": jnp.stack([a for a, _ in norms]),
            "value_norm_rest": jnp.stack([b for _, b in norms]),
            "residual_norm_first": first,
            "residual_norm_rest": rest,
        }

    def measure(params: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
        count, length = tokens.shape
        most = max(1, TOKENS_AT_ONCE // length)
        size = max(d for d in range(1, min(count, most) + 1) if count % d == 0)
        parts = [jax.device_get(one(params, tokens[i : i + size])) for i in range(0, count, size)]
        per_sequence = ("alpha", "alpha_slot")

        def merge(name: str) -> np.ndarray:
            values = [np.asarray(part[name]) for part in parts]
            return np.concatenate(values) if name in per_sequence else np.mean(values, axis=0)

        return {name: merge(name) for name in parts[0]}

    return measure


def _alphas(view: ForwardView) -> dict[str, Array]:
    real, slot = [], []
    for layer in view.attention:
        alpha = alpha_of(layer)
        extra = alpha.shape[-1] - layer.queries.shape[1] + view.front
        real.append(alpha[..., extra : extra + POSITIONS])
        empty = jnp.full(alpha.shape[:2], -1.0)
        slot.append(jnp.max(alpha[..., :extra], axis=-1) if extra else empty)
    return {"alpha": jnp.stack(real, axis=1), "alpha_slot": jnp.stack(slot, axis=1)}


def _split(view: ForwardView, plain: Array, trigger: Array) -> dict[str, Array]:
    out = {}
    for label, queries in (("nontrigger", plain), ("trigger", trigger)):
        for suffix, proxy in (("", False), ("_proxy", True)):
            rows = [probes.first_token_weight(layer, queries, view.front, proxy=proxy) for layer in view.attention]
            out[f"first_token_weight_{label}{suffix}"] = jnp.stack(rows)
    return out


def _risks(logits: Array, tokens: Array, trigger: Array, task: BigramTask) -> dict[str, Array]:
    """Cross-entropy on trigger and other queries t >= 1; the excess is over the table's own loss there."""
    loss = token_losses(logits[:, :-1], tokens[:, 1:])[:, 1:]
    current, following = tokens[:, 1:-1], tokens[:, 2:]
    copy = trigger[:, 1:-1].astype(jnp.float32)
    oracle = -jnp.asarray(task.log_p, jnp.float32)[current, following]
    mean = lambda x, w: jnp.sum(jnp.where(w > 0, x, 0.0)) / jnp.maximum(jnp.sum(w), 1.0)
    bigram = mean(loss, 1 - copy)
    return {
        "risk_backcopy": mean(loss, copy),
        "risk_bigram": bigram,
        "risk_bigram_excess": bigram - mean(oracle, 1 - copy),
    }


def summarise(raw: dict[str, np.ndarray], *, epsilon: float) -> dict[str, Any]:
    """The JSON form: sink rates in percent, tables as nested lists, drain and peak derived."""
    alpha = raw["alpha"]
    percent = lambda column: float(sink_rate(jnp.asarray(alpha), column, epsilon))
    slotted = raw["alpha_slot"] >= 0
    out: dict[str, Any] = {
        "sink_rate": percent(0),
        "sink_rate_by_position": [percent(k) for k in range(alpha.shape[-1])],
        "sink_rate_slot": (float(100 * np.mean(raw["alpha_slot"][slotted] > epsilon)) if slotted.any() else None),
        "first_token_weight": alpha[..., 0].mean(axis=0),
        "first_token_weight_slot": raw["alpha_slot"].mean(axis=0) if slotted.all() else None,
        "value_drain": raw["value_norm_first"] / np.maximum(raw["value_norm_rest"], 1e-12),
        "residual_peak": raw["residual_norm_first"] - raw["residual_norm_rest"],
    }
    out |= {k: v for k, v in raw.items() if k not in ("alpha", "alpha_slot")}
    return {k: _plain(v) for k, v in out.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value, np.float64).round(6).tolist()
    return value


def attention_maps(cfg: ModelConfig, params: Any, tokens: np.ndarray) -> tuple[np.ndarray, int]:
    """Dense A [n, L, H, T, slots + T] f16 of a few short sequences, and the number of leading extra columns.

    Sink tokens in front count as extra columns; where layers differ in slots, the missing ones are zero.
    """
    view = look(cfg, params, jnp.asarray(tokens))
    rows = [layer.weights() for layer in view.attention]
    most = max(r.slots for r in rows)
    wide = [jnp.pad(r.values, ((0, 0), (0, 0), (0, 0), (most - r.slots, 0))) for r in rows]
    maps = jnp.stack(wide, axis=1)[..., view.front :, :]
    return np.asarray(maps, np.float16), most + view.front
