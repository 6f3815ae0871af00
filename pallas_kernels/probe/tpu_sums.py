"""Pass 2 on a TPU: the weights of a tile, of which only sums leave the chip."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jaxattn.masks import GLOBAL, Visibility
from pallas_kernels.flash.tiles import LANES, SEGMENT, Spans, div, rem
from pallas_kernels.probe.tiles import Plan, cost, inputs_of, scores


def sums(
    plan: Plan,
    q: Array,
    k: Array,
    vis: Visibility,
    key_bias: Array | None,
    top: Array,
    share: Array,
    base: Array,
) -> dict[str, Array]:
    """Sums of the weights, each in the layout it has on chip."""
    batch, heads, rows, _ = q.shape
    keys, block_k = k.shape[2], plan.block_k
    scalars, inputs, specs = inputs_of(plan, q, k, vis, key_bias)
    lines = -(-(keys + 2 * block_k + LANES) // LANES)
    whole = lambda b, h, j, *_: (b, h, 0, 0)
    outs = {  # shape, block and its place
        "columns": ((1, keys), (1, block_k), lambda b, h, j, *_: (b, h, 0, j)),
        "blocks": ((keys // plan.block, rows), (block_k // plan.block, rows), lambda b, h, j, *_: (b, h, j, 0)),
        "block_max": ((keys // plan.block, rows), (block_k // plan.block, rows), lambda b, h, j, *_: (b, h, j, 0)),
        "diagonals": ((lines, LANES), (lines, LANES), whole),
    }
    names = [name for name in outs if name in plan.want]
    shapes = [jax.ShapeDtypeStruct((batch, heads, *outs[name][0]), jnp.float32) for name in names]
    results = pl.pallas_call(
        partial(_kernel, plan, names),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads, keys // block_k),
            in_specs=[*specs, *[pl.BlockSpec((None, None, rows, LANES), whole)] * 2],
            out_specs=[pl.BlockSpec((None, None, *outs[name][1]), outs[name][2]) for name in names],
            scratch_shapes=[pltpu.VMEM((rows, block_k // LANES, LANES), jnp.float32)],
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=cost(q, k, plan.group, [q, top, share, *shapes, *inputs[4:]], more=len(names)),
        interpret=plan.interpret,
        name="probe_sums",
    )(*scalars, base, *inputs, top, share)
    return dict(zip(names, results, strict=True))


def _kernel(plan: Plan, names: list[str], table, prefix, base, q, k, q_at, k_at, *refs):
    key_bias, refs = (refs[0], refs[1:]) if plan.sharing else (None, refs)
    top, share, *refs, runs = refs
    outs = dict(zip(names, refs, strict=True))
    b, j = pl.program_id(0), pl.program_id(2)
    held = Spans(table, b).holds(j)

    if "diagonals" in outs:

        @pl.when(j == 0)
        def start():
            outs["diagonals"][...] = jnp.zeros_like(outs["diagonals"])

    @pl.when(~held)
    def nothing():
        for name, out in outs.items():
            if name != "diagonals":
                out[...] = jnp.zeros_like(out)

    def tile(masked: bool) -> None:
        s = scores(plan, masked, prefix[b], q, k, q_at, k_at, key_bias)
        w = jnp.exp(s - top[:, :1]) * share[:, :1]  # hidden: exp(NEVER - FLOOR) is exactly 0
        if "columns" in outs:
            outs["columns"][...] = jnp.sum(w, axis=0, keepdims=True)
        if "blocks" in outs or "block_max" in outs:
            cut = w.T.reshape(plan.block_k // plan.block, plan.block, -1)
            if "blocks" in outs:
                outs["blocks"][...] = jnp.sum(cut, axis=1)
            if "block_max" in outs:
                outs["block_max"][...] = jnp.max(cut, axis=1)
        if "diagonals" in outs:
            w = jnp.where(k_at[SEGMENT][None] == GLOBAL, 0.0, w)
            for n in range(plan.block_k // LANES):
                runs[:, n] = w[:, n * LANES : (n + 1) * LANES]
            _add_runs(plan, b, j, base, runs, outs["diagonals"])

    Spans(table, b).each(j, tile)


def _add_runs(plan: Plan, b: Any, j: Any, base, runs, line) -> None:
    """Adds each query's weights [n, LANES] to the line of diagonals from the query's own place on."""
    size = plan.block_k // LANES

    def one(p: Any, carry: Any) -> Any:
        at = jnp.clip(base[b, p] + j * plan.block_k, -plan.block_k, plan.keys) + plan.block_k  # outside: the margins
        row, lane = div(at, LANES), rem(at, LANES)
        turned = pltpu.roll(runs[p], lane, 1)
        stays = jax.lax.broadcasted_iota(jnp.int32, turned.shape, 1) >= lane
        line[pl.ds(row, size)] += jnp.where(stays, turned, 0.0)
        line[pl.ds(row + 1, size)] += jnp.where(stays, 0.0, turned)  # what was turned around a register's edge
        return carry

    jax.lax.fori_loop(0, plan.count, one, 0)
