"""The backward Hopper kernel's shared memory, and what it recomputes there of a visit first: U and A."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels.neural_memory.gpu_kernel import Place
from pallas_kernels.neural_memory.gpu_plan import READ_M, READ_S, VISIT


class Shared:
    """Shared memory as one phase of a visit sees it.

    Every phase has its own 0 to count places from (see `Place.nought`), so that none is held from one to the next.
    """

    def __init__(self, at: Place, slot: Any, tiles: Any, operands: Any, phase: int):
        nought = at.nought(phase)
        self.q, self.k, self.v, self.dy, self.G, self.tokens = (x.at[slot + nought] for x in tiles)
        self.M, self.S, self.F, self.dM, self.dS, *small = (x.at[nought] for x in operands)
        self.U, self.W, self.dA, self.dP, self.read_M, self.read_S = small
        self.group = at.group.astype(jnp.float32)

    def number(self, which: int) -> Array:
        return mg.load_rows(self.tokens.at[which])

    def mine(self) -> Array:
        """Which tokens are of this visit."""
        return self.number(VISIT) == self.group

    def member(self, like: Array) -> Array:
        return mg.down(self.number(VISIT), like.shape[1]) == self.group

    def scaled(self, x: Array, which: int) -> Array:
        return x * mg.down(self.number(which), x.shape[1])


def errors(t: Shared) -> None:
    """U, and what the reads' gradients bring to M and S."""
    U = mg.product(t.k, t.F) - mg.get(t.v).astype(jnp.float32)
    t.U[...] = mg.laid(jnp.where(t.member(U), 2.0 * U, 0.0).astype(t.U.dtype))
    asked = jnp.where(t.member(U), mg.get(t.dy).astype(jnp.float32), 0.0)
    for ref, which in ((t.read_M, READ_M), (t.read_S, READ_S)):
        ref[...] = mg.laid(t.scaled(asked, which).astype(ref.dtype))


def scores(t: Shared) -> Array:
    """A, in bfloat16 as all that is kept."""
    A = mg.product(t.q, mg.turned(t.k))
    t.W[...] = mg.laid((A * mg.get(t.G).astype(jnp.float32)).astype(t.W.dtype))
    return A.astype(t.W.dtype)
