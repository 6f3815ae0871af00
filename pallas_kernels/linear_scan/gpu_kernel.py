"""The Hopper kernel of the scan, run in either direction of time: o, dq, dk and dv are four calls of it.

With chunks of 64 tokens, S the state before a chunk and rows a, b, c of it (q, k, v in the forward pass):

    o = read · a S + scale · (within ∘ a bᵀ) c,   S <- fade · S + bᵀ (write · c)

`within` is 2^(fade_t + boost_s) where s <= t are of one document; where time runs backwards, s >= t.

A block of threads has one head. Each of two computing warpgroups has half of the columns of c, of the state, which
stays in its registers in f32 from the first chunk to the last, and of the scores a bᵀ, which both need whole. A third
warpgroup does nothing but fetch chunks, several ahead, into a ring of buffers.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels.linear_scan.gpu_chunk import CHUNK, HALF, READ, WORKERS, WRITE, weighed

MARK = 8  # chunks from one saved state to the next
DEPTH = 4  # chunks under way, if there is room
CONSUMER, PRODUCER = 232, 40  # registers of a thread, where the compiler heeds it; 168 of each do too
SLACK = 2048  # bytes of shared memory for barriers and alignment


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known before the kernels are compiled.

    staged: sums are added outside of the tensor cores, as the simulator wants it.
    """

    scale: float
    decay: bool
    out: Any  # dtype of the outputs
    staged: bool
    interpret: Any


def scan(
    plan: Plan,
    a: Float[Array, "B T _ A"],
    b: Float[Array, "B T _ A"],
    c: Float[Array, "B T _ C"],
    start: Float[Array, "B H A C"],
    tokens: Float[Array, "B _ 6 T"],
    fade: Float[Array, "B _ N"],
    *,
    name: str,
    reverse: bool = False,
    dtype: Any = jnp.bfloat16,
    mark: bool = False,
) -> tuple[Array, Array, Array | None]:
    """o [B,T,H,C] in `dtype`, the last state and, with `mark`, the states [B,H,M,A,C] at every `MARK`-th chunk's start.

    Args:
      a, b, c: bfloat16; where these or the tokens have fewer heads, neighbouring heads share one.
      start: the state before the first chunk; before the last one if `reverse`, which begins there.
      tokens: per token FADE and BOOST: what a row's token sees of a column's token is 2^(FADE + BOOST);
        DOCUMENT and AGAIN: a number, twice; the weights READ and WRITE.
      fade: what is left of the state behind each chunk.
    """
    batch, length, _, rows = a.shape
    heads, columns = start.shape[1], c.shape[3]
    count = length // CHUNK
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    out = [jax.ShapeDtypeStruct((batch, length, heads, columns), dtype), f32(*start.shape)]
    if mark:
        out.append(f32(batch, heads, -(-count // MARK), rows, columns))
    groups = tuple(heads // n for n in (a.shape[2], b.shape[2], c.shape[2], tokens.shape[1]))
    o, last, *marks = mg.launch(
        mg.Launch(
            name,
            grid={"head": heads, "batch": batch},
            threads=WORKERS + 1,
            interpret=plan.interpret,
            cost=_cost(plan, batch * heads, length, rows, columns, (a, b, c, start, tokens, *out)),
        ),
        partial(_kernel, plan, reverse, mark, groups),
        out,
        _scratch(rows, columns, dtype),
        a,
        b,
        c,
        start,
        tokens,
        fade.reshape(-1),
    )
    return o, last, marks[0] if mark else None


def _scratch(rows: int, columns: int, dtype: Any) -> list[Any]:
    """Shared memory: as many chunks as fit, up to `DEPTH`."""
    narrow = partial(mg.operand, swizzle=2 * HALF)  # tiles of 32 columns, so that each worker can write half of 64
    half = columns // WORKERS
    small = dtype != jnp.float32
    chunk = CHUNK * (2 * rows + columns + CHUNK) * 2 + 6 * CHUNK * 4
    always = (rows + small * CHUNK) * columns * 2
    stages = min(DEPTH, (mg.SHARED_BYTES - SLACK - always) // chunk)
    return [
        narrow(stages, CHUNK, rows),
        narrow(stages, CHUNK, rows),
        narrow(stages, CHUNK, columns),
        mg.plain(stages, 6, CHUNK),
        narrow(stages, CHUNK, CHUNK),
        narrow(WORKERS, rows, half),
        mg.barriers(stages, 4),
        mg.barriers(stages, WORKERS),
        mg.barriers(stages, WORKERS),
        *([narrow(WORKERS, CHUNK, half)] if small else []),
    ]


def _kernel(
    plan: Plan, reverse: bool, mark: bool, groups: tuple[int, ...], a, b, c, start, tokens, fade, o, last, *rest
):
    marks, (a_s, b_s, c_s, tokens_s, scores_s, state_s, full, free, scored, *o_s) = rest[:mark], rest[mark:]
    batch, head, wg = (jax.lax.axis_index(name) for name in ("batch", "head", "wg"))
    count, stages, half = tokens.shape[3] // CHUNK, a_s.shape[0], state_s.shape[2]
    at_a, at_b, at_c, at_tokens = (jax.lax.div(head, jnp.int32(group)) for group in groups)
    chunk = lambda n: count - 1 - n if reverse else n
    tokens_of = lambda n: pl.ds(chunk(n) * CHUNK, CHUNK)
    turn = lambda n, of: jax.lax.rem(n, jnp.int32(of))
    following = lambda slot: jnp.where(slot == stages - 1, 0, slot + 1)

    @pl.when(wg == WORKERS)
    def produce():
        mg.registers(PRODUCER, more=False)

        def step(n: Any, slot: Any) -> Any:
            here = tokens_of(n)
            pl.when(n >= stages)(lambda: mg.wait(free.at[slot]))
            mg.fetch(a.at[batch, here, at_a], a_s.at[slot], full.at[slot])
            mg.fetch(b.at[batch, here, at_b], b_s.at[slot], full.at[slot])
            mg.fetch(c.at[batch, here, at_c], c_s.at[slot], full.at[slot])
            mg.fetch(tokens.at[batch, at_tokens, :, here], tokens_s.at[slot], full.at[slot])
            return following(slot)

        jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), step, jnp.int32(0))
        mg.drain(free, count)

    @pl.when(wg < WORKERS)
    def compute():
        mg.registers(CONSUMER, more=True)
        columns, own = pl.ds(wg * half, half), pl.ds(wg * HALF, HALF)

        def save(state: Array, n: Any) -> None:
            """States at the start of a chunk; reverse in time that is behind it."""
            where = marks[0].at[batch, head, jax.lax.div(n, jnp.int32(MARK)), :, columns]
            pl.when(turn(n, MARK) == 0)(lambda: mg.put(where, state))

        def step(n: Any, carry: tuple[Any, Array]) -> tuple[Any, Array]:
            slot, state = carry
            values, numbers = c_s.at[slot, :, columns], tokens_s.at[slot]
            kept = fade[(batch * tokens.shape[1] + at_tokens) * count + chunk(n)]
            weights = lambda which: mg.down(mg.load_rows(numbers.at[which]), half)
            if mark and not reverse:
                save(state, n)
            state_s[wg] = mg.laid(state.astype(state_s.dtype))
            mg.wait(full.at[slot])
            mg.publish()
            tile, seen = mg.products((a_s.at[slot], state_s.at[wg]), (a_s.at[slot], mg.turned(b_s.at[slot, own])))
            seen = weighed(seen, numbers, wg * HALF, scale=plan.scale, decay=plan.decay, reverse=reverse)
            scores_s[slot, :, own] = mg.laid(seen.astype(scores_s.dtype))
            mg.publish()  # also: all four warps have read the state
            mg.arrive(scored.at[slot])
            written = state_s.at[wg, pl.ds(0, CHUNK)]
            written[...] = mg.laid((mg.get(values).astype(jnp.float32) * weights(WRITE)).astype(state_s.dtype))
            tile, state = tile * weights(READ), state * kept
            mg.publish()  # also: what is loaded from the buffers is loaded, so copies may follow
            mg.wait(scored.at[slot])
            tile, state = mg.add_products(
                (tile, scores_s.at[slot], values), (state, mg.turned(b_s.at[slot]), written), staged=plan.staged
            )
            mg.arrive(free.at[slot])
            target = o.at[batch, tokens_of(n), head, columns]
            if o_s:
                mg.settle(read=True)  # the tile before is on its way
                o_s[0][wg] = mg.laid(tile.astype(o.dtype))
                mg.publish()
                mg.begin_store(o_s[0].at[wg], target)
            else:  # f32, for which there is no room: four threads write 32 bytes
                mg.put(target, tile)
                mg.publish()  # all four warps have read what was written
            if mark and reverse:
                save(state, chunk(n))
            return following(slot), state

        whole = lambda ref: ref.at[batch, head, :, columns]
        carry = jnp.int32(0), mg.get(whole(start))
        mg.put(whole(last), jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), step, carry)[1])
        mg.settle()


def _cost(plan: Plan, count: int, length: int, rows: int, columns: int, arrays: tuple[Any, ...]) -> pl.CostEstimate:
    return pl.CostEstimate(
        flops=2 * count * length * (CHUNK * (rows + columns) + 2 * rows * columns),
        transcendentals=count * length * CHUNK * plan.decay,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
    )
