"""`python -m pallas_kernels`: which backend of which op serves what, and why not."""

from __future__ import annotations

import jax

from jaxattn.command import run_cli
from pallas_kernels._support import markdown


def main() -> int:
    jax.config.update("jax_platforms", "cpu")  # shapes are enough: no accelerator is asked for
    print(markdown(), end="")
    return 0


if __name__ == "__main__":
    run_cli(main)
