"""The backward kernel for TPUs: blocks from the last to the first, the gradient of the memory stays in VMEM.

A block starts from the state the forward pass kept and recomputes one state a tile, then goes back through tiles and
groups, each time differentiating `tpu_tile.step` as it is.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.neural_memory.tpu_plan import KINDS, Plan, empty, numbers
from pallas_kernels.neural_memory.tpu_tile import RENEW, RESTART, Layer, Tokens, enter, step
from pallas_kernels.neural_memory.xla import GROUPS

ORDER: Any = ("parallel", "parallel", "arbitrary")


def of_last(plan: Plan, block: Any) -> pl.BlockSpec:
    """A block's table of last tokens, scalars."""
    shape = (None, None, 1, GROUPS * plan.tiles)
    return pl.BlockSpec(shape, lambda b, h, i: (b, block(i), 0, 0), memory_space=pltpu.SMEM)


def backward(plan: Plan, saved: Any, dy: Array, d_memory: tuple[Array, ...]) -> tuple[Any, ...]:
    """Gradients of rates, q, k, v, M_0 and the first memory, from what the forward pass kept."""
    last, marks, rates, q, k, v, start, kept = saved
    batch, heads, count = q.shape[:3]
    blocks, layers, depth = count // plan.tiles, plan.layers, len(plan.layers)
    back = lambda i: blocks - 1 - i
    per_head = lambda *shape: pl.BlockSpec((None, None, *shape), lambda b, h, i: (b, h, *[0] * len(shape)))
    of_tokens = lambda rows, d: pl.BlockSpec((None, None, plan.tiles, rows, d), lambda b, h, i: (b, h, back(i), 0, 0))
    state = [per_head(KINDS, *layer) for layer in layers]
    tokens = [
        of_tokens(3, plan.rows),
        of_tokens(plan.rows, plan.widths[0]),
        of_tokens(plan.rows, plan.widths[0]),
        of_tokens(plan.rows, plan.widths[-1]),
    ]
    d_start = [empty((batch, heads, *layer)) for layer in layers]
    out_shape = [*(empty(x.shape) for x in (rates, q, k, v)), *d_start, *(empty(x.shape) for x in d_memory)]
    arrays = (marks, rates, q, k, v, dy, *start, *kept, *d_memory)
    out = pl.pallas_call(
        partial(_kernel, plan),
        grid=(batch, heads, blocks),
        in_specs=[
            of_last(plan, back),
            pl.BlockSpec((None, plan.tiles, 3, plan.rows), lambda b, h, i: (b, back(i), 0, 0)),
            *tokens,
            of_tokens(plan.rows, plan.widths[-1]),
            *(pl.BlockSpec((None, *layer), lambda b, h, i: (h, 0, 0)) for layer in layers),
            *(pl.BlockSpec((None, None, None, *x.shape[3:]), lambda b, h, i: (b, h, back(i), 0, 0, 0)) for x in kept),
            *state,
        ],
        out_specs=[*tokens, *(per_head(*layer) for layer in layers), *state],
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((plan.tiles + GROUPS - 1, KINDS, *layer), jnp.float32) for layer in layers],
        compiler_params=pltpu.CompilerParams(dimension_semantics=ORDER, vmem_limit_bytes=plan.vmem_limit),
        cost_estimate=plan.cost(
            q.shape,
            gradient=True,
            once=numbers(rates, q, k, v, dy, *kept, *d_memory, *out_shape),
            per_row=numbers(*start),
            per_head=numbers(last, marks),
        ),
        interpret=plan.interpret,
        name="neural_memory_backward",
    )(last, *arrays)
    d_start = tuple(jnp.sum(x, axis=0) for x in out[4 : 4 + depth])
    return *out[:4], d_start, tuple(out[4 + depth :])


def _kernel(plan: Plan, last, marks, rates, q, k, v, dy, *refs) -> None:
    depth = len(plan.layers)
    start, kept, d_after = (refs[n * depth : (n + 1) * depth] for n in range(3))
    d_rates, dq, dk, dv = refs[3 * depth : 3 * depth + 4]
    d_start, d_memory, states = (refs[n * depth + 4 : (n + 1) * depth + 4] for n in range(3, 6))
    integer = jnp.int32

    @pl.when(pl.program_id(2) == 0)
    def begin():
        for ref, x in zip(d_memory, d_after, strict=True):
            ref[...] = x[...]
        for ref in d_start:
            ref[...] = jnp.zeros_like(ref)

    for ref in (d_rates, dq, dk, dv):
        ref[...] = jnp.zeros_like(ref)
    for ref, x in zip(states, kept, strict=True):
        ref[0] = x[...]

    def tokens(tile: Any) -> Tokens:
        return Tokens(q[tile], k[tile], v[tile], rates[tile])

    def found(slot: Any, group: Any) -> tuple[Layer, ...]:
        """The memory in a slot as a group enters it."""
        layers = (Layer(s[slot, 0], s[slot, 1], s[slot, 2]) for s in states)
        return tuple(enter(group, layer, w[...]) for layer, w in zip(layers, start, strict=True))

    def copy(source: Any, target: Any) -> None:
        for s in states:
            s[target] = s[source]

    def forward(tile: Any, group: Any, slot: Any) -> None:
        """The state in a slot moves past a group."""
        end = last[0, GROUPS * tile + group]

        @pl.when(end >= 0)
        def run():
            memory = found(slot, group)
            after, _ = step(memory, tokens(tile), marks[tile], group, end, plan.read_after_write, reads=False)
            for s, layer, (M, S) in zip(states, memory, after, strict=True):
                s[slot, 0], s[slot, 1], s[slot, 2] = M, S, layer.frozen

    def backward(tile: Any, group: Any, slot: Any) -> None:
        """The gradient of the memory moves back past a group, whose entry state is in a slot."""
        end = last[0, GROUPS * tile + group]

        @pl.when(end >= 0)
        def run():
            memory, place = found(slot, group), marks[tile]
            f = lambda memory, x: step(memory, x, place, group, end, plan.read_after_write)
            _, pull = jax.vjp(f, memory, tokens(tile))
            d_entered, d_tokens = pull((tuple((d[0], d[1]) for d in d_memory), dy[tile]))
            for ref, d in zip((dq, dk, dv, d_rates), d_tokens, strict=True):
                ref[tile] += d
            for ref, first, d in zip(d_memory, d_start, d_entered, strict=True):
                d_frozen = ref[2] + d.frozen  # what comes after reads it too
                d_M = d.M + jnp.where(group >= RENEW, d_frozen, 0.0)
                first[...] += jnp.where(group >= RESTART, d_M, 0.0)
                ref[0] = jnp.where(group >= RESTART, 0.0, d_M)
                ref[1] = jnp.where(group >= RESTART, 0.0, d.S)
                ref[2] = jnp.where(group >= RENEW, 0.0, d_frozen)

    def fill(tile: Any, _: None) -> None:
        copy(tile, tile + 1)
        jax.lax.fori_loop(integer(0), integer(GROUPS), lambda group, _: forward(tile, group, tile + 1), None)

    def go_back(number: Any, _: None) -> None:
        tile = plan.tiles - 1 - number
        slot = lambda group: jnp.where(group == 0, tile, plan.tiles + group - 1)
        later = lambda group: (last[0, GROUPS * tile + 2] >= 0) | ((last[0, GROUPS * tile + 1] >= 0) & (group == 0))

        def inside(group: Any, _: None) -> None:
            @pl.when(later(group))
            def run():
                copy(slot(group), slot(group + 1))
                forward(tile, group, slot(group + 1))

        jax.lax.fori_loop(integer(0), integer(GROUPS - 1), inside, None)
        each = lambda number, _: backward(tile, GROUPS - 1 - number, slot(GROUPS - 1 - number))
        jax.lax.fori_loop(integer(0), integer(GROUPS), each, None)

    jax.lax.fori_loop(integer(0), integer(plan.tiles - 1), fill, None)
    jax.lax.fori_loop(integer(0), integer(plan.tiles), go_back, None)
