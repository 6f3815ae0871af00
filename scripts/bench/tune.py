"""Block sizes of this device's kernels by measurement, into `pallas_kernels/blocks/<device kind>.json`.

    python -m scripts.bench.tune [--only flash] [--rounds 5]

Every candidate runs forward and backward on a short and a long shape of the head dim it is tuned for; candidates take
turns. The least time relative to the default's, in the mean over both shapes, wins if it is better by more than
`MARGIN`. What does not compile (too large for the chip's memory) is left out. The file keeps all timings, versions
and the seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track

from jaxattn.command import run_cli
from jaxattn.errors import UserError
from jaxattn.masks import self_visibility
from jaxattn.runs.rundir import result_environment, write_json_atomic
from pallas_kernels import Score
from pallas_kernels._blocks import FOLDER, table_name
from pallas_kernels.flash.tpu import flash_tpu
from pallas_kernels.flash.xla import BLOCK_Q, CHUNK_K, flash_xla
from pallas_kernels.shapes import Shape
from scripts.bench.kernels.cases import SEED, bound, gradient, inputs
from scripts.bench.timing import interleaved
from scripts.outputs import file_to_write

MARGIN = 0.03
DIMS = (64, 128)
Sizes = tuple[tuple[str, int], ...]


def candidates(platform: str) -> dict[str, tuple[Sizes, list[Sizes], Callable[[Shape, Sizes], Callable[..., Any]]]]:
    """Per op/backend: the default, what else to try, and shape and sizes -> a function of q, k, v."""
    grid = lambda **axes: [tuple(zip(axes, values, strict=True)) for values in product(*axes.values())]

    def attention(run: Callable[..., Any]) -> Callable[[Shape, Sizes], Callable[..., Any]]:
        def make(shape: Shape, sizes: Sizes) -> Callable[..., Any]:
            vis = self_visibility(shape.batch, shape.length)
            return lambda q, k, v: run(q, k, v, vis, Score(), scale=shape.dim**-0.5, **dict(sizes))

        return make

    if platform == "tpu":
        default = (("block_q", 512), ("block_k", 512))
        tried = grid(block_q=(256, 512, 1024), block_k=(256, 512, 1024))
        return {"flash/tpu": (default, tried, attention(flash_tpu))}
    default = (("block_q", BLOCK_Q), ("chunk_k", CHUNK_K))
    tried = grid(block_q=(64, 128, 256, 512), chunk_k=(512, 1024, 2048))
    return {"flash/xla": (default, tried, attention(flash_xla))}


def tune(default: Sizes, tried: list[Sizes], make: Callable[..., Any], shapes: list[Shape], rounds: int, dtype: Any):
    """The best sizes, and the median seconds of every candidate on every shape (one that does not fit is absent)."""
    candidates = {json.dumps(dict(sizes)): sizes for sizes in [default, *tried]}
    usual, medians = json.dumps(dict(default)), {}
    for shape in shapes:
        arrays, calls = inputs(shape, dtype), {}
        for name, sizes in candidates.items():
            function = make(shape, sizes)
            call = bound(lambda q, k, v, f=function: (f(q, k, v), gradient(f)(q, k, v)), *arrays)
            try:
                jax.block_until_ready(call())
            except jax.errors.JaxRuntimeError:
                continue  # does not fit on the chip
            calls[name] = call
        if usual not in calls:
            raise UserError(f"the default block sizes {usual} do not compile for {shape.name} on this device.")
        seconds = interleaved(calls, rounds)
        medians[shape.name] = {name: statistics.median(s) for name, s in seconds.items()}
    fitting = [name for name in candidates if all(name in found for found in medians.values())]
    relative = {n: statistics.mean(found[n] / found[usual] for found in medians.values()) for n in fitting}
    best = min(relative, key=lambda name: relative[name])
    return dict(candidates[best if relative[best] < 1 - MARGIN else usual]), medians


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="", help="ops whose name contains this")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    args = parser.parse_args()
    if args.rounds < 1:
        raise UserError(f"--rounds is {args.rounds} but must be at least 1.")
    platform, kind = jax.default_backend(), jax.devices()[0].device_kind
    found = {name: what for name, what in candidates(platform).items() if args.only in name}
    if not found:
        raise UserError(f"--only is {args.only!r} but {platform} has {', '.join(candidates(platform))}.")
    dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    lengths = (512, 2048) if platform == "cpu" else (2048, 16384)
    tokens, heads = (2048, 512) if platform == "cpu" else (16384, 2048)
    of_dim = lambda d: [Shape(f"T{n}_D{d}", tokens // n, n, heads // d, heads // 2 // d, d, d) for n in lengths]
    path = file_to_write(FOLDER / table_name(kind), "install the library where you may write")
    table = json.loads(path.read_text("utf-8")) if path.is_file() else {"blocks": {}, "measured": {}}
    jobs = [(name, dim) for name in found for dim in DIMS]
    for name, dim in track(jobs, "tuning", console=Console(stderr=True)):
        best, medians = tune(*found[name], of_dim(dim), args.rounds, dtype)
        table["blocks"].setdefault(name, {})[str(dim)] = best
        table["measured"].setdefault(name, {})[str(dim)] = {
            "shapes": [vars(s) for s in of_dim(dim)],
            "seconds": medians,
        }
        print(f"{name} D={dim}: {best}", flush=True)
    write_json_atomic(path, table | {"seed": SEED, "rounds": args.rounds, "environment": result_environment()})
    print(path.name)
    return 0


if __name__ == "__main__":
    run_cli(main)
