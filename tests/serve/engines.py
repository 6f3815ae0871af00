"""A tiny model for engines, and somebody who asks them."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import pytest

from jaxattn.models import ModelConfig
from jaxattn.sampling import Sampling
from jaxattn.serving.engine import Engine
from tests.conformance.model import params_of

GREEDY = Sampling()


def model_of(attn, **more):
    shape = {"vocab_size": 41, "num_layers": 2, "d_model": 16, "num_heads": 2}
    model = ModelConfig(**(shape | more), mixers=(attn,))
    return model, jax.tree.map(jnp.asarray, params_of(model))


class Inbox:
    """Collects what the engine delivers."""

    def __init__(self):
        self.tokens, self.reason, self.done, self.first = [], None, threading.Event(), threading.Event()

    def __call__(self, tokens, reason):
        self.tokens += tokens
        self.first.set()
        if reason:
            self.reason = reason
            self.done.set()

    def wait(self):
        assert self.done.wait(60), "no end"
        return self.tokens


def ask(engine, ids, most, how=GREEDY, seed=0, stop=()):
    inbox = Inbox()
    inbox.ticket = engine.submit(ids, most, how, seed, stop, inbox)
    return inbox


@pytest.fixture(name="running")
def engines():
    """Start engines that are closed when the test ends."""
    open_ones = []

    def start(model, params, **more):
        engine = Engine(model, params, **({"slots": 3, "context": 64, "queue": 64, "block": 4} | more))
        engine.start()
        open_ones.append(engine)
        return engine

    yield start
    for engine in open_ones:
        engine.close()
