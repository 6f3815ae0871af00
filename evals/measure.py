"""Everything the sink study reads off a model, as one jitted function of (params, tokens).

Sink metric: arXiv 2410.10781 section 3.2. Extreme-token probes and Bigram-Backcopy risks: arXiv 2410.13835.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from evals.definitions import NEARLY_EMPTY, NO_DISTRIBUTION
from jaxattn.analysis import alpha_of, look, probes, sink_rate
from jaxattn.analysis.capture import AttentionView, ForwardView
from jaxattn.analysis.sink_rate import over_query_blocks
from jaxattn.masks import visible
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
    any). Averaged: first_token_weight_raw, rows_no_distribution, rows_nearly_empty, sink_logit, sink_logit_std,
    value_norm_first, value_norm_rest [L, H]; residual_norm_first, residual_norm_rest [all layers]. With a task also
    first_token_weight on trigger / non-trigger queries and the same _raw [L, H] and the risks in nats. L counts
    attention layers; `evals.definitions` says what each is.
    """

    @jax.jit
    def one(params: Any, tokens: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        """Means over a few sequences, and for those that are not over all queries how many they are over."""
        view = look(cfg, params, tokens)
        layers, front = view.attention, view.front
        live = jnp.ones((tokens.shape[0], tokens.shape[1] + front), bool)
        out, counts, plain = _alphas(view), {}, live
        if task is not None:
            trigger = jnp.isin(tokens, jnp.asarray(task.trigger_ids))
            pad = lambda m: jnp.pad(m, ((0, 0), (front, 0)))
            plain = pad(~trigger)
            for values, over in (_split(view, plain, pad(trigger)), _risks(view.logits, tokens, trigger, task)):
                out, counts = out | values, counts | over
        chosen = [plain & _sees_first(layer, front) for layer in layers]
        logit = [probes.sink_logit(layer, c, front) for layer, c in zip(layers, chosen, strict=True)]
        mean, spread = (jnp.stack(x) for x in zip(*logit, strict=True))
        third = jnp.arange(live.shape[1]) > front + 1
        number = jnp.stack([jnp.sum(c & third) for c in chosen])[:, None]
        facts = [_rows(layer, front) for layer in layers]
        norms = [probes.value_norms(layer, live, front) for layer in layers]
        first, rest = probes.residual_norms(view, live)
        out |= {
            **{name: jnp.stack([found[name] for found in facts]) for name in facts[0]},
            "sink_logit": mean,
            "sink_logit_square": spread**2 + mean**2,
            "value_norm_first": jnp.stack([a for a, _ in norms]),
            "value_norm_rest": jnp.stack([b for _, b in norms]),
            "residual_norm_first": first,
            "residual_norm_rest": rest,
        }
        return out, counts | {"sink_logit": number, "sink_logit_square": number}

    def measure(params: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
        count, length = tokens.shape
        most = max(1, TOKENS_AT_ONCE // length)
        size = max(d for d in range(1, min(count, most) + 1) if count % d == 0)
        parts = [jax.device_get(one(params, tokens[i : i + size])) for i in range(0, count, size)]

        def merge(name: str) -> np.ndarray:
            values = [np.asarray(part[name]) for part, _ in parts]
            if name in ("alpha", "alpha_slot"):
                return np.concatenate(values)
            over = [np.asarray(counts.get(name, 1)) for _, counts in parts]
            total = np.sum([v * n for v, n in zip(values, over, strict=True)], axis=0)
            return _ratio(total, np.broadcast_to(np.sum(over, axis=0), np.shape(total)))

        found = {name: merge(name) for name in parts[0][0]}
        square = found.pop("sink_logit_square")
        return found | {"sink_logit_std": np.sqrt(np.maximum(square - found["sink_logit"] ** 2, 0))}

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


def _sees_first(layer: AttentionView, front: int) -> Array:
    """[B, T]: which queries can see the first token."""
    return visible(layer.vis.columns(front, 1))[..., 0]


def _rows(layer: AttentionView, front: int) -> dict[str, Array]:
    """[H] each: mean raw weight of the first token, and the shares of rows that are odd."""
    batch, length = layer.queries.shape[:2]
    first = layer.weights(0, 1).slots + front

    def reduce(a: Array, scores: Array, index: Array) -> dict[str, Array]:
        counts = ((index >= front) & (index < length)).astype(jnp.float32)
        total = lambda x: jnp.sum(x * counts, axis=(0, 2))
        odd = (jnp.abs(jnp.sum(a, axis=-1) - 1) > NO_DISTRIBUTION) | (jnp.min(a, axis=-1) < -NO_DISTRIBUTION)
        empty = jnp.sum(jnp.abs(a), axis=-1) < NEARLY_EMPTY
        return {"raw": total(a[..., first]), "odd": total(odd), "empty": total(empty)}

    sums = over_query_blocks(layer, reduce)
    rows, able = batch * (length - front), jnp.sum(_sees_first(layer, front))
    return {
        "first_token_weight_raw": sums["raw"] / jnp.maximum(able, 1),
        "rows_no_distribution": sums["odd"] / rows,
        "rows_nearly_empty": sums["empty"] / rows,
    }


def _split(view: ForwardView, plain: Array, trigger: Array) -> tuple[dict[str, Array], dict[str, Array]]:
    """Start-token weights by kind of query [L, H], shares and raw, and how many queries they are over [L, 1]."""
    out, counts = {}, {}
    later = jnp.arange(plain.shape[1]) > view.front
    for label, queries in (("nontrigger", plain), ("trigger", trigger)):
        chosen = [queries & later & _sees_first(layer, view.front) for layer in view.attention]
        for suffix, proxy in (("", True), ("_raw", False)):
            pairs = zip(view.attention, chosen, strict=True)
            rows = [probes.first_token_weight(layer, c, view.front, proxy=proxy) for layer, c in pairs]
            name = f"first_token_weight_{label}{suffix}"
            out[name], counts[name] = jnp.stack(rows), jnp.stack([jnp.sum(c) for c in chosen])[:, None]
    return out, counts


def _risks(logits: Array, tokens: Array, trigger: Array, task: BigramTask) -> tuple[dict[str, Array], dict[str, Array]]:
    """Cross-entropy on trigger and other queries t >= 1, the excess over the table's own loss there, their numbers."""
    loss = token_losses(logits[:, :-1], tokens[:, 1:])[:, 1:]
    current, following = tokens[:, 1:-1], tokens[:, 2:]
    copy = trigger[:, 1:-1].astype(jnp.float32)
    oracle = -jnp.asarray(task.log_p, jnp.float32)[current, following]
    mean = lambda x, w: jnp.sum(jnp.where(w > 0, x, 0.0)) / jnp.maximum(jnp.sum(w), 1.0)
    bigram = mean(loss, 1 - copy)
    values = {
        "risk_backcopy": mean(loss, copy),
        "risk_bigram": bigram,
        "risk_bigram_excess": bigram - mean(oracle, 1 - copy),
    }
    others = jnp.sum(1 - copy)
    return values, {"risk_backcopy": jnp.sum(copy), "risk_bigram": others, "risk_bigram_excess": others}


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
        "value_drain": _ratio(raw["value_norm_first"], raw["value_norm_rest"]),
        "residual_peak": raw["residual_norm_first"] - raw["residual_norm_rest"],
    }
    out |= {k: v for k, v in raw.items() if k not in ("alpha", "alpha_slot")}
    out |= {k: (100 * v.astype(np.float64)).round(4) for k, v in raw.items() if k.startswith("rows_")}
    return {k: _plain(v) for k, v in out.items()}


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=np.asarray(b) > 0)


def _plain(value: Any) -> Any:
    """JSON-ready; what is not finite becomes null, which JSON has no number for."""
    if isinstance(value, np.ndarray | np.generic):
        value = np.asarray(value, np.float64).round(6).tolist()
    if isinstance(value, list):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def attention_maps(cfg: ModelConfig, params: Any, tokens: np.ndarray) -> tuple[np.ndarray, int]:
    """Dense A [n, L, H, T, slots + T] of a few short sequences, and the number of leading extra columns.

    In f16 where all rows sum to one, else in f32, which tiny and huge weights need. Sink tokens in front count as
    extra columns; where layers differ in slots, the missing ones are zero.
    """
    maps, shares, columns = _maps(cfg, params, tokens)
    return np.asarray(maps, np.float16 if shares else np.float32), int(columns)


@functools.partial(jax.jit, static_argnums=0)
def _maps(cfg: ModelConfig, params: Any, tokens: Any) -> tuple[Any, Any, int]:
    """Maps as above, whether all rows sum to one, and the number of leading extra columns."""
    view = look(cfg, params, tokens)
    rows = [layer.weights() for layer in view.attention]
    most = max(r.slots for r in rows)
    wide = [jnp.pad(r.values, ((0, 0), (0, 0), (0, 0), (most - r.slots, 0))) for r in rows]
    maps = jnp.stack(wide, axis=1)[..., view.front :, :]
    shares = jnp.all(jnp.abs(jnp.sum(maps, axis=-1) - 1) <= NO_DISTRIBUTION)
    return maps, shares, most + view.front
