"""Attention mechanisms: one paper, one file; see `_protocol` for what each offers.

names()      every registered name
get(name)    the `Mechanism`: .reference .forward .weights .init_params .init_state .step .flops
"""

from jaxattn.mechanisms._protocol import Capabilities, Mechanism, RowWeights, Surround
from jaxattn.mechanisms._registry import MixerChoice, get, names, parse_mixers, resolve_mixer

__all__ = [
    "Capabilities",
    "Mechanism",
    "MixerChoice",
    "RowWeights",
    "Surround",
    "get",
    "names",
    "parse_mixers",
    "resolve_mixer",
]
