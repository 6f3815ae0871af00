"""The folder in which compiled programs are kept between runs."""

from __future__ import annotations

import os

import jax

from jaxattn.places import cache_folder


def prepare_jax() -> None:
    """Keep compiled programs between runs (unless the user chose a place already)."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
