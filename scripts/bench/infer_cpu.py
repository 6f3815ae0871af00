"""Prefill and decode tokens/s on this CPU against transformers, plain PyTorch and llama.cpp, one interleaved run.

    python -m scripts.bench.infer_cpu [--dtype float32 bfloat16] [--rounds 5] [--out FILE.json]

Needs the extras `verify` and `cpu`; llama.cpp is measured where the package llama-cpp-python is installed
(`pip install llama-cpp-python` compiles it). The model is SmolLM2-135M-Instruct (`scripts.get`), one prompt
of 512 tokens, 128 greedy tokens behind it. Every contender is a process of its own that keeps its model; they are
asked in turn, the order reversed each round. Before anything is timed, their greedy tokens must agree: all of them in
f32, and the first in bf16, where ties between close logits fall differently. Quote ratios: times on a shared machine
mean little. Decoding reads every weight once a token, so bytes over memory bandwidth bound it; prefill is bound by the
rate of products. Both are measured before and behind the contenders (`cpu_roofs`), products by every library at the
model's shapes, and the highest rate of all is the roof, also where a contender came by it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import multiprocessing as mp
import os
import statistics
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from jaxattn.command import run_cli
from jaxattn.errors import UserError, writing
from jaxattn.runs.rundir import result_environment, write_json_atomic
from scripts.bench import cpu_roofs
from scripts.bench.alive import alive
from scripts.bench.infer_contenders import MAKERS, OURS
from scripts.bench.infer_plot import plot
from scripts.outputs import REMEDY, file_to_write

PROMPT, NEW = 512, 128
LAYERS = 30
KERNELS = {(PROMPT, 576, 576): 2, (PROMPT, 576, 192): 2, (PROMPT, 576, 1536): 2, (PROMPT, 1536, 576): 1}  # of a layer
ATTENTION = 4 * 576 * (PROMPT / 2)  # FLOP of a token in a layer, causal
FLOP_PER_TOKEN = LAYERS * (sum(2 * k * n * times for (_, k, n), times in KERNELS.items()) + ATTENTION)
AGREE = {"float32": NEW, "bfloat16": 1}  # greedy tokens every contender must share
TORCH = ("transformers", "torch eager", "torch.compile")
BARS = {  # ours over the best of those
    ("float32", "prefill", TORCH): 1.5,
    ("bfloat16", "prefill", TORCH): 1.0,
    ("float32", "prefill", ("llama.cpp",)): 1.1,
    ("float32", "decode", TORCH): 1.4,
    ("bfloat16", "decode", TORCH): 1.4,
    ("float32", "decode", ("llama.cpp",)): 0.7,
    ("bfloat16", "decode", ("llama.cpp",)): 0.7,
}


def worker(name: str, dtype: str, files: dict[str, str], pipe: Connection) -> None:
    """Serve rounds: receives a prompt, answers (prefill seconds, decode seconds, tokens); None ends it."""
    answer = MAKERS[name](dtype, files, PROMPT + NEW)
    while (prompt := pipe.recv()) is not None:
        pipe.send(answer(prompt, NEW))


def prepare(folder: Path, dtype: str) -> dict[str, str]:
    """The same weights as our checkpoint, a HuggingFace folder and a GGUF file of this precision."""
    from scripts.bench._gguf_copy import copy_as
    from scripts.get import fetch

    source = fetch("smollm2")
    run = lambda module, *args: subprocess.run([sys.executable, "-m", module, *map(str, args)], check=True)
    ours, theirs, gguf = folder / "ours", folder / "hf", folder / f"{dtype}.gguf"
    if not ours.exists():
        run("convert.from_hf", source, ours)
        run("convert.to_hf", ours, theirs)
    if not gguf.exists():
        copy_as(source, gguf, dtype)
    return {"ours": str(ours), "hf": str(theirs), "gguf": str(gguf)}


def contenders() -> tuple[list[str], dict[str, str]]:
    """Names that can run here, and why others cannot."""
    needs = {"transformers": "torch", "torch eager": "torch", "torch.compile": "torch", "llama.cpp": "llama_cpp"}
    absent = {
        name: f"not measured: {package} is not installed"
        for name, package in needs.items()
        if importlib.util.find_spec(package) is None
    }
    return [name for name in MAKERS if name not in absent], absent


def measure(dtype: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Start every contender, check that their tokens agree, then time them in turn."""
    names, absent = contenders()
    files = prepare(folder, dtype)
    prompts = np.random.default_rng(0).integers(100, 40_000, (rounds + 2, PROMPT)).tolist()
    context, pipes, processes = mp.get_context("spawn"), {}, []
    for name in names:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=worker, args=(name, dtype, files, theirs), daemon=True))
        processes[-1].start()
        theirs.close()

    def ask(name: str, prompt: list[int]) -> tuple[float, float, list[int]]:
        with alive(name):
            pipes[name].send(prompt)
            return pipes[name].recv()

    agree = {}
    for prompt in prompts[:2]:  # the first compiles
        found = {name: ask(name, prompt)[2] for name in names}
        for name in names:
            same = [a == b for a, b in zip(found[name], found[OURS], strict=True)]
            agree[name] = same.index(False) if False in same else len(same)
            if agree[name] < AGREE[dtype]:
                raise UserError(
                    f"{name} and {OURS} part at greedy token {agree[name]} in {dtype}; nothing was timed "
                    f"({found[name][:8]} against {found[OURS][:8]})."
                )
    seconds: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in names}
    for r, prompt in enumerate(prompts[2:]):
        for name in names if r % 2 == 0 else reversed(names):
            prefill, decode, _ = ask(name, prompt)
            seconds[name]["prefill"].append(prefill)
            seconds[name]["decode"].append(decode)
        last = {name: (PROMPT / s["prefill"][-1], NEW / s["decode"][-1]) for name, s in seconds.items()}
        line = "  ".join(f"{name} {a:,.0f}/{b:.1f}" for name, (a, b) in last.items())
        print(f"{dtype} round {r + 1}/{rounds} (prefill/decode tok/s): {line}", flush=True)
    for name, process in zip(names, processes, strict=True):
        with alive(name):
            pipes[name].send(None)
        process.join(20)
    counts = {"prefill": PROMPT, "decode": NEW}
    speed = {n: {p: counts[p] / statistics.median(x) for p, x in s.items()} for n, s in seconds.items()}
    return {"tokens_per_s": speed, "seconds": seconds, "greedy_tokens_shared": agree, "absent": absent}


def rates(dtype: str, threads: int) -> dict[str, dict[str, float]]:
    """What this machine does now: FLOP/s of the products by library, and bytes a second read."""
    return {"prefill": cpu_roofs.products(dtype, KERNELS), "decode": {"reading": cpu_roofs.read_bandwidth(threads)}}


def roofs(found: dict[str, Any], *measured: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """The highest rate and its tokens/s, of each part; no contender of `found` is faster."""
    out = {}
    for part, cost in (("prefill", FLOP_PER_TOKEN), ("decode", found["weight_bytes"])):
        names = list(dict.fromkeys(name for before in measured for name in before[part]))
        samples = {name: [before[part][name] for before in measured if name in before[part]] for name in names}
        reached = {name: speed[part] * cost for name, speed in found["tokens_per_s"].items()}
        rate, whose = cpu_roofs.best(samples, reached)
        out[part] = {"rate": rate, "whose": whose, "tokens_per_s": rate / cost, "measured": samples}
    return out


def judge(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours over the best of each group, as the median over rounds of that ratio, beside its bar."""
    rows = []
    for (dtype, part, group), bar in BARS.items():
        found = results.get(dtype, {})
        rivals = [n for n in group if n in found.get("seconds", {})]
        if not rivals:
            continue
        best = min(rivals, key=lambda n: statistics.median(found["seconds"][n][part]))
        pairs = zip(found["seconds"][best][part], found["seconds"][OURS][part], strict=True)
        ratios = [a / b for a, b in pairs]
        row = {"dtype": dtype, "part": part, "rival": best, "bar": bar, "ratio": statistics.median(ratios)}
        rows.append(row | {"least": min(ratios), "most": max(ratios), "reached": statistics.median(ratios) >= bar})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.infer_cpu", description=__doc__)
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--out", type=Path, default=Path("scripts/bench/results/infer_cpu.json"))
    args = parser.parse_args()
    if args.rounds < 1:
        raise UserError(f"--rounds is {args.rounds} but must be at least 1.")
    file_to_write(args.out)
    threads = len(os.sched_getaffinity(0))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in args.dtype:
            before = rates(dtype, threads)
            results[dtype] = measure(dtype, args.rounds, Path(folder))
            size = Path(folder, f"{dtype}.gguf").stat().st_size
            results[dtype] |= {"weight_bytes": size}
            results[dtype]["roofs"] = roofs(results[dtype], before, rates(dtype, threads))
    bars = judge(results)
    for dtype, found in results.items():
        for part, unit in (("prefill", "GFLOP/s"), ("decode", "GB/s")):
            roof = found["roofs"][part]
            rate = f"{roof['rate'] / 1e9:.1f} {unit} ({roof['whose']})"
            print(f"{dtype}: {part} is bound by {roof['tokens_per_s']:,.0f} tok/s at {rate}")
        for name, speed in found["tokens_per_s"].items():
            print(f"  {name:14} prefill {speed['prefill']:8,.0f}  decode {speed['decode']:7.1f} tok/s")
        for name, why in found["absent"].items():
            print(f"  {name:14} {why}")
    for row in bars:
        verdict = "reached" if row["reached"] else "NOT reached"
        print(
            f"{row['dtype']} {row['part']} / {row['rival']}: {row['ratio']:.2f} "
            f"({row['least']:.2f} to {row['most']:.2f}), bar {row['bar']}: {verdict}"
        )
    packages = ("torch", "transformers", "llama-cpp-python", "numba")
    versions = {p: importlib.metadata.version(p) for p in packages if _installed(p)}
    summary = {"model": "SmolLM2-135M-Instruct", "prompt": PROMPT, "new": NEW, "threads": threads}
    summary |= {"bars": bars, "versions": versions}
    with writing(args.out, REMEDY):
        write_json_atomic(args.out, summary | {"results": results, "environment": result_environment()})
        plot(args.out.with_suffix(".png"), results)
    return 0 if all(row["reached"] for row in bars) else 1


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    run_cli(main)
