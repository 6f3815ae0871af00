"""Parameters as decoding reads them: in the compute dtype and, on a CPU, laid out for one row at a time."""

from __future__ import annotations

import collections
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array

from jaxattn import checks
from jaxattn.models.config import ModelConfig
from jaxattn.nn.gated_conv import is_depthwise
from jaxattn.nn.layers import ROWS
from pallas_kernels._cpu import missing
from pallas_kernels.linear.gemv import usable

CAST = ("kernel", "embed", "unembed")


def decoding_variables(model: ModelConfig, params: Mapping[str, Any], *, consume: bool = False) -> dict[str, Any]:
    """The variables for `Decoder.apply` that make steps fast; its results are the same up to rounding.

    Kernels and embeddings are in the compute dtype once, instead of at every step; all else stays as trained: the
    layers cast these themselves, and a mechanism's own parameters may need f32. Where `pallas_kernels.linear.gemv`
    runs and `model.backend` is "auto", kernels lie transposed, [out, in], in the collection `ROWS` and are gone from
    "params", but for a tied embedding, which is looked up too. What this function returned passes unchanged.

    Args:
      consume: let go of what was made anew, one by one, so that memory is not needed twice; `params` are then gone.
    """
    more: dict[str, Any] = {}
    if isinstance(params, Mapping) and "params" in params:
        if ROWS in params:
            return dict(params)
        more = {name: x for name, x in params.items() if name != "params"}
        params = params["params"]
    checks.variables({"params": params})
    dtype = jnp.dtype(model.dtype)
    given: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(dict(params))
    for path, x in given.items():
        checks.leaf("/".join(map(str, path)), x)
    turns = () if why_plain(model) else ("kernel", "unembed")
    flat, rows, names = {}, {}, collections.Counter(map(id, given.values()))
    for path, x in given.items():
        if path[-1] in turns and not is_depthwise(path) and usable(jax.ShapeDtypeStruct(x.shape, dtype)):
            new = rows[path] = _turned(x, dtype)
        else:
            new = flat[path] = x.astype(dtype) if path[-1] in CAST else x
        if consume and new is not x and isinstance(x, jax.Array) and names[id(x)] == 1:
            jax.block_until_ready(new)
            x.delete()
    if not turns:
        return {"params": traverse_util.unflatten_dict(flat), **more}
    if model.tie_embeddings and ("embed",) in flat and usable(flat[("embed",)]):
        rows[("unembed",)] = flat[("embed",)]
    return {"params": traverse_util.unflatten_dict(flat), ROWS: traverse_util.unflatten_dict(rows), **more}


@functools.partial(jax.jit, static_argnums=1)  # one program a shape, whatever the number of layers and calls
def _turned(x: Array, dtype: jnp.dtype) -> Array:
    """[..., in, out] -> [..., out, in] in `dtype`, without a copy in between."""
    return jnp.swapaxes(x.astype(dtype), -1, -2)


def variables_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """The variables for `Decoder.apply` of parameters, or of what already are variables."""
    return dict(params) if isinstance(params, Mapping) and "params" in params else {"params": params}


def why_plain(model: ModelConfig) -> str:
    """Why products of single rows go to XLA as they are; empty where they do not."""
    return missing() if model.backend == "auto" else f"the backend {model.backend} was named"
