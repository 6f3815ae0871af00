"""Attention of a batch that is split over devices, where kernels cannot be split by the compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import contextlib, dataclasses, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from pallas_kernels import interpreted

rows = int(sys.argv[1])
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
model = ModelConfig(vocab_size=11, num_layers=2, d_model=16, num_heads=2, num_kv_heads=1, backend="tpu",
                    position="alibi", mixers=("softmax(window=9)", "sink_token"), scan_layers=True)
tokens = jax.random.randint(jax.random.key(1), (rows, 20), 0, 11)
segments = jnp.where(jnp.arange(20) < jnp.arange(5, 5 + rows)[:, None], 1, 2)
params = jax.jit(Decoder(dataclasses.replace(model, backend="xla")).init)(jax.random.key(0), tokens)["params"]

def loss(params, tokens, segments):
    logits = Decoder(model).apply({"params": params}, tokens, None, segments)
    return jnp.mean(jnp.sin(logits) * jnp.cos(jnp.arange(logits.size)).reshape(logits.shape))

def gradients(split, context):
    place = (lambda x: jax.device_put(x, NamedSharding(mesh, split))) if split is not None else (lambda x: x)
    with interpreted(), context:
        call = jax.jit(jax.value_and_grad(loss))
        text = call.lower(params, place(tokens), place(segments)).as_text()
        return call(params, place(tokens), place(segments)), "manual_computation" in text

plain, inside = gradients(None, contextlib.nullcontext())
assert not inside
split, inside = gradients(P("data") if rows % 2 == 0 else P(), jax.set_mesh(mesh))
assert inside, "every device attends for its own rows"
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), split, plain)
print("equal")
"""


@pytest.mark.parametrize("rows", [4, 3])
def test_each_device_attends_for_its_rows(rows):
    """Loss and gradients, those of parameters every device shares too; with 3 rows each device does all of them."""
    settings = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # it compiles much and runs little
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(rows)], cwd=ROOT, env=os.environ | settings, capture_output=True, text=True
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
