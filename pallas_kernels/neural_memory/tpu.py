"""The TPU kernel: a head's memory stays in VMEM while its tokens pass, for memories of any depth that fits there.

Grid (batch, head, block of tiles), the last one in order. What happens in a tile is in `tpu_tile`, and a tile's up to
three groups of tokens (see `xla`) follow one another; groups that nobody is in are skipped. For the backward pass, in
`tpu_backward`, one state a block is kept.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from jaxattn.masks import PADDING
from pallas_kernels._dispatch import interpret_for
from pallas_kernels.flash.tiles import div, rem
from pallas_kernels.neural_memory.reference import MemoryState, Weights
from pallas_kernels.neural_memory.tpu_backward import ORDER, backward, of_last
from pallas_kernels.neural_memory.tpu_plan import (
    BLOCK,
    KINDS,
    TILE,
    VMEM,
    Plan,
    cut,
    empty,
    fits,
    layout,
    numbers,
    places,
    uncut,
    vmem,
    widen,
)
from pallas_kernels.neural_memory.tpu_tile import Layer, Tokens, enter, step
from pallas_kernels.neural_memory.xla import GROUPS

DTYPES = (jnp.float32, jnp.bfloat16)


def unfit(
    arrays: dict[str, Array], start: Weights, state: MemoryState | None, *, chunk: int, tangents: bool
) -> str | None:
    """Why this backend cannot serve a call, or None.

    Args:
      arrays: the caller's inputs by name, q among them.
    """
    if tangents:
        return "backend 'tpu' has no forward-mode derivatives but tangents is True: use 'xla', or tangents=False."
    named = {
        "start": start,
        **({} if state is None else {f"state.{n}": getattr(state, n) for n in ("M", "S", "frozen")}),
    }
    layers = [(f"{name}[{i}]", w) for name, matrices in named.items() for i, w in enumerate(matrices)]
    for name, x in (*arrays.items(), *layers):
        if x.dtype not in DTYPES:
            return f"backend 'tpu' takes float32 and bfloat16 but {name} is {x.dtype}: cast it or use 'xla'."
    plan = layout(start, arrays["q"].shape[1], chunk=chunk)
    if not fits(plan):
        need = vmem(plan.widths, plan.rows, plan.tiles)
        return (
            f"backend 'tpu' keeps a head's memory in VMEM but start has layers {[w.shape[1:] for w in start]}, for "
            f"which the backward pass needs {need >> 20} MiB of the {VMEM >> 20} it may use: make them narrower or use "
            "'xla'."
        )
    return None


@partial(jax.jit, static_argnames=("chunk", "read_after_write", "tangents", "tile", "block"))
def neural_memory_tpu(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H V"],
    eta: Float[Array, "B T H"],
    theta: Float[Array, "B T H"],
    alpha: Float[Array, "B T H"],
    start: Weights,
    state: MemoryState,
    segments: Int[Array, "B T"],
    *,
    chunk: int,
    read_after_write: bool,
    tangents: bool = False,
    tile: int = TILE,
    block: int = BLOCK,
) -> tuple[Float[Array, "B T H V"], MemoryState]:
    """See `pallas_kernels.neural_memory.neural_memory`. Keeps its inputs and one state a block.

    Args:
      tile, block: tokens at once, and between two kept states; at most.

    Raises:
      NotImplementedError: see `unfit`, or the process computes on another platform.
    """
    inputs = {"q": q, "k": k, "v": v, "eta": eta, "theta": theta, "alpha": alpha}
    if reason := unfit(inputs, start, state, chunk=chunk, tangents=tangents):
        raise NotImplementedError(f"neural_memory: {reason}")
    length, interpret = q.shape[1], interpret_for("neural_memory", "tpu")
    options = {"read_after_write": read_after_write, "interpret": interpret, "tile": tile, "block": block}
    plan = layout(start, length, chunk=chunk, **options)
    last, marks, count, segment = places(segments, state.segment, state.count, plan, chunk)
    live = segments != PADDING

    def tokens(x: Array, width: int) -> Array:
        """[B, T, H, d] to [B, H, N, n, width]; zeroed padding neither reads nor writes, even where it holds nan."""
        x = cut(jnp.where(live[..., None, None], x, 0.0), plan)
        return widen(jnp.moveaxis(x, 3, 1), {4: width})

    rate = lambda x, still: jnp.where(live[..., None], x, still)
    rates = jnp.stack([rate(eta, 1.0), rate(theta, 0.0), rate(alpha, 0.0)], axis=3)
    rates = jnp.moveaxis(cut(rates, plan), (3, 4), (1, 3))  # [B, H, N, 3, n]
    widths = plan.widths
    memory = tuple(
        widen(jnp.stack(kinds, axis=2).astype(jnp.float32), {3: i, 4: o})  # [B, H, 3, i, o]
        for (i, o), *kinds in zip(plan.layers, state.M, state.S, state.frozen, strict=True)
    )
    first = tuple(widen(w, {1: i, 2: o}) for (i, o), w in zip(plan.layers, start, strict=True))
    y, memory = _run(
        plan, last, marks, rates, tokens(q, widths[0]), tokens(k, widths[0]), tokens(v, widths[-1]), first, memory
    )
    narrow = lambda kind: tuple(m[:, :, kind, : w.shape[1], : w.shape[2]] for m, w in zip(memory, start, strict=True))
    y = uncut(jnp.moveaxis(y, 1, 3), plan, length)[..., : v.shape[3]]
    return y, MemoryState(*(narrow(kind) for kind in range(KINDS)), count=count, segment=segment)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(
    plan: Plan,
    last: Array,
    marks: Array,
    rates: Array,
    q: Array,
    k: Array,
    v: Array,
    start: tuple[Array, ...],
    memory: tuple[Array, ...],
) -> tuple[Array, tuple[Array, ...]]:
    """Reads [B, H, N, n, V] and the last memory, layers of [B, H, 3, i, o]; everything in whole tiles."""
    y, after, _ = _forward(plan, last, marks, rates, q, k, v, start, memory, keep=False)
    return y, after


def _forward(
    plan: Plan, last, marks, rates, q, k, v, start, memory, *, keep: bool
) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    batch, heads, count = q.shape[:3]
    blocks, layers = count // plan.tiles, plan.layers
    per_head = lambda *shape: pl.BlockSpec((None, None, *shape), lambda b, h, i: (b, h, *[0] * len(shape)))
    of_tokens = lambda rows, d: pl.BlockSpec((None, None, plan.tiles, rows, d), lambda b, h, i: (b, h, i, 0, 0))
    state = [per_head(KINDS, *layer) for layer in layers]
    kept = [empty((batch, heads, blocks, KINDS, *layer)) for layer in layers] if keep else []
    out_shape = [empty((*q.shape[:4], v.shape[4])), *(empty(x.shape) for x in memory), *kept]
    arrays = (marks, rates, q, k, v, *start, *memory)
    out = pl.pallas_call(
        partial(_kernel, plan),
        grid=(batch, heads, blocks),
        in_specs=[
            of_last(plan, lambda i: i),
            pl.BlockSpec((None, plan.tiles, 3, plan.rows), lambda b, h, i: (b, i, 0, 0)),
            of_tokens(3, plan.rows),
            of_tokens(plan.rows, plan.widths[0]),
            of_tokens(plan.rows, plan.widths[0]),
            of_tokens(plan.rows, plan.widths[-1]),
            *(pl.BlockSpec((None, *layer), lambda b, h, i: (h, 0, 0)) for layer in layers),
            *state,
        ],
        out_specs=[
            of_tokens(plan.rows, plan.widths[-1]),
            *state,
            *(pl.BlockSpec((None, None, None, *x.shape[3:]), lambda b, h, i: (b, h, i, 0, 0, 0)) for x in kept),
        ],
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=ORDER, vmem_limit_bytes=plan.vmem_limit),
        cost_estimate=plan.cost(
            q.shape,
            gradient=False,
            once=numbers(rates, q, k, v, *memory, *out_shape),
            per_row=numbers(*start),
            per_head=numbers(last, marks),
        ),
        interpret=plan.interpret,
        name="neural_memory_forward",
    )(last, *arrays)
    depth = len(layers)
    return out[0], tuple(out[1 : 1 + depth]), tuple(out[1 + depth :])


def _kernel(plan: Plan, last, marks, rates, q, k, v, *refs) -> None:
    depth = len(plan.layers)
    start, before, y, memory = refs[:depth], refs[depth : 2 * depth], refs[2 * depth], refs[2 * depth + 1 :]
    memory, kept = memory[:depth], memory[depth:]

    @pl.when(pl.program_id(2) == 0)
    def begin():
        for ref, x in zip(memory, before, strict=True):
            ref[...] = x[...]

    for ref, x in zip(kept, memory, strict=False):  # none, where no gradient is asked for
        ref[...] = x[...]
    y[...] = jnp.zeros_like(y)

    def visit(number: Any, _: None) -> None:
        tile, group, end = div(number, GROUPS), rem(number, GROUPS), last[0, number]

        @pl.when(end >= 0)
        def run():
            found = tuple(enter(group, Layer(m[0], m[1], m[2]), w[...]) for m, w in zip(memory, start, strict=True))
            tokens = Tokens(q[tile], k[tile], v[tile], rates[tile])
            after, answers = step(found, tokens, marks[tile], group, end, plan.read_after_write)
            y[tile] += answers
            for ref, layer, (M, S) in zip(memory, found, after, strict=True):
                ref[0], ref[1], ref[2] = M, S, layer.frozen

    jax.lax.fori_loop(jnp.int32(0), jnp.int32(GROUPS * plan.tiles), visit, None)


def _save(plan: Plan, last, marks, rates, q, k, v, start, memory) -> tuple[Any, Any]:
    y, after, kept = _forward(plan, last, marks, rates, q, k, v, start, memory, keep=True)
    return (y, after), (last, marks, rates, q, k, v, start, kept)


def _backward(plan: Plan, saved: Any, out: Any) -> tuple[Any, ...]:
    return None, None, *backward(plan, saved, *out)


_run.defvjp(_save, _backward)
