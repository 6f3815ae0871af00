"""Attention mechanisms: one paper, one file; see `_protocol` for what each offers.

names()              every registered name
get(name)            the `Mechanism`: .reference .forward .weights .init_params .init_state .step .core .flops
Call(spec, params)   what these functions are told besides tokens: ``forward(q, k, v, vis, Call(spec, params))``
register(mechanism)  one of your own, kept outside the library
score_family(...)    builds a `Mechanism` from its row equation: score -> activation -> normaliser -> values
recurrent_family(...) builds one of causal linear attention from its feature map and decay
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxattn.mechanisms._protocol import Call, Capabilities, Mechanism, RowWeights, Surround
from jaxattn.mechanisms._registry import (
    MixerChoice,
    get,
    names,
    parse_mixers,
    register,
    resolve_mixer,
    unregister,
)

if TYPE_CHECKING:
    from jaxattn.mechanisms._linear_family import recurrent_family
    from jaxattn.mechanisms._score_family import score_family

__all__ = [
    "Call",
    "Capabilities",
    "Mechanism",
    "MixerChoice",
    "RowWeights",
    "Surround",
    "get",
    "names",
    "parse_mixers",
    "recurrent_family",
    "register",
    "resolve_mixer",
    "score_family",
    "unregister",
]

_FAMILIES = {"score_family": "_score_family", "recurrent_family": "_linear_family"}  # they bring the kernels


def __getattr__(name: str) -> Any:
    if name in _FAMILIES:
        return getattr(importlib.import_module(f"jaxattn.mechanisms.{_FAMILIES[name]}"), name)
    raise AttributeError(f"module 'jaxattn.mechanisms' has no attribute {name!r}")
