"""Chips that programs are compiled for, ahead of time and without one."""

from __future__ import annotations

import importlib.util
import os

import jax
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

# What most tests cross with; a test that names others (v4, tpu7x) parametrizes `chip` itself, indirect=True.
CHIPS = ("v5e", "v5p", "v6e")
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
QUIET = {  # for the TPU's compiler: ask no cloud's servers
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@pytest.fixture(autouse=True)
def compiled_as_users_programs_are():
    """These tests read the compiled program; JAX's compilation cache is off, as no client here could load from it."""
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX looks at the setting once a process
    yield
    jax.config.update("jax_enable_compilation_cache", cached)
    compilation_cache.reset_cache()


@pytest.fixture(params=CHIPS)
def chip(request, monkeypatch):
    """One TPU device of the chip, described by its compiler."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no TPU compiler here: libtpu is not installed (extra tpu)")
    for name, value in QUIET.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[request.param]).devices[0]
