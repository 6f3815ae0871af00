"""A decoder of two layers whose heads are wired by hand: it copies what stood behind the last token before."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder

V, P = 24, 48  # tokens and positions
MODEL = ModelConfig(
    vocab_size=V,
    num_layers=2,
    d_model=2 * V + P + V,
    num_heads=4,
    key_dim=V + P,
    value_dim=V,
    mlps=("none",),
    position="learned",
    max_positions=P,
    norm_eps=1e-12,
)
TOKEN, PLACE, BEFORE, NEXT = slice(0, V), slice(V, V + P), slice(V + P, 2 * V + P), slice(2 * V + P, 3 * V + P)
PREVIOUS = (0, 0)  # layer and head: looks at the token before, and writes it to BEFORE
INDUCTION, ECHO, LOCAL, SINK = (1, 0), (1, 1), (1, 2), (1, 3)
SHARP = 8.0


@functools.cache
def params() -> dict:
    """Its parameters: an embedding is a token in TOKEN and a position in PLACE."""
    shapes = jax.eval_shape(Decoder(MODEL).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    p = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    p["embed"][:, TOKEN], p["positions"][:, PLACE] = np.eye(V), np.eye(P)
    p["final_norm"]["scale"][:] = 1.0
    p["unembed"][NEXT] = 20 * np.eye(V)

    def wire(layer, head, *, q, k, v=None, to=None):
        """q and k: ((from block, to slice of the key, matrix), ...)."""
        own = p[f"layer_{layer}"]["attn"]
        for name, entries in (("q", q), ("k", k)):
            view = own[name]["kernel"].reshape(-1, 4, V + P)
            for block, part, matrix in entries:
                view[block, head, part] += SHARP * matrix
        if v is not None:
            own["v"]["kernel"].reshape(-1, 4, V)[v, head] = np.eye(V)
            own["o"]["kernel"].reshape(4, V, -1)[head, :, to] = np.eye(V)

    for layer in range(2):
        p[f"layer_{layer}"]["attn_norm"]["scale"][:] = 1.0
    token, place, same, ahead = slice(0, V), slice(V, V + P), np.eye(P), np.eye(P, k=1)
    first = np.zeros((P, P), np.float32)
    wire(0, 0, q=[(PLACE, place, same)], k=[(PLACE, place, ahead)], v=TOKEN, to=BEFORE)
    wire(1, 0, q=[(TOKEN, token, np.eye(V))], k=[(BEFORE, token, np.eye(V))], v=TOKEN, to=NEXT)
    own = [(PLACE, place, -same)], [(PLACE, place, same)]  # not itself
    wire(1, 1, q=[(TOKEN, token, np.eye(V)), *own[0]], k=[(TOKEN, token, np.eye(V)), *own[1]])
    wire(1, 2, q=[(PLACE, place, same)], k=[(PLACE, place, same)])
    first[:, 0] = 1
    begins = np.zeros((P, P), np.float32)
    begins[0, 0] = 1
    wire(1, 3, q=[(PLACE, place, first)], k=[(PLACE, place, begins)])
    return jax.tree.map(jnp.asarray, p)
