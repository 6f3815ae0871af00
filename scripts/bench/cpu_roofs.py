"""What bounds a model on this CPU: the best product that anybody here makes, and the best rate of reading memory.

Each library is asked at the model's own shapes in a process of its own, one at a time, before and behind what is
bounded; of all samples the best counts.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Shape = tuple[int, int, int]  # rows of x, and what is between x [m, k] and w [k, n]
LIBRARIES = ("XLA", "NumPy", "PyTorch")
SAMPLES = 5


def products(dtype: str, shapes: Mapping[Shape, int]) -> dict[str, float]:
    """FLOP/s of a sequence of products by each library that is installed.

    Args:
      shapes: how often each product occurs.
    """
    found, context = {}, mp.get_context("spawn")
    for library in LIBRARIES:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(library, dtype, dict(shapes), theirs), daemon=True)
        process.start()
        theirs.close()
        try:
            rate = ours.recv()
        except EOFError:  # it is not installed, or cannot multiply this
            rate = None
        process.join()
        if rate:
            found[library] = rate
    return found


def _serve(library: str, dtype: str, shapes: dict[Shape, int], pipe: Any) -> None:
    makers = {"XLA": _xla, "NumPy": _numpy, "PyTorch": _torch}
    try:
        make = makers[library](dtype)
    except (ImportError, NotImplementedError):
        return
    seconds = sum(times * _least(make(shape)) for shape, times in shapes.items())
    pipe.send(sum(2 * m * k * n * times for (m, k, n), times in shapes.items()) / seconds)


def _least(call: Callable[[], Any]) -> float:
    call()
    return min(_seconds(call) for _ in range(SAMPLES))


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _drawn(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    draw, (m, k, n) = np.random.default_rng(0), shape
    return draw.standard_normal((m, k), np.float32), draw.standard_normal((k, n), np.float32)


def _numpy(dtype: str) -> Callable[[Shape], Callable[[], Any]]:
    if dtype != "float32":
        raise NotImplementedError

    def make(shape: Shape) -> Callable[[], Any]:
        x, w = _drawn(shape)
        return lambda: x @ w

    return make


def _torch(dtype: str) -> Callable[[Shape], Callable[[], Any]]:
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))

    def make(shape: Shape) -> Callable[[], Any]:
        x, w = (torch.from_numpy(a).to(getattr(torch, dtype)) for a in _drawn(shape))
        w = w.T.contiguous()  # as its linear layers hold it

        def call() -> Any:
            with torch.inference_mode():
                return torch.nn.functional.linear(x, w)

        return call

    return make


def _xla(dtype: str) -> Callable[[Shape], Callable[[], Any]]:
    import jax
    import jax.numpy as jnp

    def make(shape: Shape) -> Callable[[], Any]:
        x, w = (jnp.asarray(a, dtype) for a in _drawn(shape))
        multiply = jax.jit(lambda x, w: x @ w)
        return lambda: multiply(x, w).block_until_ready()

    return make


def read_bandwidth(threads: int, megabytes: int = 256) -> float:
    """Bytes a second at which `threads` threads read arrays far larger than the caches; the best of some."""
    arrays = [np.ones(megabytes * 2**20 // 4, np.float32) for _ in range(threads)]

    def read() -> None:
        readers = [threading.Thread(target=a.max) for a in arrays]  # releases the GIL
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()

    return sum(a.nbytes for a in arrays) / _least(read)


def best(measured: Mapping[str, Sequence[float]], reached: Mapping[str, float]) -> tuple[float, str]:
    """The highest rate and whose it is: of those measured by themselves, or of a contender that came higher still."""
    rates = {name: max(samples) for name, samples in measured.items()} | {
        name: rate for name, rate in reached.items() if rate > max(map(max, measured.values()), default=0.0)
    }
    name = max(rates, key=lambda name: rates[name])
    return rates[name], name
