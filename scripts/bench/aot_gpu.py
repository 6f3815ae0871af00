"""What the compiler for H100s says of the GPU kernels, without a GPU: registers, spills, shared memory, instructions.

    python -m scripts.bench.aot_gpu [--out FOLDER]

Needs Python 3.12, JAX 0.11 or newer, and the packages jax-cuda13-plugin and jax-cuda13-pjrt of the same version.
Nothing runs, so there is no time in this table.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track

from jaxattn.command import run_cli
from jaxattn.errors import UserError, writing
from jaxattn.runs.rundir import result_environment, write_json_atomic
from pallas_kernels import compiling_for
from pallas_kernels.shapes import Shape
from pallas_kernels.typical_calls import CALLS, Call
from scripts.bench import h100
from scripts.outputs import REMEDY, folder_to_write

RESULTS = Path("scripts/bench/results")
LENGTH, HEADS, KV_HEADS = 4096, 4, 2
DIMS = (64, 128, 192)
PLUGIN = "jax-cuda13-plugin"


def refusal(call: Call) -> str:
    """Why the GPU backend does not serve a call; empty where it does."""
    try:
        with compiling_for("gpu"):
            jax.eval_shape(call.run("gpu"), *call.arguments)
    except NotImplementedError as error:
        return str(error)
    return ""


def measure(call: Call) -> list[dict[str, Any]]:
    """The kernels of the forward pass and of the backward pass; of several calls of one, the most of each number."""
    arguments = [h100.struct(x.shape, x.dtype) for x in call.arguments]
    found: dict[str, Any] = {}
    for function in (call.run("gpu"), *([call.gradient("gpu")] if call.differentiable else [])):
        for kernel in h100.compiled(function, *arguments)[1]:
            new = dataclasses.asdict(kernel)
            before = found.get(kernel.name, new)
            found[kernel.name] = {field: max(before[field], value) for field, value in new.items()}
    return list(found.values())


def markdown(result: dict[str, Any]) -> str:
    """The table, with what it can and cannot tell."""
    lines = [
        "# GPU kernels compiled for an H100 (sm_90a), ahead of time",
        "",
        f"B 1, T {LENGTH}, H {HEADS}, K {KV_HEADS}, bfloat16; jax {result['environment']['versions']['jax']}, "
        f"{PLUGIN} {result['plugin']}. Registers are per thread, wgmma and TMA are instructions in the program text, "
        f"shared memory may be {h100.SHARED_BYTES:,} B. Where wide heads take several calls of a kernel, the most of "
        "each. Nothing ran: speed is not measured.",
        "",
        "| op | head dim | kernel | registers | spilled, B | shared memory, B | wgmma | TMA |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        for kernel in row["kernels"]:
            lines.append(
                f"| {row['op']} | {row['dim']} | {kernel['name']} | {kernel['registers']} | {kernel['spill_bytes']} "
                f"| {kernel['shared_bytes']:,} | {kernel['wgmma']} | {kernel['tma']} |"
            )
        if reason := row["refused"]:
            lines.append(f"| {row['op']} | {row['dim']} | – | {reason} | | | | |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.aot_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    args = parser.parse_args()
    folder_to_write(args.out)
    if reason := h100.missing():
        raise UserError(f"{reason}: see the head of this file for what is needed.")
    jax.config.update("jax_platforms", "cpu")
    rows = []
    for name, make in track(CALLS.items(), "compiling", console=Console(stderr=True)):
        for dim in DIMS:
            call = make(Shape("table", 1, LENGTH, HEADS, KV_HEADS, dim, dim), jnp.bfloat16)
            reason = refusal(call)
            rows.append({"op": name, "dim": dim, "refused": reason, "kernels": [] if reason else measure(call)})
    plugin = importlib.metadata.version(PLUGIN)
    result = {"target": "H100, sm_90a", "rows": rows, "plugin": plugin, "environment": result_environment()}
    print(markdown(result))
    with writing(args.out, REMEDY):
        write_json_atomic(args.out / "aot_gpu.json", result)
        (args.out / "aot_gpu.md").write_text(markdown(result), "utf-8")
    return 0


if __name__ == "__main__":
    run_cli(main)
