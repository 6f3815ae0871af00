"""What query heads do, as tables [L, H]: look for the same token, for the one behind it, or at the beginning.

    echo        E_h = mean_m Σ_{n in O(m)} P[m, n]        attention to earlier occurrences of the same token
    induction   I_h = mean_m Σ_{n in O(m)} P[m, n + 1]    to the tokens behind these, of which one is to be made

over a block of random tokens that is repeated (RazorAttention, arXiv 2407.15891): m runs over all repetitions, O(m) are
the earlier places of token m, but for the start token in front. Retrieval heads, by what they copy in an answer, are in
`jaxattn.analysis.retrieval`. Rows of operations that are no distributions are measured as the sink metric does it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxattn.analysis.capture import AttentionView, look
from jaxattn.analysis.sink_rate import ROW_BLOCK, alpha_of, over_query_blocks, proxy_weights
from jaxattn.errors import ConfigError
from jaxattn.models import ModelConfig
from jaxattn.nn import unstack_layers
from jaxattn.nn.decoding import variables_of

REPEATS = 4  # of the block, the first included


def unrolled(model: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
    """The model and its variables with layers of their own.

    Raises:
      ConfigError: no layer keeps the plain keys that a head could look at.
    """
    mixers = [model.mixer(layer).mechanism for layer in range(model.num_layers)]
    if all(mechanism is None or mechanism.core is None for mechanism in mixers):
        names = ", ".join(dict.fromkeys(model.mixers))
        raise ConfigError(
            f"the model's layers ({names}) keep no keys that a head could look at: profile a model with attention over "
            "keys, such as softmax."
        )
    if not model.scan_layers:
        return model, params
    variables = variables_of(params)
    variables = variables | {"params": unstack_layers(variables["params"], model)}
    return dataclasses.replace(model, scan_layers=False, remat=False), variables


def order(table: Float[np.ndarray, "L H"]) -> Int[np.ndarray, "L H"]:
    """Numbers from 1 on, the largest first and of equals the lowest layer and head: the head table `mask_heads`."""
    numbers = np.empty(table.size, np.int64)
    numbers[np.argsort(-table.reshape(-1), kind="stable")] = np.arange(1, table.size + 1)
    return numbers.reshape(table.shape)


def repeated(known: Collection[int], *, size: int, rows: int, start: int, seed: int = 0) -> Int[np.ndarray, "B T"]:
    """Rows of a start token and `REPEATS` times one block of `size` different tokens drawn among the `known`.

    Raises:
      ConfigError: there are not so many tokens.
    """
    ids = np.sort(np.asarray(list(known), np.int32))
    if not 2 <= size <= len(ids):
        raise ConfigError(f"a block of {size} tokens is asked for but must have from 2 to the {len(ids)} there are.")
    rng = np.random.default_rng(seed)
    blocks = np.stack([rng.permutation(ids)[:size] for _ in range(rows)])
    return np.concatenate([np.full((rows, 1), start, np.int32), np.tile(blocks, REPEATS)], axis=1)


def echo_and_induction(
    model: ModelConfig, params: Any, tokens: Int[np.ndarray, "B T"], size: int
) -> dict[str, np.ndarray]:
    """{"echo": [L, H], "induction": [L, H]}, means over the rows of `repeated`, whose blocks have `size` tokens.

    Raises:
      ConfigError: no layer keeps plain keys, or the model does not know so many positions.
    """
    return _measured(model, params, tokens, "repeats", size)


def sinks(model: ModelConfig, params: Any, tokens: Int[np.ndarray, "B T"]) -> np.ndarray:
    """[L, H]: the mean weight that a query gives to the beginning: constant slots, learned tokens, the first token.

    Raises:
      ConfigError: as `echo_and_induction`.
    """
    return _measured(model, params, tokens, "sinks", 0)["sinks"]


def _measured(model: ModelConfig, params: Any, tokens: np.ndarray, what: str, size: int) -> dict[str, np.ndarray]:
    model, params = unrolled(model, params)
    limit = model.position_limit
    if limit and tokens.shape[1] > limit:
        raise ConfigError(f"{tokens.shape[1]} tokens are to be read but the model knows {limit} positions: take fewer.")
    found = _program(model, what, size, variables_of(params), jnp.asarray(tokens))
    shape = (model.num_layers, model.num_heads)
    names = {name for layer in found.values() for name in layer}
    tables: dict[str, np.ndarray] = {name: np.zeros(shape) for name in sorted(names)}
    for layer, numbers in found.items():
        for name, x in numbers.items():
            tables[name][layer] = x
    return tables


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _program(model: ModelConfig, what: str, size: int, params: Any, tokens: Array) -> dict[int, dict[str, Array]]:
    view = look(model, params, tokens)
    own = [layer for layer in view.attention if layer.mechanism.core is not None]
    if what == "sinks":
        return {layer.layer: {"sinks": _beginning(layer, view.front)} for layer in own}
    return {layer.layer: repeats_of(layer, size, view.front) for layer in own}


def repeats_of(view: AttentionView, size: int, front: int = 0, block: int = ROW_BLOCK) -> dict[str, Float[Array, "H"]]:
    """Echo and induction scores of a layer's heads over rows of `repeated`, behind `front` learned tokens."""
    slots = view.weights(0, 1).slots
    length = view.queries.shape[1] - front
    places = jnp.arange(length)

    def reduce(a: Array, scores: Array, index: Array) -> dict[str, Array]:
        a = proxy_weights(a)[..., slots + front :]
        m, n = (index - front)[:, None], places  # a row that is none is behind all tokens
        later = (m > size) & (m < length)
        echo = later & (n < m) & (n > 0) & ((m - n) % size == 0)
        induction = later & (n - 1 < m) & (n - 1 > 0) & ((m - n + 1) % size == 0)
        total = lambda mask: jnp.sum(jnp.where(mask, a, 0.0), axis=(2, 3))
        return {"echo": total(echo), "induction": total(induction)}

    found = over_query_blocks(view, reduce, block)
    return {name: jnp.mean(x, axis=0) / max(1, length - 1 - size) for name, x in found.items()}


def _beginning(view: AttentionView, front: int) -> Float[Array, "H"]:
    """The mean weight of slots, of `front` learned tokens and of the first token."""
    slots = view.weights(0, 1).slots
    return jnp.mean(jnp.sum(alpha_of(view)[..., : slots + front + 1], axis=-1), axis=0)
