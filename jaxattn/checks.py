"""What callers pass, refused with one sentence where it cannot be meant: arrays, ids, parameters.

Shapes and dtypes are looked at while a program is traced; values only outside `jax.jit`, where they are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.errors import ConfigError, near, shown

QKV = "[batch, length, heads, dim]"
MANY_HEADS = 32  # from which on more heads than tokens are looked at twice


def known(x: Any) -> bool:
    """Whether the values of an array can be read: not while a program is traced, nor of a mere shape."""
    return not isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct)


def array(label: str, x: Any, axes: str, kind: Any) -> None:
    """Refuse what is no array of this many axes and dtype, or has none of something.

    Args:
      axes: as the message shows them, e.g. "[batch, length]".
      kind: jnp.floating or jnp.integer.

    Raises:
      ConfigError
    """
    if not isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        what = f"a {type(x).__name__}" if isinstance(x, list | tuple) else f"{shown(x)}, a {type(x).__name__},"
        raise ConfigError(f"{label} is {what} but must be an array {axes}: pass jnp.asarray(...) of that shape.")
    if x.ndim != axes.count(",") + 1:
        remedy = f"; {label}[None] adds the batch axis" if x.ndim == axes.count(",") and x.ndim else ""
        raise ConfigError(f"{label} has shape {list(x.shape)} but must be {axes}{remedy}.")
    if not jnp.issubdtype(x.dtype, kind):
        name = "floating-point numbers" if kind is jnp.floating else "integers"
        raise ConfigError(f"{label} is {x.dtype} but must be {name}: use {label}.astype({_dtype(kind)}).")
    if 0 in x.shape:
        raise ConfigError(f"{label} has shape {list(x.shape)}: no axis of {axes} may be 0.")


def _dtype(kind: Any) -> str:
    return "jnp.float32" if kind is jnp.floating else "jnp.int32"


def ids(label: str, x: Any, shape: tuple[int, ...], of: str, least: int = 0, segments: Any = None) -> None:
    """Refuse positions or segment ids that are not one integer for every token.

    Args:
      shape: (batch, length, ...) of what they belong to, `of` in words.
      least: the smallest value there may be.
      segments: for positions: they may not decrease from one token of a segment to the next.

    Raises:
      ConfigError
    """
    if x is None:
        return
    array(label, x, "[batch, length]", jnp.integer)
    if x.shape != shape[:2]:
        hint = "; it looks like [batch, heads, length, dim]: swap its axes 1 and 2" * (x.shape == shape[:3:2])
        raise ConfigError(f"{label} has shape {list(x.shape)} but {of} has {list(shape[:2])} in [batch, length]{hint}.")
    if not known(x):
        return
    values = np.asarray(x)
    if values.min() < least:
        raise ConfigError(f"{label} holds {values.min()} but must be {least} or more everywhere.")
    if segments is None or not known(segments):
        return
    owner = np.asarray(segments)
    falls = (values[:, 1:] < values[:, :-1]) & (owner[:, 1:] == owner[:, :-1]) & (owner[:, 1:] != 0)
    if falls.any():
        row, at = (int(i) for i in np.argwhere(falls)[0])
        raise ConfigError(
            f"{label} fall from {values[row, at]} to {values[row, at + 1]} at row {row}, place {at + 1}, inside a "
            "segment: sort its tokens, or give the documents segment ids of their own."
        )


def tokens(x: Any, vocab_size: int) -> None:
    """Refuse what is not token ids [batch, length] below `vocab_size`.

    Raises:
      ConfigError
    """
    array("tokens", x, "[batch, length]", jnp.integer)
    if known(x):
        values = np.asarray(x)
        low, high = values.min(), values.max()
        if low < 0 or high >= vocab_size:
            raise ConfigError(
                f"token {low if low < 0 else high} is not in 0..{vocab_size - 1}, the model's vocabulary."
            )


def prefix_len(x: Any, batch: int) -> None:
    """Refuse what is not one length for every row.

    Raises:
      ConfigError
    """
    if x is None:
        return
    if isinstance(x, int) and not isinstance(x, bool):
        raise ConfigError(f"prefix_len is {x} but must be integers [batch]: pass jnp.full({batch}, {x}).")
    array("prefix_len", x, "[batch]", jnp.integer)
    if x.shape != (batch,):
        raise ConfigError(f"prefix_len has shape {list(x.shape)} but there are {batch} rows: give [{batch}].")
    if known(x) and np.asarray(x).min() < 0:
        raise ConfigError(f"prefix_len holds {np.asarray(x).min()} but must be 0 or more everywhere.")


def heads(q: Any, k: Any, v: Any, *, sure: bool) -> None:
    """Refuse queries, keys and values that do not fit together, or that look like [batch, heads, length, dim].

    Args:
      sure: the caller has said by other arguments which axis is the length.

    Raises:
      ConfigError
    """
    for label, x in (("q", q), ("k", k), ("v", v)):
        array(label, x, QKV, jnp.floating)
    if q.shape[-1] != k.shape[-1]:
        raise ConfigError(f"the key dim of q is {q.shape[-1]} but that of k is {k.shape[-1]}; they must agree.")
    if k.shape[:3] != v.shape[:3]:
        raise ConfigError(f"k is {k.shape[:3]} and v is {v.shape[:3]} in [batch, length, heads]; make them equal.")
    if q.shape[0] != k.shape[0]:
        raise ConfigError(f"q has batch {q.shape[0]} but k has {k.shape[0]}; make them equal.")
    (length, count), (keys, kv_heads) = q.shape[1:3], k.shape[1:3]
    turned = count == kv_heads and length % keys == 0  # would fit as [batch, heads, length, dim]
    remedy = "swap axes 1 and 2 (jnp.swapaxes(x, 1, 2))"
    if not sure and turned and length != keys and count > length:
        raise ConfigError(
            f"q is {list(q.shape)} and k is {list(k.shape)}, which looks like [batch, heads, length, dim]: {remedy}; "
            f"if {length} queries do attend to {keys} keys, say where those are with kv_positions."
        )
    if not sure and turned and count >= max(MANY_HEADS, 4 * length):
        raise ConfigError(
            f"q is {list(q.shape)}, {count} heads of {length} tokens, which looks like [batch, heads, length, dim]: "
            f"{remedy}; if it is right, say so with positions [batch, length]."
        )
    if count % kv_heads:
        hint = f"; if q is [batch, heads, length, dim], {remedy}" if length % keys == 0 and not sure else ""
        raise ConfigError(f"num_heads {count} is not a multiple of num_kv_heads {kv_heads}{hint}.")


def callable_bias(bias: Any) -> None:
    """Refuse a bias that is no function of positions.

    Raises:
      ConfigError
    """
    if bias is not None and not callable(bias):
        kind = "an array" if hasattr(bias, "shape") else shown(bias)
        raise ConfigError(
            f"bias is {kind} but must be a function bias(q_positions, k_positions) such as jaxattn.rope.Alibi(slopes); "
            "a fixed array is lambda q_positions, k_positions: array."
        )


def number(label: str, x: Any) -> None:
    """Refuse what is neither None nor a finite number (or a traced one).

    Raises:
      ConfigError
    """
    if x is None or (hasattr(x, "ndim") and x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.number)):
        return
    if isinstance(x, bool) or not isinstance(x, int | float) or not np.isfinite(x):
        raise ConfigError(f"{label} is {shown(x)} but must be a finite number or None.")


def truth(label: str, x: Any) -> None:
    """Refuse what is not True or False.

    Raises:
      ConfigError
    """
    if not isinstance(x, bool | np.bool_):
        raise ConfigError(f"{label} is {shown(x)} but must be True or False.")


def parameters(owner: str, given: Any, wanted: Mapping[str, Any], how: str) -> None:
    """Refuse parameters that are not the arrays `wanted` (name -> something with a shape).

    Args:
      how: where the right ones come from, in words.

    Raises:
      ConfigError
    """
    if not wanted and not given:
        return
    needs = ", ".join(f"{name} {list(x.shape)}" for name, x in wanted.items()) or "none"
    if given is None:
        raise ConfigError(f"{owner} owns parameters ({needs}): {how}.")
    if not isinstance(given, Mapping):
        raise ConfigError(f"params is a {type(given).__name__} but must be a dict of arrays ({needs}): {how}.")
    for name in given:
        if name not in wanted:
            raise ConfigError(
                f"{owner} has no parameter {shown(name)}; {near(str(name), wanted)}its parameters are: {needs}."
            )
    for name, x in wanted.items():
        if name not in given:
            raise ConfigError(f"params lacks {name!r}: {owner} owns {needs}; {how}.")
        shape = getattr(given[name], "shape", None)
        if shape != x.shape:
            found = f"of shape {list(shape)}" if shape is not None else shown(given[name])
            raise ConfigError(f"the parameter {name!r} of {owner} is {found} but must be {list(x.shape)}; {how}.")


def variables(given: Any) -> None:
    """Refuse what is no ``{"params": {...}}``.

    Raises:
      ConfigError
    """
    if isinstance(given, Mapping) and isinstance(given.get("params"), Mapping):
        return
    names = ", ".join(map(shown, list(given)[:4])) if isinstance(given, Mapping) else ""
    what = f"a dict of {names or 'nothing'}" if isinstance(given, Mapping) else shown(given)
    raise ConfigError(f"the variables are {what} but must be {{'params': params}}, params as Decoder.init makes them.")


def leaf(path: str, x: Any) -> None:
    """Refuse a parameter that is no array.

    Raises:
      ConfigError
    """
    if not hasattr(x, "astype"):
        raise ConfigError(f"the parameter {path} is {shown(x)} but must be an array.")


def shape(path: str, x: Any, wanted: tuple[int, ...]) -> None:
    """Refuse a parameter of another shape than the model's.

    Raises:
      ConfigError
    """
    if x.shape != wanted:
        raise ConfigError(
            f"the parameter {path} is of shape {list(x.shape)} (as decoding holds it) but must be {list(wanted)}: use "
            "the model it was made for."
        )
