"""The Hopper kernels: those of `flash` over tables made of the lists, one of tiles of keys for each block of queries.

The backward pass walks the same way for dq, and over the lists turned round for dk and dv; see `gpu_lists`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.masks import Visibility
from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels._dispatch import interpret_for
from pallas_kernels.block_sparse.gpu_lists import Plan, by_key, by_query
from pallas_kernels.block_sparse.lists import in_blocks
from pallas_kernels.flash import gpu, gpu_backward, gpu_biases, rows
from pallas_kernels.flash.gpu import blocked
from pallas_kernels.flash.gpu_biases import Biases
from pallas_kernels.flash.gpu_tiles import BLOCK, column_tile, key_tile
from pallas_kernels.flash.score import Score

TOKENS = {"block_q": BLOCK, "block_k": BLOCK}  # what a block of threads works on; its steps are parts of that


def unfit(
    q: Array, k: Array, v: Array, score: Score, block_q: int, block_k: int, key_bias: Array | None = None
) -> str | None:
    """Why the Hopper kernels cannot serve a call, or None."""
    if reason := gpu.unfit(q, k, v, score, None, key_bias):
        return reason
    if score.normaliser == "count":
        return "backend 'gpu' does not count the keys of lists but the normaliser is 'count': use 'xla'."
    for (name, tokens), size in zip(TOKENS.items(), (block_q, block_k), strict=True):
        if size % tokens:
            return (
                f"backend 'gpu' works on {tokens} tokens of one list at a time but {name} is {size}: choose a "
                f"multiple of {tokens} or use 'xla'."
            )
    return None


def block_sparse_gpu(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"],
    vis: Visibility,
    score: Score,
    *,
    blocks: Int[Array, "B L I N"],
    block_q: int,
    block_k: int,
    scale: float,
    stats: bool = True,
    key_bias: Float[Array, "B n S"] | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """See `pallas_kernels.block_sparse.block_sparse`. What is kept for the backward pass: q, k, v, o, a number a row.

    Raises:
      NotImplementedError: see `unfit`, or the process computes on another platform.
    """
    if reason := unfit(q, k, v, score, block_q, block_k, key_bias):
        raise NotImplementedError(f"block_sparse: {reason}")
    interpret = mg.mode(interpret_for("block_sparse", "gpu"))
    batch, length, heads, _ = q.shape
    v_dim, kind = v.shape[3], v.dtype
    biases = gpu_biases.settings(k, None, key_bias, heads // k.shape[2])
    added = gpu_biases.gathered(k, None, key_bias, -k.shape[1] % BLOCK)
    q, k, v = map(blocked, (q, k, v))
    dims = q.shape[3], v.shape[3]
    plan = Plan(
        score=score,
        scale=float(scale),
        group=heads // k.shape[2],
        causal=vis.causal,
        window=vis.window,
        has_prefix=vis.prefix_len is not None,
        aligned=vis.aligned,
        stats=stats,
        staged=mg.simulated(),
        interpret=interpret,
        kv_heads=k.shape[2],
        lists=blocks.shape[1],
        width=blocks.shape[3],
        block_q=block_q,
        block_k=block_k,
        query_tiles=-(-length // BLOCK) * (BLOCK // column_tile(*dims)),
        **biases,
    )
    o, stat = _attend(plan, q, k, v, in_blocks(vis, batch, BLOCK, BLOCK), blocks, added)
    return o[:, :length, :, :v_dim].astype(kind), rows.reported(jnp.swapaxes(stat[:, :, :length], 1, 2), score)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    plan: Plan, q: Array, k: Array, v: Array, vis: Visibility, blocks: Array, biases: Biases
) -> tuple[Array, Array]:
    """[B,T,H,D], [B,S,K,D], [B,S,K,V] in whole tiles to [B,T,H,V] and [B,H,T]."""
    return _forward(plan, q, k, v, vis, blocks, biases)[0]


def _forward(
    plan: Plan, q: Array, k: Array, v: Array, vis: Visibility, blocks: Array, biases: Biases
) -> tuple[Any, Any]:
    tile = key_tile(q.shape[3], v.shape[3])
    o, stat = gpu.forward(plan, by_query(plan, blocks, vis, BLOCK, tile), q, k, v, vis, biases)
    return (o, stat), ((q, k, v, vis, o, stat), blocks, biases)


def _backward(plan: Plan, saved: Any, d_out: tuple[Array, Array]) -> tuple[Array, Array, Array, None, None, Biases]:
    (q, _, v, vis, _, _), blocks, biases = saved
    columns = column_tile(q.shape[3], v.shape[3])
    tables = by_query(plan, blocks, vis, BLOCK, columns), by_key(plan, blocks, vis, columns, BLOCK)
    dq, dk, dv, d_biases = gpu_backward.gradients(plan, saved[0], *d_out, tables, biases)
    return dq, dk, dv, None, None, d_biases


_attend.defvjp(_forward, _backward)
