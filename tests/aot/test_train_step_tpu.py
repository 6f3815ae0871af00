"""The whole pretraining step of every mechanism compiles for a TPU with its kernel in it, on one chip and on four."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxattn.mechanisms import names
from jaxattn.runs.config import RunConfig
from pallas_kernels import compiling_for, recording
from train.mesh import inside
from train.presets import get_preset
from train.step import init_state, make_train_step


def compiled(attn: str, devices: list) -> tuple[dict, str]:
    """Backends that ops got, and the compiled program of a step on 256 tokens a row."""
    preset = get_preset("bb")
    model = preset.model.with_attention(attn)
    model = dataclasses.replace(model, vocab_size=64, num_layers=1, d_model=128, num_heads=2, position="nope")
    cfg: RunConfig = dataclasses.replace(preset, model=model)
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    place = lambda split: lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, split))
    state = jax.eval_shape(lambda: init_state(model, cfg.optim, cfg.steps, 0))
    tokens = jax.ShapeDtypeStruct((8, 256), jnp.int32)
    batch = dict.fromkeys(("tokens", "positions", "segment_ids", "targets"), tokens)
    batch["loss_mask"] = jax.ShapeDtypeStruct(tokens.shape, jnp.bool_)
    state, batch = jax.tree.map(place(PartitionSpec()), state), jax.tree.map(place(PartitionSpec("data")), batch)
    with compiling_for("tpu"), recording() as choices, inside(mesh):
        lowered = make_train_step(model, cfg.optim, cfg.steps).lower(state, batch)
    return choices, lowered.compile().as_text()


@pytest.mark.parametrize("chip", ["v5e"], indirect=True)
@pytest.mark.parametrize("attn", names())
def test_the_step_of_every_mechanism_holds_its_kernel(chip, attn):
    choices, text = compiled(attn, [chip])
    assert all(set(got) == {"tpu"} for got in choices.values()), choices
    assert text.count("tpu_custom_call") >= 2, "forward and backward"


@pytest.mark.parametrize("chip", ["v5e"], indirect=True)
def test_a_batch_split_over_four_chips_keeps_its_kernels(chip):
    devices = list(chip.client.devices())
    assert len(devices) == 4
    _, text = compiled("softmax", devices)
    assert text.count("tpu_custom_call") >= 3
