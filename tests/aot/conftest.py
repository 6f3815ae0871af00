"""Chips that programs are compiled for, ahead of time and without one."""

from __future__ import annotations

import importlib.util
import os

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from pallas_kernels._ahead import QUIET, tpu_devices

# What most tests cross with; a test that names others (v4, tpu7x) parametrizes `chip` itself, indirect=True.
CHIPS = ("v5e", "v5p", "v6e")


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
    return tpu_devices(request.param)[0]
