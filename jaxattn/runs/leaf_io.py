"""The leaves of a training state: their names, host copies, and how they come back to their devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.errors import Mismatch, UserError


def name_of(path: tuple[Any, ...]) -> str:
    """A tree path as "params/layer_0/attn/q/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named(tree: Any) -> dict[str, Any]:
    """Every leaf by its name.

    Raises:
      UserError: two leaves would share a name.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    by_name = {name_of(path): leaf for path, leaf in leaves}
    if len(by_name) < len(leaves):
        raise UserError("two leaves of the state have the same name: use keys without '/'.")
    return by_name


def fits_on_host(leaf: Any) -> bool:
    """Whether this process can hold all of the leaf on the host; else Orbax moves it shard by shard."""
    sharding = getattr(leaf, "sharding", None)
    return sharding is None or sharding.is_fully_addressable


def to_host(state: Any) -> Any:
    """Host copies that neither donation nor the training loop can change.

    Raises:
      UserError: a leaf that cannot be saved, by name.
    """
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array) and fits_on_host(leaf):
            leaf.copy_to_host_async()  # all transfers at once, then collected one by one

    def convert(path: tuple[Any, ...], leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise UserError(f"state leaf {name_of(path)!r} is a typed key: save jax.random.key_data of it.")
        if isinstance(leaf, jax.Array) and not fits_on_host(leaf):
            return leaf
        # On the CPU this is a view, but one that JAX counts: a donated buffer under it is not reused.
        host = np.asarray(leaf) if isinstance(leaf, jax.Array) else np.array(leaf)
        if host.dtype.kind in "OUSM" or host.size == 0:
            raise UserError(
                f"state leaf {name_of(path)!r} is {type(leaf).__name__} of dtype {host.dtype} and shape "
                f"{list(host.shape)}: only non-empty arrays, ints and floats can be saved."
            )
        return host

    return jax.tree_util.tree_map_with_path(convert, state)


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def is_finite(leaf: Any) -> bool:
    """Whether a leaf holds neither inf nor NaN; integers hold neither."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return True
    if isinstance(leaf, jax.Array):
        return bool(_all_finite(leaf))
    with np.errstate(over="ignore", invalid="ignore"):  # a finite sum proves it at half the cost
        return bool(np.isfinite(leaf.sum()) or np.isfinite(leaf).all())


def abstract(leaf: Any) -> Any:
    """Python numbers as arrays, so that every leaf has a shape and a dtype."""
    return np.asarray(leaf) if isinstance(leaf, (bool, int, float)) else leaf


def target(leaf: Any, dtype: str) -> Any:
    """What Orbax is asked for: host memory (hashed there, then placed) or, over processes, the shards."""
    leaf = abstract(leaf)
    if not fits_on_host(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=leaf.sharding)
    return np.broadcast_to(np.zeros((), jnp.dtype(dtype)), leaf.shape)  # a shape and a dtype, no memory


def place(wanted: Any, loaded: Any) -> Any:
    """A loaded leaf as the kind, dtype and sharding that was asked for.

    Raises:
      Mismatch: JAX cannot make the dtype.
    """
    if isinstance(wanted, (bool, int, float)):
        return type(wanted)(loaded.item())
    if isinstance(loaded, jax.Array):
        if loaded.dtype == wanted.dtype:
            return loaded
        return jax.jit(lambda x: x.astype(wanted.dtype), out_shardings=wanted.sharding)(loaded)
    cast = loaded.astype(wanted.dtype, copy=False)
    if isinstance(wanted, np.ndarray):
        return cast
    if getattr(wanted, "weak_type", False) and cast.ndim == 0:
        cast = jnp.asarray(cast.item())  # a strong scalar would promote differently from the saved one
    placed = jax.device_put(cast, getattr(wanted, "sharding", None))
    if placed.dtype != wanted.dtype:
        raise Mismatch(f"a leaf has dtype {wanted.dtype}, JAX makes {placed.dtype}: set jax_enable_x64.")
    return placed
