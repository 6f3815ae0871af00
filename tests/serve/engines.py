"""A tiny model for engines, and somebody who asks them."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp

from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from jaxattn.sampling import Sampling

GREEDY = Sampling()


def model_of(attn, **more):
    model = ModelConfig(vocab_size=41, num_layers=2, d_model=16, num_heads=2, mixers=(attn,), **more)
    params = Decoder(model).init(jax.random.key(1), jnp.zeros((1, 4), jnp.int32))["params"]
    # Larger logits than at the start, so that the best token is not a near tie.
    return model, jax.tree.map(lambda x: 3 * x if x.ndim == 2 else x, params)


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
