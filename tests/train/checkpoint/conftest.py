"""A tiny training state, a data iterator, and a worker process that can be killed."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxattn.runs.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[3]
CONFIG = {"model": {"d": 8, "layers": 2, "tie": True}, "attn": "sigmoid"}


@functools.cache  # arrays are immutable, and the tests compare with these hundreds of times
def make_state(seed: int = 0):
    rng = np.random.default_rng(seed)
    params = {"embed": jnp.zeros((7, 8)), "blocks": [{"w": jnp.zeros((8, 8), jnp.bfloat16)}]}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    params, opt_state = jax.tree.map(  # numbers made by numpy: nothing to compile
        lambda x: jnp.asarray(rng.standard_normal(x.shape).astype(x.dtype)), (params, optimizer.init(params))
    )
    return {
        "params": params,
        "opt_state": opt_state,
        "rng": jnp.asarray(rng.integers(0, 1 << 32, 2, np.uint32)),
        "step": seed,
        "loss_scale": 0.1,
        "gain": jnp.asarray(0.3),  # weakly typed: must not come back as a strong float32
    }


def make_data():
    dataset = grain.MapDataset.source(np.arange(50)).shuffle(3).repeat().batch(2)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def abstract(tree):
    def one(x):
        if not isinstance(x, jax.Array):
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding, weak_type=x.weak_type)

    return jax.tree.map(one, tree)


def assert_same(left, right):
    """Equal to the bit, leaf by leaf, in type, dtype and weak type."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
        assert type(x) is type(y), path
        if isinstance(x, jax.Array):
            assert (x.dtype, x.shape, x.weak_type) == (y.dtype, y.shape, y.weak_type), path
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path
        else:
            assert x == y, path


class Kit:
    """What the tests share; a fixture, since test modules cannot import each other."""

    ROOT, CONFIG = ROOT, CONFIG
    make_state, make_data = staticmethod(make_state), staticmethod(make_data)
    abstract, assert_same = staticmethod(abstract), staticmethod(assert_same)

    @staticmethod
    def start(mode: str, *words, env: dict | None = None, **options) -> subprocess.Popen:
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), mode, *map(str, words)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **(env or {})}
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, **options
        )

    @staticmethod
    def run(mode: str, *words, env: dict | None = None) -> tuple[int, str]:
        process = Kit.start(mode, *words, env=env)
        out, _ = process.communicate(timeout=120)
        return process.returncode, out


@pytest.fixture
def kit():
    return Kit


@pytest.fixture
def two_steps(tmp_path):
    """A directory with steps 1 and 2, the data iterator one and two batches on."""
    data = make_data()
    with Checkpoints(tmp_path / "ck", config=CONFIG) as checkpoints:
        for step in (1, 2):
            next(data)
            checkpoints.save(step, make_state(step), data)
    return tmp_path / "ck"
