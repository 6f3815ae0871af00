"""`paged_decode`: attention of a few queries over listed pages of a key/value cache; pages not listed are not read.

s_ij = scale · q_i·R(pos_j) k_j + bias_j,  o_i = Σ_j e^(s_ij - L_i) v_j,  L_i = log Σ_j e^(s_ij)

over the live slots j of the pages listed for the sequence and the key head, R the rotation of keys kept un-rotated.
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from jaxattn.errors import ConfigError
from jaxattn.rope import Rope
from pallas_kernels._dispatch import note, resolve
from pallas_kernels.paged_decode.cpu import fits, paged_decode_cpu
from pallas_kernels.paged_decode.gpu import paged_decode_gpu
from pallas_kernels.paged_decode.gpu import unfit as unfit_gpu
from pallas_kernels.paged_decode.reference import paged_decode_reference
from pallas_kernels.paged_decode.tpu import paged_decode_tpu, unfit
from pallas_kernels.paged_decode.xla import paged_decode_xla

__all__ = ["paged_decode", "pages_of"]

IMPLEMENTATIONS = {
    "reference": paged_decode_reference,
    "xla": paged_decode_xla,
    "tpu": paged_decode_tpu,
    "gpu": paged_decode_gpu,
}


def paged_decode(
    q: Float[Array, "B T H D"],
    k_pages: Float[Array, "N K P page D"],
    v_pages: Float[Array, "N K P page V"],
    tables: Int[Array, "B k n"],
    lengths: Int[Array, "B"] | Int[Array, "B l"] | Int[Array, "B l t"] | None = None,
    *,
    scale: float,
    key_bias: Float[Array, "B b slots"] | None = None,
    rope: Rope | None = None,
    key_positions: Int[Array, "B r slots"] | None = None,
    splits: int | None = None,
    backend: str = "auto",
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """(o in v's dtype, L in f32) of softmax attention over listed pages; cost grows with the list, not the cache.

    Results over disjoint lists join by `pallas_kernels.flash.merge.merge`. A query that sees nothing gives 0 and
    -1e30. For inference: "reference" is differentiable, the others refuse gradients.

    The n listed pages of a sequence form slots 0 .. n·page - 1 in the order of the list. Axes k, l, b, r are 1
    (all key heads alike) or K.

    Args:
      q: query head h reads key head h // (H // K). Already rotated, whatever `rope` says.
      k_pages, v_pages: N = 1: one pool for all sequences; N = B: every sequence has its own pages, as a plain
        cache [B, K, S, D] does (`pages_of`). A page of one token makes the table a list of tokens.
      tables: page numbers below P; -1 = unused entry, wherever it stands.
      lengths: slots at or behind this one are not seen; for all queries or, [B, l, T], per query, which makes
        queries that are in the list themselves causal. None: all slots of listed pages are seen.
      scale: multiplies q·k.
      key_bias: added to the scaled score of each slot; finite; -1e30 hides the slot.
      rope: turns keys, which are then kept un-rotated, by `key_positions`: absolute positions, ranks in the list,
        or slots, as the caller chooses.
      splits: parts of the list computed next to each other and merged, for parallel hardware. None: what fits.
      backend: "auto", "xla", "tpu", "gpu", "reference"; a named backend never falls back.

    Raises:
      ConfigError: shapes that do not belong together.
      NotImplementedError: a backend this op does not have, or that cannot serve this call.
    """
    _check(q, k_pages, v_pages, tables, lengths, key_bias, rope, key_positions, splits)
    if lengths is not None:
        lengths = lengths.reshape(*lengths.shape, *(1,) * (3 - lengths.ndim))
    if backend == "auto" and fits(q, k_pages, v_pages, lengths, key_bias, rope, splits):
        note("paged_decode", "numba", "single rows on a cpu")
        return paged_decode_cpu(q, k_pages, v_pages, tables, lengths, scale)
    reasons = {"tpu": unfit(q, k_pages, v_pages), "gpu": unfit_gpu(q, k_pages, v_pages, rope)}
    run = resolve("paged_decode", backend, IMPLEMENTATIONS, default="xla", unfit=reasons)
    return run(
        q,
        k_pages,
        v_pages,
        tables,
        lengths,
        scale=scale,
        key_bias=key_bias,
        rope=rope,
        key_positions=key_positions,
        splits=splits,
    )


def pages_of(cache: Float[Array, "B K S D"], page: int) -> Float[Array, "B K P page D"]:
    """A cache with heads before tokens as pages of `page` tokens; a view, as long as `page` divides S.

    Raises:
      ConfigError: it does not.
    """
    batch, heads, size, dim = cache.shape
    if page < 1 or size % page:
        raise ConfigError(f"page is {page} but must divide the cache's capacity {size}: change one of them.")
    return cache.reshape(batch, heads, size // page, page, dim)


def _check(q, k_pages, v_pages, tables, lengths, key_bias, rope, key_positions, splits) -> None:
    batch, length, heads, dim = q.shape
    pools, kv_heads, _, page, _ = k_pages.shape
    slots = tables.shape[2] * page
    if k_pages.shape[:4] != v_pages.shape[:4] or k_pages.shape[4] != dim:
        raise ConfigError(
            f"k_pages {k_pages.shape} and v_pages {v_pages.shape} must agree but for the last axis, and keys must "
            f"be as wide as queries, {dim}."
        )
    if pools not in (1, batch) or heads % kv_heads:
        raise ConfigError(
            f"k_pages {k_pages.shape} must hold 1 or {batch} pools, and key heads must divide the {heads} query heads."
        )
    if (rope is None) != (key_positions is None):
        raise ConfigError("rope and key_positions belong together: give both, or none where keys are rotated.")
    if splits is not None and splits < 1:
        raise ConfigError(f"splits is {splits} but must be at least 1, or None.")
    wanted = {
        "tables": (tables, (tables.shape[2],)),
        "lengths": (lengths, () if lengths is None or lengths.ndim < 3 else (lengths.shape[2],)),
        "key_bias": (key_bias, (slots,)),
        "key_positions": (key_positions, (slots,)),
    }
    for name, (x, last) in wanted.items():
        if x is None or x.ndim == 1:
            continue
        if x.shape[1] not in (1, kv_heads) or x.shape[2:] != last:
            raise ConfigError(
                f"{name} has shape {x.shape} but must be [{batch}, 1 or {kv_heads}, {', '.join(map(str, last))}]."
            )
    if lengths is not None and lengths.ndim == 3 and lengths.shape[2] not in (1, length):
        raise ConfigError(f"lengths has shape {lengths.shape} but its last axis must be 1 or {length} queries.")
    if not slots:
        raise ConfigError("tables lists no pages: give at least one entry, -1 if unused.")
