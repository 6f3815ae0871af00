"""A decoder of two layers whose heads are wired by hand: it copies what stood behind the last token before."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder

PREVIOUS = (0, 0)  # layer and head: looks at the token before, and writes what it is
INDUCTION, ECHO, LOCAL, SINK = (1, 0), (1, 1), (1, 2), (1, 3)
SHARP = 8.0


def wired(tokens: int, places: int) -> ModelConfig:
    """Its configuration, for so many tokens and positions."""
    return ModelConfig(
        vocab_size=tokens,
        num_layers=2,
        d_model=3 * tokens + places,
        num_heads=4,
        key_dim=tokens + places,
        value_dim=tokens,
        mlps=("none",),
        position="learned",
        max_positions=places,
        norm_eps=1e-12,
    )


V = 24
MODEL = wired(V, 48)


@functools.cache
def params(model: ModelConfig = MODEL) -> dict:
    """Its parameters. The residual stream has four parts: the token, its position, the token before it, the next."""
    tokens, places = model.vocab_size, model.max_positions
    shapes = jax.eval_shape(Decoder(model).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    p = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    token, place = slice(0, tokens), slice(tokens, tokens + places)
    before, after = (slice(n * tokens + places, (n + 1) * tokens + places) for n in (1, 2))
    p["embed"][:, token], p["positions"][:, place] = np.eye(tokens), np.eye(places)
    p["final_norm"]["scale"][:] = 1.0
    p["unembed"][after] = 20 * np.eye(tokens)
    root = model.d_model**-0.5  # a normed stream has entries of about 1/root

    def wire(layer, head, q, k, value_to=None):
        """q and k: (from part, to part of the key, matrix) each."""
        own = p[f"layer_{layer}"]["attn"]
        for name, entries in (("q", q), ("k", k)):
            view = own[name]["kernel"].reshape(-1, 4, tokens + places)
            for part, to, matrix in entries:
                view[part, head, to] += SHARP * 12 * root * matrix
        if value_to is not None:
            own["v"]["kernel"].reshape(-1, 4, tokens)[token, head] = np.eye(tokens)
            own["o"]["kernel"].reshape(4, tokens, -1)[head, :, value_to] = np.eye(tokens)

    for layer in range(2):
        p[f"layer_{layer}"]["attn_norm"]["scale"][:] = 1.0
    same, one = np.eye(places), np.zeros((places, places), np.float32)
    one[0, 0] = 1
    all_to_first = np.zeros((places, places), np.float32)
    all_to_first[:, 0] = 1
    wire(*PREVIOUS, [(place, place, same)], [(place, place, np.eye(places, k=1))], before)
    wire(*INDUCTION, [(token, token, np.eye(tokens))], [(before, token, np.eye(tokens))], after)
    like = [(token, token, np.eye(tokens))]
    wire(*ECHO, [*like, (place, place, -same)], [*like, (place, place, same)])  # not itself
    wire(*LOCAL, [(place, place, same)], [(place, place, same)])
    wire(*SINK, [(place, place, all_to_first)], [(place, place, one)])
    return jax.tree.map(jnp.asarray, p)
