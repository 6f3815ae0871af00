"""What the TPU's compiler says of every op, without a TPU: memory, FLOPs and bytes beside the equation's.

    python -m scripts.bench.aot_tpu [--chip v5e] [--length 32768] [--out FOLDER]

Needs the extra `tpu`. Temporaries are the compiler's and exact; the reference's, O(T²) where it holds all scores, are
those of this CPU's compiler, for one head. FLOPs and bytes of a kernel are its own cost estimate, as the compiler
does not look inside; the equation's stand beside them. Nothing runs, so there is no time in this table.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from pallas_kernels._ahead import TOPOLOGIES, tpu_devices
from pallas_kernels.shapes import Shape
from pallas_kernels.typical_calls import CALLS, Call
from scripts.outputs import REMEDY, folder_to_write

RESULTS = Path("scripts/bench/results")
MIB = 2**20


def temporaries(compiled: Any) -> int:
    """Bytes beside arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def kernel_costs(function: Any, arguments: Any) -> dict[str, float]:
    """FLOPs and bytes of all kernels in a program, by their own estimates."""
    total = {"flops": 0.0, "bytes": 0.0, "kernels": 0}

    def visit(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                estimate = equation.params["cost_estimate"]
                total["kernels"] += 1
                total["flops"] += estimate.flops
                total["bytes"] += estimate.bytes_accessed
                continue
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
                if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                    visit(getattr(inner, "jaxpr", inner))

    visit(jax.make_jaxpr(function)(*arguments).jaxpr)
    return total


def measure(call: Call, one_head: Call, device: Any) -> dict[str, Any]:
    """A row of the table: the op's forward and backward pass on the chip and, for one head, its reference here."""
    place = jax.sharding.SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in call.arguments]
    row: dict[str, Any] = {"equation_flops": call.flops, "argument_bytes": call.bytes}
    with compiling_for("tpu"):
        parts = {"forward": call.run("auto")} | ({"backward": call.gradient("auto")} if call.differentiable else {})
        for part, function in parts.items():
            compiled = jax.jit(function).lower(*arguments).compile()
            row[part] = kernel_costs(function, call.arguments) | {"temporaries": temporaries(compiled)}
    plain = jax.jit(call.gradient("xla") if call.differentiable else call.run("xla")).lower(*call.arguments).compile()
    row["xla_cpu"] = temporaries(plain)
    dense = one_head.gradient("reference") if one_head.differentiable else one_head.run("reference")
    reference = jax.jit(dense).lower(*one_head.arguments).compile()
    return row | {"reference_one_head": temporaries(reference)}


def markdown(result: dict[str, Any]) -> str:
    """The table, with what it can and cannot tell."""
    shape = result["shape"]
    lines = [
        f"# Every op compiled for a TPU {result['chip']}, ahead of time",
        "",
        f"B {shape['batch']}, T {shape['length']}, H {shape['heads']}, K {shape['kv_heads']}, D {shape['dim']}, "
        f"bfloat16; jax {result['environment']['versions']['jax']}. Kernels' FLOPs and bytes are their own estimates "
        "(forward, and forward with backward); temporaries are the compiler's; xla's and the reference's (of one head "
        "in f32) are the CPU compiler's, forward with backward. Nothing ran: speed is not measured.",
        "",
        "| op | kernels | GFLOP of the equation, forward | of the kernels | MiB of the arguments "
        "| moved by the kernels | MiB of temporaries | of xla on a CPU "
        "| of the reference, one head |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    parts = lambda row: [row[p] for p in ("forward", "backward") if p in row]
    pair = lambda row, key, unit: " / ".join(f"{part[key] / unit:,.0f}" for part in parts(row))
    for op, row in result["ops"].items():
        lines.append(
            f"| {op} | {pair(row, 'kernels', 1)} | {row['equation_flops'] / 1e9:,.0f} | {pair(row, 'flops', 1e9)} "
            f"| {row['argument_bytes'] / MIB:,.0f} | {pair(row, 'bytes', MIB)} "
            f"| {pair(row, 'temporaries', MIB)} "
            f"| {row['xla_cpu'] / MIB:,.0f} | {row['reference_one_head'] / MIB:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.aot_tpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--chip", choices=TOPOLOGIES, default="v5e")
    parser.add_argument("--length", type=int, default=32768, help="tokens (default 32768)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    args = parser.parse_args()
    if args.length < 1:
        raise UserError(f"--length is {args.length} but must be at least 1.")
    folder_to_write(args.out)
    jax.config.update("jax_platforms", "cpu")
    try:
        device = tpu_devices(args.chip)[0]
    except RuntimeError as error:
        raise UserError(
            f"the TPU's compiler is not here ({str(error).splitlines()[0]}): install the extra tpu."
        ) from error
    shape = Shape("table", 1, args.length, 4, 2, 128, 128)
    single = dataclasses.replace(shape, heads=1, kv_heads=1)
    ops = {}
    for name, make in track(CALLS.items(), "compiling", console=Console(stderr=True)):
        ops[name] = measure(make(shape, jnp.bfloat16), make(single, jnp.float32), device)
    result = {"chip": args.chip, "shape": dataclasses.asdict(shape), "ops": ops, "environment": result_environment()}
    print(markdown(result))
    with writing(args.out, REMEDY):
        write_json_atomic(args.out / f"aot_tpu_{args.chip}.json", result)
        (args.out / f"aot_tpu_{args.chip}.md").write_text(markdown(result), "utf-8")
    return 0


if __name__ == "__main__":
    run_cli(main)
