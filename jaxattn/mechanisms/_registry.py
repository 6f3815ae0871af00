"""Which attention mechanisms there are, one line each, and what a layer of `--attn` may be."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxattn.errors import ConfigError, shown
from jaxattn.mechanisms._protocol import Mechanism
from jaxattn.registry import MOST, Registry, is_whole, parse_list

MECHANISMS: Registry[Mechanism] = Registry(
    kind="attention",
    noun="mechanism",
    package="jaxattn.mechanisms",
    record=Mechanism,
    attribute="MECHANISM",
    reserved=("none", "conv"),  # what a layer may have instead of a mechanism
    places={
        "softmax": "softmax",
        "softmax_off_by_one": "softmax_off_by_one",
        "sigmoid": "sigmoid",
        "elu": "elu",
        "relu": "relu",
        "identity": "identity",
        "kernel_elu": "kernel_elu",
        "kernel_linear": "kernel_linear",
        "kernel_mlp": "kernel_mlp",
        "k_bias": "kv_bias:K_BIAS",
        "v_bias": "kv_bias:V_BIAS",
        "kv_bias": "kv_bias:KV_BIAS",
        "sink_token": "sink_token",
        "selective_temperature": "selective_temperature",
        "softplus": "softplus",
        "linear": "linear",
        "lightning": "lightning",
        "aaren": "aaren",
        "titans": "titans",
        "landmark": "landmark",
        "transnormer": "transnormer",
        "based": "based",
    },
)
names, get, unregister = MECHANISMS.names, MECHANISMS.get, MECHANISMS.unregister


def register(mechanism: Mechanism, *, replace: bool = False) -> Mechanism:
    """Make a mechanism of your own known by its name, to `get`, `attend`, `--attn`, the tests and the reports.

    In a module of yours: ``register(score_family(name="mine", ...))``. Command lines import the modules named in
    the environment variable ``JAXATTN_PLUGINS``.

    Args:
      replace: allow a name that is taken, as when a notebook cell runs again.

    Returns:
      The mechanism itself.

    Raises:
      ConfigError: it is no `Mechanism`, its name is no Python name or taken.
    """
    return MECHANISMS.register(mechanism, replace=replace)


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
    return parse_list("attention", text)


def resolve_mixer(text: str) -> MixerChoice:
    """``"sigmoid(train_len=256)"`` -> its mechanism, spec and window.

    ``"none"`` is a layer without a mixer, ``"conv(width=3)"`` one with a gated short convolution.

    Raises:
      ConfigError: unknown mechanism, unknown option, impossible value.
    """
    if text == "none":
        return MixerChoice(None)
    name, options = MECHANISMS.parse(text)
    if name == "conv":
        width = options.pop("width", 3)
        if options or not is_whole(width) or not 1 <= width <= MOST:
            raise ConfigError(f"{text}: conv takes width alone, a whole number of at least 1.")
        return MixerChoice(None, conv=width)
    mechanism = get(name)
    window = options.pop("window", None)
    if window is not None and (not is_whole(window) or not 1 <= window <= MOST):
        raise ConfigError(f"{shown(text)}: window is {shown(window)} but must be a whole number from 1 to {MOST}.")
    return MixerChoice(mechanism, mechanism.make_spec(**options), window)
