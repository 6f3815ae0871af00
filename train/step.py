"""The training step as one pure function: state, batch -> state, numbers.

A step that would put a non-finite value into the parameters does not happen: the state comes back
unchanged (only `skipped` counts up), so whatever is saved afterwards is sound.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from jaxattn.runs.config import LoraConfig, OptimConfig
from jaxattn.runs.lora import init as init_lora
from jaxattn.runs.lora import merge
from train.objective import cross_entropy
from train.optimizer import make_optimizer, make_schedule

State = dict[str, Any]
Batch = dict[str, Array]
SPIKE_WARMUP = 20  # steps before the running mean of the loss is trusted
PROGRAMS = 16  # compiled steps that a process keeps, for runs that differ in seed, data or length alone


def init_state(
    model: ModelConfig, optim: OptimConfig, steps: int, seed: int, lora: LoraConfig | None = None, new: Any = ()
) -> State:
    """params (f32), opt_state, step, skipped, loss_mean and the raw PRNG key, all deterministic in the seed.

    With `lora` params are what `jaxattn.runs.lora.init` makes: the low-rank updates, and the leaves in `new`.
    """
    return _initialiser(model, optim, _horizon(optim, steps), lora, tuple(new))(jax.random.key(seed))


def _horizon(optim: OptimConfig, steps: int) -> int:
    """Of the steps of a run what its program depends on: nothing where the rate stays constant."""
    return 0 if optim.schedule == "constant" else steps


@lru_cache(maxsize=PROGRAMS)
def _initialiser(
    model: ModelConfig, optim: OptimConfig, steps: int, lora: LoraConfig | None, new: tuple[Any, ...]
) -> Callable[[Array], State]:
    @jax.jit
    def create(key: Array) -> State:
        init_key, run_key = jax.random.split(key)
        tokens = jnp.zeros((1, 8), jnp.int32)
        params = Decoder(model).init(init_key, tokens)["params"]
        if lora is not None:
            params = init_lora(jax.random.fold_in(init_key, 1), params, lora, new)
        return {
            "params": params,
            "opt_state": make_optimizer(optim, steps).init(params),
            "step": jnp.zeros((), jnp.int32),
            "skipped": jnp.zeros((), jnp.int32),
            "loss_mean": jnp.zeros((), jnp.float32),
            "rng": jax.random.key_data(run_key),
        }

    return create


def batch_loss(model: ModelConfig, params: Any, batch: Batch) -> tuple[Array, Array]:
    """Summed cross-entropy (nats) over the batch's loss mask, and the number of tokens in it."""
    outputs: Any = Decoder(model).apply(
        {"params": params},
        batch["tokens"],
        batch["positions"],
        batch["segment_ids"],
        batch.get("prefix_len"),
        method=_hidden_and_unembedding,
    )
    hidden, unembedding = outputs
    return cross_entropy(hidden, unembedding, batch["targets"], batch["loss_mask"])


def _hidden_and_unembedding(decoder: Decoder, *inputs: Array) -> tuple[Array, Array]:
    return decoder.hidden(*inputs), decoder.unembedding()


def make_train_step(
    model: ModelConfig, optim: OptimConfig, steps: int, lora: LoraConfig | None = None, frozen: Any = None
) -> Callable[[State, Batch], tuple[State, dict[str, Array]]]:
    """The jitted step; the state is donated. Numbers: loss, grad_norm, lr, tokens, applied, skipped.

    With `lora` the state's params are the updates of the `frozen` ones.
    """
    compiled = _step(model, optim, _horizon(optim, steps), lora)
    return compiled if lora is None else partial(compiled, frozen=frozen)


@lru_cache(maxsize=PROGRAMS)
def _step(model: ModelConfig, optim: OptimConfig, steps: int, lora: LoraConfig | None) -> Callable[..., Any]:
    """The jitted step of `make_train_step`, with `frozen` as its last argument."""
    optimizer, schedule = make_optimizer(optim, steps), make_schedule(optim, steps)

    def gradients(params: Any, frozen: Any, batch: Batch) -> tuple[Array, Array, Any]:
        """Mean loss, token count and gradient of the mean over the whole batch."""
        total = jnp.maximum(jnp.sum(batch["loss_mask"]).astype(jnp.float32), 1.0)

        def share(p: Any, part: Batch) -> Array:
            return batch_loss(model, p if lora is None else merge(frozen, p, lora), part)[0] / total

        if optim.accumulate == 1:
            loss, grads = jax.value_and_grad(share)(params, batch)
            return loss, total, grads
        parts = jax.tree.map(lambda x: x.reshape(optim.accumulate, -1, *x.shape[1:]), batch)

        def add(carry, _):
            # Always the first part, the others move up: on CPU a slice at the loop's index would be taken
            # again for every element of the attention masks (the step: 1.2 times as long).
            so_far, parts = carry
            part = jax.tree.map(lambda x: x[0], parts)
            so_far = jax.tree.map(jnp.add, so_far, jax.value_and_grad(share)(params, part))
            return (so_far, jax.tree.map(lambda x: jnp.roll(x, -1, axis=0), parts)), None

        zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
        ((loss, grads), _), _ = jax.lax.scan(add, (zero, parts), length=optim.accumulate)
        return loss, total, grads

    def step(state: State, batch: Batch, frozen: Any = None) -> tuple[State, dict[str, Array]]:
        loss, tokens, grads = gradients(state["params"], frozen, batch)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        first = state["loss_mean"] == 0.0  # no step has been applied yet
        if optim.spike_factor:
            trusted = (state["step"] >= SPIKE_WARMUP) & ~first
            good &= ~(trusted & (loss > optim.spike_factor * state["loss_mean"]))
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
        mean = jnp.where(first, loss, 0.95 * state["loss_mean"] + 0.05 * loss)
        new = {
            "params": keep(params, state["params"]),
            "opt_state": keep(opt_state, state["opt_state"]),
            "step": state["step"] + 1,
            "skipped": state["skipped"] + (~good).astype(jnp.int32),
            "loss_mean": jnp.where(good, mean, state["loss_mean"]),
            "rng": state["rng"],
        }
        numbers = {
            "loss": loss,
            "grad_norm": norm,
            "lr": jnp.asarray(schedule(state["step"])),
            "tokens": tokens,
            "applied": good,
            "skipped": new["skipped"],
        }
        return new, numbers

    return jax.jit(step, donate_argnums=0)
