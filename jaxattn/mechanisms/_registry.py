"""Name -> mechanism. One line a mechanism; modules load on first use."""

from __future__ import annotations

import ast
import dataclasses
import importlib
from typing import Any

from jaxattn.calls import parse_call
from jaxattn.errors import ConfigError, suggest
from jaxattn.mechanisms._protocol import Mechanism

_PLACES = {
    "softmax": "softmax:MECHANISM",
    "softmax_off_by_one": "softmax_off_by_one:MECHANISM",
    "sigmoid": "sigmoid:MECHANISM",
    "elu": "elu:MECHANISM",
    "relu": "relu:MECHANISM",
    "identity": "identity:MECHANISM",
    "kernel_elu": "kernel_elu:MECHANISM",
    "kernel_linear": "kernel_linear:MECHANISM",
    "kernel_mlp": "kernel_mlp:MECHANISM",
    "k_bias": "kv_bias:K_BIAS",
    "v_bias": "kv_bias:V_BIAS",
    "kv_bias": "kv_bias:KV_BIAS",
    "sink_token": "sink_token:MECHANISM",
    "selective_temperature": "selective_temperature:MECHANISM",
    "softplus": "softplus:MECHANISM",
    "linear": "linear:MECHANISM",
    "lightning": "lightning:MECHANISM",
    "aaren": "aaren:MECHANISM",
    "titans": "titans:MECHANISM",
    "landmark": "landmark:MECHANISM",
    "transnormer": "transnormer:MECHANISM",
    "based": "based:MECHANISM",
}


def names() -> list[str]:
    """Every registered mechanism, sorted."""
    return sorted(_PLACES)


def get(name: str) -> Mechanism:
    """The mechanism called `name`.

    Raises:
      ConfigError: no such mechanism; the sentence lists near names.
    """
    if name not in _PLACES:
        raise ConfigError(suggest("attention", name, names()))
    module, attribute = _PLACES[name].split(":")
    return getattr(importlib.import_module(f"jaxattn.mechanisms.{module}"), attribute)


@dataclasses.dataclass(frozen=True)
class MixerChoice:
    """One layer's mixer: a mechanism with its options, a gated convolution of width `conv`, or nothing.

    `window` in positions.
    """

    mechanism: Mechanism | None
    spec: Any = None
    window: int | None = None
    conv: int = 0


def parse_mixers(text: str) -> tuple[str, ...]:
    """Split ``"softmax(window=64), sigmoid"`` into its entries, without evaluating anything.

    Raises:
      ConfigError: the text is not a comma-separated list of NAME or NAME(option=value, ...).
    """
    try:
        tree = ast.parse(f"({text},)", mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"attention {text!r} is not NAME or NAME(option=value, ...): {error}.") from error
    if not isinstance(tree, ast.Tuple) or not tree.elts:
        raise ConfigError(f"attention {text!r} is not NAME or NAME(option=value, ...).")
    return tuple(ast.unparse(entry) for entry in tree.elts)


def resolve_mixer(text: str) -> MixerChoice:
    """``"sigmoid(train_len=256)"`` -> its mechanism, spec and window.

    ``"none"`` is a layer without a mixer, ``"conv(width=3)"`` one with a gated short convolution.

    Raises:
      ConfigError: unknown mechanism, unknown option, impossible value.
    """
    if text == "none":
        return MixerChoice(None)
    name, options = parse_call("attention", text)
    if name == "conv":
        width = options.pop("width", 3)
        if options or not isinstance(width, int) or width < 1:
            raise ConfigError(f"{text}: conv takes width alone, a whole number of at least 1.")
        return MixerChoice(None, conv=width)
    mechanism = get(name)
    window = options.pop("window", None)
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ConfigError(f"{text}: window is {window!r} but must be a whole number of at least 1.")
    return MixerChoice(mechanism, mechanism.make_spec(**options), window)
