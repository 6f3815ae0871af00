"""What the compiler for H100s says of the GPU kernels, without a GPU: registers, spills, shared memory, instructions.

    python -m scripts.bench.aot_gpu [--out FOLDER]

Needs Python 3.12, JAX 0.11 or newer, and the packages jax-cuda13-plugin and jax-cuda13-pjrt of the same version.
Nothing runs, so there is no time in this table.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track

from jaxattn.errors import UserError, run_cli
from jaxattn.masks import self_visibility
from pallas_kernels import Score, flash
from pallas_kernels.linear_scan import linear_scan
from tests.aot import h100
from train.rundir import result_environment, write_json_atomic

RESULTS = Path("scripts/bench/results")
LENGTH, HEADS, KV_HEADS = 4096, 4, 2
DIMS = (64, 128)
PLUGIN = "jax-cuda13-plugin"


def _flash(score: Score, causal: bool) -> Callable[..., Any]:
    return lambda q, k, v: flash(q, k, v, self_visibility(1, LENGTH, causal=causal), score, scale=0.1, backend="gpu")


def _linear(q: Any, k: Any, v: Any) -> Any:
    return linear_scan(q, k, v, log_decay=jnp.full((HEADS,), -0.01), backend="gpu")[0]


CALLS: Mapping[str, Callable[..., Any]] = {
    "flash, softmax, causal": _flash(Score(), True),
    "flash, softmax, full": _flash(Score(), False),
    "flash, sigmoid, causal": _flash(Score("sigmoid", "none", logit_bias=-8.0), True),
    "linear_scan, decay per head": _linear,
}


def measure(call: Callable[..., Any], dim: int) -> list[dict[str, Any]]:
    """Rows of the table: the kernels of the forward and backward pass."""
    struct = lambda heads: h100.struct((1, LENGTH, heads, dim), jnp.bfloat16)
    loss = lambda *arrays: jnp.sum(call(*arrays).astype(jnp.float32))
    arguments, found = (struct(HEADS), struct(KV_HEADS), struct(KV_HEADS)), {}
    for function in (call, jax.grad(loss, argnums=(0, 1, 2))):
        found |= {kernel.name: dataclasses.asdict(kernel) for kernel in h100.compiled(function, *arguments)[1]}
    return list(found.values())


def markdown(result: dict[str, Any]) -> str:
    """The table, with what it can and cannot tell."""
    lines = [
        "# GPU kernels compiled for an H100 (sm_90a), ahead of time",
        "",
        f"B 1, T {LENGTH}, H {HEADS}, K {KV_HEADS}, bfloat16; jax {result['environment']['versions']['jax']}, "
        f"{PLUGIN} {result['plugin']}. Registers are per thread, wgmma and TMA are instructions in the program text, "
        f"shared memory may be {h100.SHARED_BYTES:,} B. Nothing ran: speed is not measured.",
        "",
        "| call | head dim | kernel | registers | spilled, B | shared memory, B | wgmma | TMA |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        for kernel in row["kernels"]:
            lines.append(
                f"| {row['call']} | {row['dim']} | {kernel['name']} | {kernel['registers']} | {kernel['spill_bytes']} "
                f"| {kernel['shared_bytes']:,} | {kernel['wgmma']} | {kernel['tma']} |"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.aot_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    args = parser.parse_args()
    if reason := h100.missing():
        raise UserError(f"{reason}: see the head of this file for what is needed.")
    jax.config.update("jax_platforms", "cpu")
    rows = [
        {"call": name, "dim": dim, "kernels": measure(call, dim)}
        for name, call in track(CALLS.items(), "compiling", console=Console(stderr=True))
        for dim in DIMS
    ]
    plugin = importlib.metadata.version(PLUGIN)
    result = {"target": "H100, sm_90a", "rows": rows, "plugin": plugin, "environment": result_environment()}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(args.out / "aot_gpu.json", result)
    (args.out / "aot_gpu.md").write_text(markdown(result), "utf-8")
    print(markdown(result))
    return 0


if __name__ == "__main__":
    run_cli(main)
