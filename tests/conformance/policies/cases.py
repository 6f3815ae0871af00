"""The matrix: every registered policy x mechanisms whose weights sum to one, do not, or have constant slots.

One small model with grouped heads and one batch answer most questions. Rows: a text, the same behind padding on the
left, another text. The first `PROMPT` places are read as a prompt, the others one by one as an answer.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from jaxattn.errors import ConfigError
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from jaxattn.nn.stream import OTHER, TAGS, USER
from jaxattn.policies import Policy, get, names, text_of
from tests.conformance.model import params_of

MECHANISMS = ("softmax", "sigmoid", "k_bias")
PROMPT, LENGTH, LEFT, VOCAB = 24, 40, 4, 19
BASE = {
    "vocab_size": VOCAB,
    "num_layers": 4,
    "d_model": 24,
    "num_heads": 4,
    "num_kv_heads": 2,
    "key_dim": 8,
    "d_ff": 32,
    "mlps": ("gelu",),
}
# whose options name layers; others do the same in each
DEPTHS = {"tidal": 4, "zero_tuning": 3, "minference": 2, "mask_heads": 2}
TAGGED = np.where((np.arange(PROMPT) % 9 > 1) & (np.arange(PROMPT) % 9 < 7), USER, OTHER)  # turns of a chat
TRACES: collections.Counter[tuple[ModelConfig, str]] = collections.Counter()


@dataclasses.dataclass(frozen=True)
class Case:
    policy: Policy
    spec: Any
    mechanism: str

    def __str__(self) -> str:
        return f"{text_of(self.policy, self.spec)}-{self.mechanism}"

    @property
    def layers(self) -> int:
        return DEPTHS.get(self.policy.name, 2 if self.mechanism == "softmax" else 1)

    def config(self, spec: Any = None, **fields: Any) -> ModelConfig:
        """The model under this policy."""
        text = text_of(self.policy, self.spec if spec is None else spec)
        return ModelConfig(**(BASE | {"num_layers": self.layers, "mixers": (self.mechanism,), "policy": text} | fields))

    def unlimited(self) -> ModelConfig:
        return self.config(self.policy.unlimited(self.spec, LENGTH))


def small(policy: Policy) -> Any:
    """Options with a budget of few tokens."""
    return policy.variants[0] if policy.variants else policy.spec()


CASES = [Case(get(name), small(get(name)), mechanism) for name in names() for mechanism in MECHANISMS]
VARIANTS = [Case(get(name), spec, "softmax") for name in names() for spec in get(name).variants[1:]]


def grouped(cases: list[Case]) -> list[Any]:
    """Test parameters that keep a policy on one worker of pytest-xdist: two would compile its programs twice."""
    return [pytest.param(c, marks=pytest.mark.xdist_group(f"policy-{c.policy.name}"), id=str(c)) for c in cases]


@functools.cache
def texts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens, positions and segments [3, LENGTH]; see the module docstring."""
    rng = np.random.default_rng(5)
    text, other = rng.integers(0, VOCAB, (2, LENGTH)).astype(np.int32)
    moved = np.concatenate([np.zeros(LEFT, np.int32), text[: LENGTH - LEFT]])
    places = np.arange(LENGTH, dtype=np.int32)
    positions = np.stack([places, np.maximum(places - LEFT, 0), places])
    segments = np.ones((3, LENGTH), np.int32)
    segments[1, :LEFT] = 0
    return np.stack([text, moved, other]), positions, segments


def variables_of(cfg: ModelConfig, params: Any, rows: int) -> Any:
    """Parameters, and what the tokens of the prompt are where a policy asks."""
    tags = {TAGS: {"prompt": np.broadcast_to(TAGGED, (rows, PROMPT))}} if cfg.keeping.tagged else {}
    return {"params": params} | tags


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def start(cfg: ModelConfig, rows: int, room: int, params: Any) -> Any:
    """States before the first token."""
    return Decoder(cfg).apply({"params": params}, rows, room, method="start")


@functools.partial(jax.jit, static_argnums=(0, 1))
def begin(cfg: ModelConfig, room: int, params: Any, tokens: Any, positions: Any, segments: Any) -> Any:
    """The first piece of a prompt, in states of its program."""
    variables = variables_of(cfg, params, len(tokens))
    states = Decoder(cfg).apply(variables, len(tokens), room, method="start")
    return Decoder(cfg).apply(variables, states, tokens, positions, segments, "prompt", method="step")


@functools.partial(jax.jit, static_argnums=(0, 1))
def step(cfg: ModelConfig, phase: str, params: Any, states: Any, tokens: Any, positions: Any, segments: Any) -> Any:
    TRACES[cfg, phase] += 1
    variables = variables_of(cfg, params, len(tokens))
    return Decoder(cfg).apply(variables, states, tokens, positions, segments, phase, method="step")


def decode(
    cfg: ModelConfig, inputs: Any = None, pieces: tuple[int, ...] = (PROMPT,), room: int = LENGTH
) -> tuple[np.ndarray, Any]:
    """Logits [B, T, N] of rows read in `pieces` of a prompt and then one by one, and the states behind them."""
    inputs = texts() if inputs is None else inputs
    params, at = params_of(cfg), pieces[0]
    logits, states = begin(cfg, room, params, *(x[:, :at] for x in inputs))
    out = [np.asarray(logits)]
    for phase, size in [("prompt", n) for n in pieces[1:]] + [("answer", 1)] * (inputs[0].shape[1] - sum(pieces)):
        logits, states = step(cfg, phase, params, states, *(x[:, at : at + size] for x in inputs))
        out.append(np.asarray(logits))
        at += size
    return np.concatenate(out, axis=1), states


@functools.cache
def answers(cfg: ModelConfig) -> np.ndarray:
    """`decode` of the batch in one piece."""
    return decode(cfg)[0]


@functools.cache
def dense(mechanism: str, layers: int, **fields: Any) -> np.ndarray:
    """Logits of the same batch by the model's forward pass."""
    cfg = ModelConfig(**(BASE | {"num_layers": layers, "mixers": (mechanism,)} | fields))
    run = jax.jit(lambda params, *x: Decoder(cfg).apply({"params": params}, *x))
    return np.asarray(run(params_of(cfg), *texts()))


def refused(case: Case, **fields: Any) -> str:
    """The sentence that refuses this model, "" where it is none."""
    try:
        case.config(**fields)
    except ConfigError as error:
        return str(error)
    return ""
