"""Training tokens/s of jaxattn against PyTorch on this CPU, f32, one interleaved run.

    python -m scripts.bench.train_cpu [--rounds 8] [--out scripts/bench/results/train_cpu.json]

Needs the extra `bench`. Every contender is a process of its own that keeps its model; they are asked for
steps in turn, the order reversed each round. Weights and batches are the same, and the losses must agree
before anything is timed. Quote the ratio: single times on a shared machine mean little.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing as mp
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from jaxattn.command import run_cli
from jaxattn.errors import UserError, writing
from jaxattn.runs.rundir import result_environment, write_json_atomic
from scripts.bench.alive import alive
from scripts.bench.train_shape import Shape
from scripts.outputs import REMEDY, file_to_write

RIVALS = ("torch eager", "torch.compile")
OURS = "jaxattn"
WARM, STEPS = 3, 2


def make_ours(shape: Shape) -> tuple[Callable[[int], float], dict[str, Any]]:
    """The library's own training step (`train.step`), micro-batched, and its initial parameters."""
    import jax
    import jax.numpy as jnp

    from jaxattn.masks import default_positions
    from jaxattn.models import ModelConfig
    from jaxattn.runs.config import OptimConfig
    from train.step import init_state, make_train_step

    model = ModelConfig(
        vocab_size=shape.vocab,
        num_layers=shape.layers,
        d_model=shape.width,
        num_heads=shape.heads,
        d_ff=shape.feed_forward,
        norm_eps=shape.norm_eps,
        rope_base=shape.rope_base,
        tie_embeddings=True,
        init="normal",
    )
    optim = OptimConfig(
        lr=shape.lr,
        b1=shape.b1,
        b2=shape.b2,
        eps=shape.eps,
        weight_decay=shape.weight_decay,
        clip_norm=shape.clip,
        accumulate=4,
    )
    state = init_state(model, optim, 1000, shape.seed)
    params = jax.tree.map(np.array, state["params"])
    train_step = make_train_step(model, optim, 1000)
    ids = jnp.ones((shape.batch_size, shape.context), jnp.int32)
    fixed = {
        "positions": default_positions(shape.batch_size, shape.context),
        "segment_ids": ids,
        "loss_mask": ids.astype(bool),
    }

    def step(i: int) -> float:
        nonlocal state
        x, y = shape.batch(i)
        state, numbers = train_step(state, {"tokens": jnp.asarray(x), "targets": jnp.asarray(y), **fixed})
        return float(numbers["loss"])

    return step, params


def worker(name: str, shape: Shape, pipe: Connection) -> None:
    """Serve steps: receives a step number, answers (seconds, loss); None ends it."""
    if name == OURS:
        step, _ = make_ours(shape)
    else:
        from scripts.bench import torch_decoder

        step = torch_decoder.make(shape, pipe.recv(), compiled=name == "torch.compile")
    while (i := pipe.recv()) is not None:
        start = time.perf_counter()
        loss = step(i)
        pipe.send((time.perf_counter() - start, loss))


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    """Start every contender, check that losses agree, then time them in turn."""
    context = mp.get_context("spawn")
    names = (*RIVALS, OURS)
    pipes: dict[str, Connection] = {}
    processes = []
    _, params = make_ours(shape)
    for name in names:
        mine, theirs = context.Pipe()
        process = context.Process(target=worker, args=(name, shape, theirs), daemon=True)
        process.start()
        theirs.close()  # else nobody would hear that the process has ended
        processes.append(process)
        pipes[name] = mine
        if name != OURS:
            with alive(name):
                mine.send(params)

    def ask(name: str, i: int) -> tuple[float, float]:
        with alive(name):
            pipes[name].send(i)
            return pipes[name].recv()

    losses = {name: [ask(name, i)[1] for i in range(WARM)] for name in names}
    for name in RIVALS:
        if not np.allclose(losses[name], losses[OURS], rtol=2e-4):
            raise UserError(f"{name} and {OURS} disagree on the loss: {losses[name]} against {losses[OURS]}.")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    step = WARM
    for r in range(rounds):
        for name in names if r % 2 == 0 else reversed(names):
            seconds[name].append(sum(ask(name, step + j)[0] for j in range(STEPS)) / STEPS)
        step += STEPS
        best = {name: shape.tokens / s[-1] for name, s in seconds.items()}
        print(
            f"round {r + 1}/{rounds}: " + "  ".join(f"{k} {v:,.0f} tok/s" for k, v in best.items()),
            flush=True,
        )
    for name, process in zip(names, processes, strict=True):
        with alive(name):
            pipes[name].send(None)
        process.join(10)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    rival = min(RIVALS, key=medians.__getitem__)
    ratios = [a / b for a, b in zip(seconds[rival], seconds[OURS], strict=True)]
    return {
        "shape": dataclasses.asdict(shape),
        "rounds": rounds,
        "losses": losses,
        "seconds_per_step": seconds,
        "tokens_per_s": {name: shape.tokens / s for name, s in medians.items()},
        "best_rival": rival,
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.train_cpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="timed rounds")
    parser.add_argument("--out", type=Path, default=Path("scripts/bench/results/train_cpu.json"))
    args = parser.parse_args()
    if args.rounds < 1:
        raise UserError(f"--rounds is {args.rounds} but must be at least 1.")
    file_to_write(args.out)
    try:
        import torch
    except ImportError as error:
        raise UserError("train_cpu needs torch; pip install -e '.[bench]'.") from error
    result = measure(Shape(), args.rounds)
    for name, speed in result["tokens_per_s"].items():
        print(f"{name:15} {speed:8,.0f} tokens/s")
    print(
        f"jaxattn / {result['best_rival']}: {result['ratio_median']:.2f} "
        f"(rounds {result['ratio_min']:.2f} to {result['ratio_max']:.2f})"
    )
    print(json.dumps({"ratio": round(result["ratio_median"], 3)}))
    with writing(args.out, REMEDY):
        write_json_atomic(args.out, result | {"torch": torch.__version__, "environment": result_environment()})
    return 0


if __name__ == "__main__":
    run_cli(main)
