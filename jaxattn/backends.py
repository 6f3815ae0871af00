"""Which backend every kernel op of a model gets, and why: known from shapes, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn.errors import ConfigError
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from jaxattn.nn.decoding import decoding_variables, why_plain
from pallas_kernels import recording


def backends_of(model: ModelConfig, call: Callable[..., Any], *args: Any) -> str:
    """One line: op, backend and reason for every op that `call(*args)` traces. Arguments may be shapes.

    Raises:
      ConfigError: the backend the model names cannot serve one of them; the text says why.
    """
    with recording() as choices:
        try:
            jax.eval_shape(call, *args)
        except NotImplementedError as error:
            raise ConfigError(f"model.backend is {model.backend!r}: {error}") from error
    parts = [f"{op} {name} ({why})" for op, names in sorted(choices.items()) for name, why in sorted(names.items())]
    return f"backends: {'; '.join(parts) or 'no kernels'}"


def of_decoding(model: ModelConfig, variables: Any) -> str:
    """As `backends_of`, for a decoding step of one token.

    Raises:
      ConfigError: see `backends_of`.
    """

    def step(variables: Any) -> Any:
        decoder, one = Decoder(model), jnp.zeros((1, 1), jnp.int32)
        variables = decoding_variables(model, variables)
        states: Any = decoder.apply(variables, 1, 8, method="start")
        return decoder.apply(variables, states, one, one, one + 1, method="step")

    plain = why_plain(model)
    rows = f"xla ({plain})" if plain else "numba (this is a cpu)"
    return f"{backends_of(model, step, variables)}; products of single rows {rows}"
