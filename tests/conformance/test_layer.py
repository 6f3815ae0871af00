"""Every mechanism, and every setting of what it keeps around itself, through the whole model."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from evals.measure import make_measure
from jaxattn.mechanisms import Mechanism, get, names
from jaxattn.models import ModelConfig
from tests.conformance import model
from tests.conformance.cases import FULL, SHORT

BLOCK = 4  # default blocks of landmarks and segments of memories are longer than these sequences


def text_of(mechanism: Mechanism, spec: Any) -> str:
    """A setting as `--attn` takes it."""
    if mechanism.block(spec):
        spec = dataclasses.replace(spec, block=BLOCK)
    if getattr(spec, "form", "") == "mac":  # the first segment finds an empty memory
        spec = dataclasses.replace(spec, chunk=BLOCK, segment=BLOCK)
    changed = [f for f in dataclasses.fields(spec) if getattr(spec, f.name) != f.default]
    options = ", ".join(f"{f.name}={getattr(spec, f.name)!r}" for f in changed)
    return f"{mechanism.name}({options})" if options else mechanism.name


def settings(mechanism: Mechanism) -> list[tuple[str, ...]]:
    """Layers of models: the default in both, and where something lies around the mechanism what else it can be.

    Every setting of the mechanism, and of what is around it those with a value that no other has: a norm and the
    gate after it know nothing of each other.
    """
    out = [(text_of(mechanism, mechanism.spec()),)]
    if mechanism.surround is None and mechanism.gains is None:
        return out
    others = [mechanism.spec(), *mechanism.variants]
    for spec in mechanism.surround.variants if mechanism.surround else ():
        if any(getattr(spec, f.name) not in [getattr(o, f.name) for o in others] for f in dataclasses.fields(spec)):
            others.append(spec)
    texts = [text_of(mechanism, spec) for spec in others[1:]]
    return out + [tuple(texts[i : i + 2]) for i in range(0, len(texts), 2)]


def named(layers: tuple[str, ...]) -> str:
    return "+".join(layers)


# One layer each: the rest of them is another's, of which two layers are scanned.
ONCE = (*SHORT, "based", "k_bias", "relu", "sigmoid")
PAIRS = [ONCE[i : i + 2] for i in range(0, len(ONCE), 2)]
MODELS = {
    named(layers): layers
    for layers in [
        *PAIRS,
        *(layers for name in names() if name not in ONCE for layers in settings(get(name))),
        ("conv",),
    ]
}
every = pytest.mark.parametrize(
    "cfg", [pytest.param(model.config(mixers=m), id=n, marks=pytest.mark.xdist_group(n)) for n, m in MODELS.items()]
)


@every
@pytest.mark.parametrize("question", model.QUESTIONS, ids=lambda question: question.__name__)
def test_layers(cfg, question):
    question(cfg)


def idle(cfg: ModelConfig) -> tuple[str, ...]:
    """Parameters without a gradient, by design."""
    parts = []
    for layer in range(cfg.num_layers):
        spec = cfg.mixer(layer).spec
        if "aaren" in cfg.mixer_text(layer):
            parts.append("['q']")  # its query is learned; the layer's W_q stays unused
        if layer and getattr(spec, "lrpe", "") == "first":
            parts.append(f"['layer_{layer}']['attn']['mechanism']['theta']")  # LRPE acts in layer 0 alone
    return tuple(parts)


@every
def test_every_parameter_has_a_gradient(cfg):
    model.every_parameter_has_a_gradient(cfg, idle(cfg))


@pytest.mark.parametrize(
    "mixer", [pytest.param(text_of(c.mechanism, c.spec), marks=pytest.mark.xdist_group(str(c))) for c in FULL]
)
def test_the_sink_study_can_measure_them(mixer):
    """What training does every few steps: a mechanism that refuses a slice of rows cannot be trained."""
    cfg = model.config(mixers=(mixer,))
    found = make_measure(cfg)(model.params_of(cfg), model.batch()[0])
    assert all(np.all(np.isfinite(x)) for x in found.values())
