"""Name -> mechanism. One line a mechanism; modules load on first use.

Mechanisms kept outside the library call `register`; modules that do so are named in the environment variable
`JAXATTN_PLUGINS` ("my_module, other.module") for the command lines and the tests, which import them first.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import keyword
import os
from typing import Any

from jaxattn.calls import FORM, parse_call, parsed, quoted
from jaxattn.errors import ConfigError, UserError, shown, suggest
from jaxattn.mechanisms._protocol import MOST, Mechanism, is_whole

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


PLUGINS = "JAXATTN_PLUGINS"
RESERVED = ("none", "conv")  # what a layer may have instead of a mechanism
_added: dict[str, Mechanism] = {}
_loaded: list[str] = []  # plugins that were imported, or are being imported


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
    if not isinstance(mechanism, Mechanism):
        raise ConfigError(f"register takes a Mechanism but was given {shown(mechanism)}.")
    name = mechanism.name
    if not name.isidentifier() or keyword.iskeyword(name) or name in RESERVED:
        raise ConfigError(f"the mechanism's name {shown(name)} must be a Python name other than none and conv.")
    if (name in _PLACES or name in _added) and not replace:
        raise ConfigError(f"a mechanism named {name!r} exists: choose another name, or pass replace=True.")
    _added[name] = mechanism
    return mechanism


def unregister(name: str) -> None:
    """Forget what `register` added under this name; a mechanism of the library that it replaced is back."""
    _added.pop(name, None)


def _load_plugins() -> None:
    """Import what `JAXATTN_PLUGINS` names, once a process."""
    for plugin in filter(None, (entry.strip() for entry in os.environ.get(PLUGINS, "").split(","))):
        if plugin in _loaded:
            continue
        _loaded.append(plugin)
        try:
            importlib.import_module(plugin)
        except UserError:
            _loaded.remove(plugin)
            raise
        except Exception as error:  # whatever a user's module raises while it is imported
            _loaded.remove(plugin)
            raise ConfigError(
                f"the module {plugin!r} of {PLUGINS} cannot be imported ({type(error).__name__}: {error}); mend it, "
                "or correct the variable (its folder must be on PYTHONPATH or the current one)."
            ) from error


def names() -> list[str]:
    """Every registered mechanism, sorted.

    Raises:
      ConfigError: a module of `JAXATTN_PLUGINS` cannot be imported.
    """
    _load_plugins()
    return sorted({*_PLACES, *_added})


def get(name: str) -> Mechanism:
    """The mechanism called `name`.

    Raises:
      ConfigError: no such mechanism; the sentence lists near names.
    """
    if name not in _PLACES or os.environ.get(PLUGINS):
        _load_plugins()
    if name in _added:
        return _added[name]
    if name not in _PLACES:
        raise ConfigError(
            suggest("attention", name, names())
            + f" One that is kept outside the library: name its module in {PLUGINS}."
        )
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
    tree = parsed("attention", text, f"({text},)")
    if not isinstance(tree, ast.Tuple) or not tree.elts:
        raise ConfigError(f"attention {shown(text)} is not {FORM}.")
    return tuple(quoted(entry) for entry in tree.elts)


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
        if options or not is_whole(width) or not 1 <= width <= MOST:
            raise ConfigError(f"{text}: conv takes width alone, a whole number of at least 1.")
        return MixerChoice(None, conv=width)
    mechanism = get(name)
    window = options.pop("window", None)
    if window is not None and (not is_whole(window) or not 1 <= window <= MOST):
        raise ConfigError(f"{shown(text)}: window is {shown(window)} but must be a whole number from 1 to {MOST}.")
    return MixerChoice(mechanism, mechanism.make_spec(**options), window)
