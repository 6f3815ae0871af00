"""Run folders as training leaves them, for the report's tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

WORDS = [*"the quick brown fox t e s", "\n", "$x$", "<b>", "注意", "_"]
LAYERS, LENGTH = 3, 40


def make_run(folder: Path, *, attn: str = "softmax", heads: int = 1, bb: bool = True, sink: float = 0.93,
             done: bool = True, steps: int = 1000, seed: int = 0, slot: float | None = None) -> Path:  # fmt: skip
    """A run folder as training leaves it; `sink` is the final start-token weight of layer 1 head 0."""
    rng = np.random.default_rng(seed)
    raw = 1.0 if attn == "softmax" else 0.4  # of the share
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "attn": attn, "preset": "bb" if bb else "tiny", "seed": seed, "steps": 1000,
        "data": {"source": "bb" if bb else "stdlib", "context": 48, "batch_size": 32, "seed": 0},
        "model": {"num_layers": LAYERS, "d_model": 64, "num_heads": heads, "mixers": [attn]},
        "optim": {"lr": 1e-3, "note": "<i>raw</i>"},
    }  # fmt: skip
    entropies = {"unigram_nats": 3.2, "bigram_nats": 2.4, "bigram_heldout_nats": 2.41}
    if bb:
        entropies |= {"oracle_nats": 1.648, "oracle_trigger_nats": 0.0, "oracle_non_trigger_nats": 2.218}
    write(folder / "config.json", config)
    write(folder / "environment.json", {
        "git": {"commit": "abc1234def5678", "dirty": False}, "versions": {"jax": "0.10.2"},
        "devices": {"kind": "cpu", "count": 1}, "host": "box", "argv": ["pretrain", f"--attn={attn}"],
    })  # fmt: skip
    write(folder / "data.json", {"name": "bb" if bb else "stdlib", "vocab_size": 67,
                                 "meta": {"trigger_ids": [7, 8]}, "entropies": entropies})  # fmt: skip

    def table(step: int, scale: float = 1.0) -> list[list[float]]:
        out = 0.02 + 0.03 * rng.random((LAYERS, heads))
        out[1, 0] = max(out[1, 0], scale * sink * (1 / (1 + np.exp(-(step - 380) / 60))))
        return out.round(4).tolist()

    lines = []
    for step in range(10, steps + 1, 10):
        row: dict[str, Any] = {"step": step, "loss": 1.7 + 2.5 * np.exp(-step / 150) + 0.03 * rng.normal(),
                               "tokens_per_s": 52_000 + 800 * rng.normal(), "lr": 1e-3, "grad_norm": 0.5,
                               "time_s": step / 30, "skipped": 0}  # fmt: skip
        if step % 50 == 0:
            row |= {"val_loss": 1.7 + 2.5 * np.exp(-step / 150), "first_token_weight": table(step, 0.8)}
            row["first_token_weight_raw"] = (raw * np.array(row["first_token_weight"])).tolist()
            row["sink_rate"] = 100 / LAYERS / heads * (sink > 0.3 and step > 400)
            row["value_drain"] = (1 - 0.9 * np.array(table(step))).tolist()
            row["residual_peak"] = [0.5, sink * step / 100, sink * step / 80]
        if bb and step % 50 == 0:
            row["first_token_weight_nontrigger"] = table(step)
            row["first_token_weight_trigger"] = table(step, 0)
            for kind in ("nontrigger", "trigger"):
                row[f"first_token_weight_{kind}_raw"] = (raw * np.array(row[f"first_token_weight_{kind}"])).tolist()
            row |= {"risk_backcopy": 3 * np.exp(-step / 120), "risk_bigram_excess": np.exp(-step / 200)}
        lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if not done:
        return folder
    weights: dict[str, Any] = {"first_token_weight": table(1000, 0.8)}
    if bb:
        weights["first_token_weight_nontrigger"] = table(1000)
        weights["first_token_weight_trigger"] = table(1000, 0)
        for key in list(weights):
            weights[key + "_raw"] = (raw * np.array(weights[key])).tolist()
        weights |= {"risk_backcopy": 0.0021, "risk_bigram": 2.243, "risk_bigram_excess": 0.0253}
    rest = 8 + rng.random((LAYERS, heads))
    drain = np.array(table(1000)) * -0.88 + 1
    write(folder / "sinks.json", {
        "step": 1000, "attn": attn, "source": "bb" if bb else "stdlib", "epsilon": 0.3, "length": 48,
        "sequences": 100, "sink_rate": 100 / LAYERS / heads if sink > 0.3 else 0.0, "sink_rate_slot": slot,
        "slots": [] if slot is None else ["constant"], "proxy": attn != "softmax", "notes": [],
        "rows_no_distribution": [[0.0 if attn == "softmax" else 100.0] * heads] * LAYERS,
        "rows_nearly_empty": [[0.0] * heads] * LAYERS, "attention_layers": list(range(LAYERS)),
        "sink_rate_by_position": [33.3 if sink > 0.3 else 0.0, 1.2] + [0.0] * 14,
        "sink_logit": (12 * sink * np.array(weights["first_token_weight"])).tolist(),
        "value_norm_first": (rest * drain).tolist(), "value_norm_rest": rest.tolist(),
        "value_drain": drain.tolist(),
        "residual_norm_first": [9.0, 12 + 20 * sink, 14 + 25 * sink], "residual_norm_rest": [8.0, 12.0, 15.0],
        "residual_peak": [1.0, 20 * sink, 25 * sink - 1], **weights,
    })  # fmt: skip
    scores = rng.normal(size=(2, LAYERS, heads, LENGTH, LENGTH))
    scores[:, 1, 0, :, 0] += 6.5 * sink
    a = np.exp(scores) * np.tril(np.ones((LENGTH, LENGTH)))
    tokens = rng.integers(0, len(WORDS), (2, LENGTH))
    labels = np.array(WORDS)[tokens]
    labels[:, 0] = "<s>"
    a = a / (a.sum(-1, keepdims=True) if attn == "softmax" else 2.0)
    np.savez(folder / "maps.npz", weights=a.astype(np.float16), tokens=tokens, labels=labels, slots=0)
    return folder


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
