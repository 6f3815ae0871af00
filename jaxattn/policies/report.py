"""What an answer under a policy cost, as text."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxattn.models import ModelConfig
from jaxattn.policies import cost


def totals(model: ModelConfig, *, length: int, capacity: int) -> dict[str, float]:
    """Of one row behind `length` tokens with room for `capacity`, over all layers that keep keys: bytes held, bytes of
    keys and values that a new token reads, and the share of dense attention's keys that it does not read."""
    plan = model.keeping
    found = [cost(plan, model.site(layer), length=length, capacity=capacity) for layer in _keeping(model)]
    count = max(1, len(found))
    return {
        "bytes_held": sum(one.held for one in found),
        "bytes_read_per_token": sum(one.read for one in found),
        "sparsity": 1 - sum(one.share for one in found) / count,
    }


def _keeping(model: ModelConfig) -> list[int]:
    """The layers whose keys the policy keeps."""
    return [layer for layer in range(model.num_layers) if (found := model.mixer(layer).mechanism) and found.core]


def measured(model: ModelConfig, states: Any) -> dict[str, float]:
    """What the policy counted itself, such as how much of a prompt was read: means over rows and layers."""
    if model.scan_layers:
        return {}
    each = [model.keeping.policy.measured(states[layer]) for layer in _keeping(model)]
    return {name: float(np.mean([np.mean(one[name]) for one in each])) for name in (each[0] if each else ())}


def line(model: ModelConfig, *, length: int, capacity: int, counted: dict[str, float]) -> str:
    """One readable line; `counted` as `measured` gives it."""
    numbers = totals(model, length=length, capacity=capacity)
    return (
        f"policy {model.policy or 'dense'} behind {length} tokens: {numbers['bytes_held'] / 2**20:.2f} MiB held, "
        f"{numbers['bytes_read_per_token'] / 2**20:.2f} MiB of keys and values read per token, "
        f"sparsity {100 * numbers['sparsity']:.1f} %" + "".join(f", {name} {x:.3f}" for name, x in counted.items())
    )
