"""The Hopper kernel of the scan, run in either direction of time: o, dq, dk and dv are four calls of it.

With chunks of 64 tokens, S the state before a chunk and rows a, b, c of it (q, k, v in the forward pass):

    o = read · a S + scale · (within ∘ a bᵀ) c,   S <- fade · S + bᵀ (write · c)

`within` is 2^(fade_t + boost_s) where s <= t are of one document; where time runs backwards, s >= t.
One warpgroup has 64 columns of c and of the state, which stays in its registers in f32 from the first chunk to the
last; the next chunks are fetched while one is computed.
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

CHUNK = 64  # tokens; the rows of a product
COLUMNS = 64  # of the state and of the output in one block of threads
STAGES = 2  # chunks under way
MARK = 8  # chunks from one saved state to the next
# What there is for every token, beside a, b and c. What rows and columns of a tile both need is there twice: loads
# of one number for both would be merged by the compiler, which then finds no layout that suits both.
FADE, BOOST, DOCUMENT, AGAIN, READ, WRITE = range(6)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known before the kernels are compiled.

    staged: products read their left operand from shared memory, as the simulator wants it.
    """

    scale: float
    decay: bool
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
    out_stage = [] if dtype == jnp.float32 else [mg.operand(CHUNK, COLUMNS, dtype=dtype)]
    staging = [mg.operand(CHUNK, CHUNK)] if plan.staged else []
    o, last, *marks = mg.launch(
        mg.Launch(
            name,
            grid={"column": columns // COLUMNS, "head": heads, "batch": batch},
            interpret=plan.interpret,
            cost=_cost(plan, batch * heads, length, rows, columns, (a, b, c, start, tokens, *out)),
        ),
        partial(_kernel, plan, reverse, mark, [heads // x.shape[2] for x in (a, b, c)] + [heads // tokens.shape[1]]),
        out,
        [
            mg.operand(STAGES, CHUNK, rows),
            mg.operand(STAGES, CHUNK, rows),
            mg.operand(STAGES, CHUNK, COLUMNS),
            mg.plain(STAGES, 6, CHUNK),
            mg.operand(rows, COLUMNS),
            mg.barriers(STAGES, 4),
            *out_stage,
            *staging,
        ],
        a,
        b,
        c,
        start,
        tokens,
        fade.reshape(-1),
    )
    return o, last, marks[0] if mark else None


def _kernel(plan: Plan, reverse: bool, mark: bool, groups: list[int], a, b, c, start, tokens, fade, o, last, *rest):
    marks, rest = rest[:mark], rest[mark:]
    a_s, b_s, c_s, tokens_s, state_s, full, *rest = rest
    o_s, stage = (None, rest) if o.dtype == jnp.float32 else (rest[0], rest[1:])
    batch, head, block = (jax.lax.axis_index(name) for name in ("batch", "head", "column"))
    count = tokens.shape[3] // CHUNK
    at = [jax.lax.div(head, jnp.int32(group)) for group in groups]
    columns = pl.ds(block * COLUMNS, COLUMNS)
    chunk = lambda n: count - 1 - n if reverse else n

    def fetch(n: Any, slot: Any) -> None:
        here = pl.ds(chunk(n) * CHUNK, CHUNK)
        mg.fetch(a.at[batch, here, at[0]], a_s.at[slot], full.at[slot])
        mg.fetch(b.at[batch, here, at[1]], b_s.at[slot], full.at[slot])
        mg.fetch(c.at[batch, here, at[2], columns], c_s.at[slot], full.at[slot])
        mg.fetch(tokens.at[batch, at[3], :, here], tokens_s.at[slot], full.at[slot])

    for n in range(min(STAGES, count)):
        fetch(n, n)

    def save(state: Array, n: Any) -> None:
        """States at the start of a chunk; reverse in time that is behind it."""
        due = jax.lax.rem(n, jnp.int32(MARK)) == 0
        where = marks[0].at[batch, head, jax.lax.div(n, jnp.int32(MARK)), :, columns]
        pl.when(due)(lambda: _put(where, state))

    def step(n: Any, state: Array) -> Array:
        slot = jax.lax.rem(n, jnp.int32(STAGES))
        kept = fade[(batch * tokens.shape[1] + at[3]) * count + chunk(n)]
        if mark and not reverse:
            save(state, n)
        mg.wait(full.at[slot])
        state_s[...] = _laid(state.astype(state_s.dtype))
        mg.publish()
        scores = mg.product(a_s.at[slot], mg.turned(b_s.at[slot]))
        inside = (scores * plan.scale * _within(plan, tokens_s.at[slot], reverse)).astype(c_s.dtype)
        tile = mg.product(a_s.at[slot], state_s) * mg.down(mg.load_rows(tokens_s.at[slot, READ]), COLUMNS)
        tile = mg.add_product(tile, inside, c_s.at[slot], *stage)
        written = _get(c_s.at[slot]).astype(jnp.float32) * mg.down(mg.load_rows(tokens_s.at[slot, WRITE]), COLUMNS)
        mg.plgpu().wait_smem_to_gmem(0, wait_read_only=True)  # o_s is free, and everyone has read c_s
        c_s[slot] = _laid(written.astype(c_s.dtype))
        target = o.at[batch, pl.ds(chunk(n) * CHUNK, CHUNK), head, columns]
        if o_s is None:  # f32 from registers: four threads write 32 bytes, and two blocks fit on a multiprocessor
            _put(target, tile)
        else:
            o_s[...] = _laid(tile.astype(o_s.dtype))
        mg.publish()
        if o_s is not None:
            mg.plgpu().copy_smem_to_gmem(o_s, target)
        state = _accumulate(plan, state * kept, mg.turned(b_s.at[slot]), c_s.at[slot])
        if mark and reverse:
            save(state, chunk(n))
        mg.publish()  # everyone has read what is overwritten now
        pl.when(n + STAGES < count)(lambda: fetch(n + STAGES, slot))
        return state

    whole = lambda ref: ref.at[batch, head, :, columns]
    state = jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), step, _get(whole(start)))
    _put(whole(last), state)
    mg.plgpu().wait_smem_to_gmem(0)


def _within(plan: Plan, tokens: Any, reverse: bool) -> Array:
    """[64, 64]: how much of a column's token a row's token still sees."""
    api = mg.plgpu()
    row, column = (api.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=api.Layout.WGMMA) for axis in (0, 1))
    of_row = lambda n: mg.down(mg.load_rows(tokens.at[n]), CHUNK)
    of_column = lambda n: mg.across(mg.load_columns(tokens.at[n]), CHUNK)
    see = column >= row if reverse else column <= row
    see &= of_row(DOCUMENT) == of_column(AGAIN)
    if not plan.decay:
        return jnp.where(see, 1.0, 0.0)
    return jnp.where(see, jnp.exp2(of_row(FADE) + of_column(BOOST)), 0.0)


def _accumulate(plan: Plan, acc: Array, a: Any, b: Any) -> Array:
    """acc + a @ b, in place where that can be: the simulator has no sums that outlive a product."""
    if plan.staged:
        return acc + mg.product(a, b)
    api = mg.plgpu()
    return pl.run_state(lambda ref: api.wgmma(ref, a, b))(api.ACC.init(acc))


def _laid(value: Array) -> Array:
    """Says where a tile lies; the compiler would search for long."""
    return mg.plgpu().layout_cast(value, mg.plgpu().Layout.WGMMA)


def _get(ref: Any) -> Array:
    """A tile from memory into the registers of a product's result."""
    return mg.plgpu().load(ref, layout=mg.plgpu().Layout.WGMMA, optimized=False)


def _put(ref: Any, value: Array) -> None:
    """A tile from registers to device memory."""
    mg.plgpu().store(ref, _laid(value), optimized=False)


def _cost(plan: Plan, count: int, length: int, rows: int, columns: int, arrays: tuple[Any, ...]) -> pl.CostEstimate:
    """Scores are computed again for every 64 columns."""
    per_token = CHUNK * rows * (columns // COLUMNS) + CHUNK * columns + 2 * rows * columns
    powers = CHUNK * (columns // COLUMNS) if plan.decay else 0
    return pl.CostEstimate(
        flops=2 * count * length * per_token,
        transcendentals=count * length * powers,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
    )
