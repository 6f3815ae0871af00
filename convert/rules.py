"""Which tensor of a HuggingFace checkpoint is which parameter of ours, for both directions.

A rule is a pair of name patterns with `{i}` for the layer, and what happens on the way. Every parameter of the
model and every tensor of the source must be named by exactly one rule: nothing is dropped, nothing is made up.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxattn.errors import Incomplete, Mismatch, Unsupported
from jaxattn.models import ModelConfig
from jaxattn.runs.parameters import abstract_params


@dataclasses.dataclass(frozen=True)
class Rule:
    """`theirs` [out, in] is `ours` [in, out] where `transpose`."""

    theirs: str
    ours: str
    transpose: bool = False

    def name(self, layer: int | None) -> str:
        return self.theirs if layer is None else self.theirs.replace("{i}", str(layer))

    def path(self, layer: int | None) -> str:
        return self.ours if layer is None else self.ours.replace("{i}", str(layer))


def _linear(theirs: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{theirs}.weight", f"{ours}/kernel", transpose=True), Rule(f"{theirs}.bias", f"{ours}/bias")


_LAYER = "model.layers.{i}"
LAYER = re.compile(r"model\.layers\.(\d+)\.")
# Llama, Mistral, Qwen2 and Qwen3 share these names; which of them a model has follows from its configuration.
DECODER = (
    Rule("model.embed_tokens.weight", "embed"),
    Rule("lm_head.weight", "unembed", transpose=True),
    Rule("model.norm.weight", "final_norm/scale"),
    Rule(f"{_LAYER}.input_layernorm.weight", "layer_{i}/attn_norm/scale"),
    Rule(f"{_LAYER}.post_attention_layernorm.weight", "layer_{i}/mlp_norm/scale"),
    *(rule for x in "qkvo" for rule in _linear(f"{_LAYER}.self_attn.{x}_proj", f"layer_{{i}}/attn/{x}")),
    Rule(f"{_LAYER}.self_attn.q_norm.weight", "layer_{i}/attn/q_norm"),
    Rule(f"{_LAYER}.self_attn.k_norm.weight", "layer_{i}/attn/k_norm"),
    *(rule for x in ("gate", "up", "down") for rule in _linear(f"{_LAYER}.mlp.{x}_proj", f"layer_{{i}}/mlp/{x}")),
)
# What some exporters leave in the files although it is computed from the configuration.
COMPUTED = (
    re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
    re.compile(r"model\.rotary_emb\.inv_freq"),
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """One tensor: its name there, its path here, its shape here, and whether it is turned."""

    name: str
    path: str
    shape: tuple[int, ...]
    transpose: bool

    @property
    def their_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transpose else self.shape

    def ours(self, array: np.ndarray) -> np.ndarray:
        return array.T if self.transpose else array

    theirs = ours  # a transposition undoes itself


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter of the model, by "layer_0/attn/q/kernel"."""
    return {"/".join(path): leaf.shape for path, leaf in abstract_params(model).items()}


def pairs(model: ModelConfig, table: tuple[Rule, ...] = DECODER) -> dict[str, Pair]:
    """Every parameter of the model as a `Pair`, by the tensor's name.

    Raises:
      Unsupported: the model has a parameter that no rule names, so it is no HuggingFace architecture.
    """
    by_path = {}
    for rule in table:
        for layer in range(model.num_layers) if "{i}" in rule.theirs else (None,):
            by_path[rule.path(layer)] = (rule.name(layer), rule.transpose)
    found = {}
    for path, shape in parameter_shapes(model).items():
        if path not in by_path:
            raise Unsupported(
                f"parameter {path!r} has no counterpart in a HuggingFace Llama, Mistral or Qwen model; "
                "only models of softmax layers with RMSNorm, SwiGLU and rotary positions can be exchanged."
            )
        name, transpose = by_path[path]
        found[name] = Pair(name, path, tuple(shape), transpose)
    return found


def check_layers(found: Iterable[str], layers: int, origin: str) -> None:
    """Refuse a configuration of more layers than there are tensors of, before anything is built from it.

    Raises:
      Incomplete: naming both numbers.
    """
    there = {match.group(1) for name in found if (match := LAYER.match(name))}
    if layers > len(there):
        absent = next(i for i in range(layers) if str(i) not in there)
        raise Incomplete(
            f"{origin} lacks 'model.layers.{absent}' of the {layers:,} layers that its configuration asks for; nothing "
            "is filled with random numbers: download the whole checkpoint."
        )


def check_names(found: Mapping[str, Any], wanted: Mapping[str, Pair], origin: str) -> None:
    """Refuse a source that lacks a tensor, or has one that the model does not.

    Raises:
      Incomplete: naming the missing tensors.
      Mismatch: naming the unknown ones.
    """
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise Incomplete(
            f"{origin} lacks {_some(missing)} of the {len(wanted)} tensors its configuration asks for; "
            "nothing is filled with random numbers: download the whole checkpoint."
        )
    unknown = sorted(n for n in set(found) - set(wanted) if not any(r.fullmatch(n) for r in COMPUTED))
    if unknown:
        raise Mismatch(
            f"{origin} has {_some(unknown)}, which the architecture of its configuration does not have; "
            "nothing is dropped: check config.json."
        )


def check_shape(pair: Pair, shape: tuple[int, ...], origin: str) -> None:
    """Raises `Mismatch` naming the tensor and both shapes."""
    if tuple(shape) != pair.their_shape:
        raise Mismatch(
            f"tensor {pair.name!r} of {origin} has shape {list(shape)} but the configuration asks for "
            f"{list(pair.their_shape)}; check config.json."
        )


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} as {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, last = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    return tree


def _some(names: list[str], most: int = 3) -> str:
    shown = ", ".join(repr(n[:120]) for n in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
