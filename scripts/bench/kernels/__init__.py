"""Kernels against their rivals, in one interleaved run: `python -m scripts.bench.kernels`."""
