"""Which key heads need the whole text: DuoAttention's gates, trained with the model's weights frozen.

DuoAttention (arXiv 2410.10819, §2.3). A row and its twin go through the model together: the first attends to all, the
twin through the gates α [L, K] (policy `duo`, twins=True), and α learns to keep the twin's last vectors H^M at the
first one's H^F, where passkeys hidden in the text are asked for, with as few heads as it takes:

    L = mean_t mean_d (H^F - H^M)² + λ mean |α|,    t over questions and passkeys
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxattn.errors import ConfigError
from jaxattn.head_tables import with_head_tables
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from jaxattn.nn.decoding import variables_of
from jaxattn.policies import text_of
from jaxattn.policies.duo import POLICY, TABLE, Spec


class Sample(NamedTuple):
    """tokens [T]; asked [T], which of them are behind the text: questions and passkeys."""

    tokens: Any
    asked: Any


@dataclasses.dataclass(frozen=True)
class Training:
    """steps, learning_rate, penalty (λ): of AdamW without decay. ramp: share of the steps in which the rate rises, and
    in which it falls."""

    steps: int = 2000
    learning_rate: float = 0.02
    penalty: float = 0.05
    ramp: float = 0.2

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"duo gates: steps is {self.steps} but must be at least 1.")
        if not self.learning_rate > 0:
            raise ConfigError(f"duo gates: learning_rate is {self.learning_rate} but must be positive.")

    def rate(self, step: Any) -> Array:
        """The learning rate of a step."""
        edge = max(1.0, self.ramp * self.steps)
        rising, falling = jnp.maximum((step + 1) / edge, 0.1), jnp.maximum((self.steps - step) / edge, 0.1)
        return self.learning_rate * jnp.minimum(1.0, jnp.minimum(rising, falling))


class Gates(NamedTuple):
    """values: [L, K]. losses: [steps], the distance of the twins without the penalty."""

    values: np.ndarray
    losses: np.ndarray

    def table(self, heads: int) -> np.ndarray:
        """[L, H], as head tables are; query heads of a key head share its gate."""
        return np.repeat(self.values, heads // self.values.shape[1], axis=1)


def distance(
    model: ModelConfig, variables: Any, gates: Float[Array, "L K"], tokens: Int[Array, "B T"], asked: Array
) -> Float[Array, ""]:
    """mean (H^F - H^M)² over the asked tokens; `model` has the policy duo with twins=True."""
    group = model.num_heads // model.kv_heads
    known = with_head_tables(model, variables, {TABLE: jnp.repeat(gates, group, axis=1)})
    both = jnp.concatenate([tokens, tokens])
    places = jnp.broadcast_to(jnp.arange(both.shape[1]), both.shape)
    decoder = Decoder(model)
    states = decoder.apply(known, len(both), both.shape[1], method="start")
    out: Any = decoder.apply(known, states, both, places, jnp.ones_like(both), "prompt", method="advance")
    hidden = out[0].astype(jnp.float32)
    gap = jnp.mean((jax.lax.stop_gradient(hidden[: len(tokens)]) - hidden[len(tokens) :]) ** 2, axis=-1)
    weights = asked.astype(jnp.float32)
    return jnp.sum(gap * weights) / jnp.sum(weights)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(model: ModelConfig, how: Training, variables: Any, gates: Array, moments: Any, sample: Sample) -> Any:
    gates = jnp.clip(gates, 0.0, 1.0)

    def loss(gates: Array) -> tuple[Array, Array]:
        gap = distance(model, variables, gates, sample.tokens[None], sample.asked[None])
        return gap + how.penalty * jnp.mean(jnp.abs(gates)), gap

    slope, gap = jax.grad(loss, has_aux=True)(gates)
    change, moments = _optimiser(how).update(slope, moments, gates)
    return optax.apply_updates(gates, change), moments, gap


def _optimiser(how: Training) -> optax.GradientTransformation:
    return optax.adamw(how.rate, weight_decay=0.0)


def train_gates(
    model: ModelConfig,
    params: Any,
    samples: Iterator[Sample],
    spec: Spec,
    how: Training,
    *,
    show: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Gates:
    """Gates of every key head, from 1 on.

    Args:
      samples: one a step; every length is a program of its own.
      spec: of which `sinks` and `recent` count.
      show: what the steps pass through, such as a progress bar.

    Raises:
      ConfigError: a model that `duo` cannot serve.
    """
    twins = dataclasses.replace(spec, twins=True, full="")
    model = dataclasses.replace(model, policy=text_of(POLICY, twins))
    variables = variables_of(params)
    gates = jnp.ones((model.num_layers, model.kv_heads), jnp.float32)
    moments, losses = _optimiser(how).init(gates), []
    for _ in show(range(how.steps)):
        sample = Sample(*map(jnp.asarray, next(samples)))
        gates, moments, gap = _step(model, how, variables, gates, moments, sample)
        losses.append(float(gap))
    return Gates(np.asarray(jnp.clip(gates, 0.0, 1.0)), np.array(losses))
