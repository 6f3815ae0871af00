"""The pretraining step of every mechanism compiles for an H100, without one, with the kernels of its ops in it.

In bfloat16, which the GPU kernels compute. What a kernel does not serve goes to "xla" with a reason, listed here.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxattn.mechanisms import names
from pallas_kernels import compiling_for, recording
from scripts.bench import h100
from train.presets import get_preset
from train.step import init_state, make_train_step

if reason := h100.missing():
    pytest.skip(reason, allow_module_level=True)


# What the kernels do not serve at a mechanism's defaults.
PLAIN = {
    "titans": "memories of one matrix but start has 2",
}
KERNELS = {
    "softmax": {"flash_forward", "flash_dq", "flash_dk_dv"},
    "lightning": {f"linear_scan_{part}" for part in ("forward", "dq", "dk", "dv")},
}


def step_of(attn: str) -> tuple:
    """The step on 256 tokens a row and the shapes of its arguments."""
    preset = get_preset("bb")
    model = preset.model.with_attention(attn)
    model = dataclasses.replace(
        model, vocab_size=64, num_layers=1, d_model=128, num_heads=2, position="nope", dtype="bfloat16"
    )
    state = jax.eval_shape(lambda: init_state(model, preset.optim, preset.steps, 0))
    tokens = jax.ShapeDtypeStruct((8, 256), jnp.int32)
    batch = dict.fromkeys(("tokens", "positions", "segment_ids", "targets"), tokens)
    batch["loss_mask"] = jax.ShapeDtypeStruct(tokens.shape, jnp.bool_)
    return make_train_step(model, preset.optim, preset.steps), (state, batch)


def choices_of(attn: str) -> dict:
    """Backends that ops got when the step is traced for a GPU, and why."""
    step, arguments = step_of(attn)
    with compiling_for("gpu"), recording() as choices:
        step.trace(*arguments)
    return choices


@pytest.mark.parametrize("attn", names())
def test_the_step_of_every_mechanism_holds_its_kernel(attn):
    (choices,) = choices_of(attn).values()
    if attn in PLAIN:
        assert list(choices) == ["xla"]
        assert PLAIN[attn] in choices["xla"]
    else:
        assert choices == {"gpu": "this is a gpu"}


@pytest.mark.parametrize("attn", ["softmax", "lightning"])
def test_a_whole_step_compiles(attn):
    """Forward, backward and the optimiser, as one program with all kernels of the op."""
    step, arguments = step_of(attn)
    place = lambda x: h100.struct(x.shape, x.dtype)
    _, kernels = h100.compiled(lambda *x: step(*x), *jax.tree.map(place, arguments))
    assert {kernel.name for kernel in kernels} == KERNELS[attn]
    assert not any(kernel.spill_bytes for kernel in kernels)
