"""Our kernels against their rivals on this device, in one interleaved run.

    python -m scripts.bench.kernels [--only flash] [--rounds 5] [--out FOLDER]

Contenders of a case take turns, the order reversed each round; ratios are of the same round, their median counts.
Before a case is timed its contenders must give the same numbers. Writes a JSON file, a Markdown table and a plot
named after the device. Run the kernels' tests on the device first: a fast wrong kernel is worth nothing.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from jaxattn.command import run_cli
from jaxattn.errors import UserError, writing
from jaxattn.runs.rundir import result_environment, write_json_atomic
from pallas_kernels._blocks import table_name
from scripts.bench.kernels import rivals
from scripts.bench.kernels.cases import OURS, SEED, Case
from scripts.bench.kernels.report import markdown, plot
from scripts.bench.kernels.tables import cases_for, derived, scaling
from scripts.bench.timing import interleaved, ratio
from scripts.outputs import REMEDY, folder_to_write

TOLERANCE = {"float32": 2e-4, "bfloat16": 4e-2}  # of the largest entry
RESULTS = Path("scripts/bench/results")


def check_same(case: Case, calls: dict[str, Any]) -> dict[str, float]:
    """The largest difference from ours, relative to the largest entry, by rival.

    Raises:
      UserError: contenders disagree; the case is not timed.
    """
    first = lambda name: [np.asarray(x, np.float32) for x in jax.tree.leaves(calls[name]())]
    ours, found = first(OURS), {}
    if not all(np.isfinite(x).all() for x in ours):
        raise UserError(f"{case.name}: {OURS} gives numbers that are not finite; nothing was timed.")
    dtype = str(jax.tree.leaves(calls[OURS]())[0].dtype)
    for name in calls:
        if name == OURS or not case.same:
            continue
        theirs = first(name)
        worst = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, theirs, strict=True))
        if worst > TOLERANCE[dtype]:
            raise UserError(f"{case.name}: {OURS} and {name} differ by {worst:.1e} of the largest; nothing was timed.")
        found[name] = worst
    return found


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Seconds of every contender, differences, and the ratio the bar speaks of."""
    calls = case.make(case.shape)
    differences = check_same(case, calls)
    seconds = interleaved(calls, rounds)
    row: dict[str, Any] = {
        "case": case.name,
        "op": case.op,
        "shape": vars(case.shape),
        "seconds": seconds,
        "median_ms": {name: 1e3 * statistics.median(s) for name, s in seconds.items()},
        "difference": differences,
    }
    if case.flops:
        row["tflops"] = {name: case.flops / statistics.median(s) / 1e12 for name, s in seconds.items()}
    here = [name for name in case.against if name in seconds]
    if case.bar and here:
        best = min(here, key=lambda name: statistics.median(seconds[name]))
        found = ratio(seconds[best], seconds[OURS])
        row |= {"bar": case.bar, "against": best, **found, "reached": found["ratio"] >= case.bar}
    return row


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    args = parser.parse_args()
    if args.rounds < 1:
        raise UserError(f"--rounds is {args.rounds} but must be at least 1.")
    platform, kind = jax.default_backend(), jax.devices()[0].device_kind
    cases = [case for case in cases_for(platform) if args.only in case.name]
    if not cases:
        known = ", ".join(case.name for case in cases_for(platform))
        raise UserError(f"--only is {args.only!r} but no case of a {platform} has that in its name: {known}.")
    folder_to_write(args.out)
    rows = []
    for case in track(cases, "kernels", console=Console(stderr=True)):
        rows.append(measure(case, args.rounds))
        speeds = "  ".join(f"{name} {ms:.2f} ms" for name, ms in rows[-1]["median_ms"].items())
        print(f"{case.name}: {speeds}", flush=True)
    claims = derived(rows)
    if args.only in "linear_scan by length":
        claims += scaling(args.rounds, jnp.float32 if platform == "cpu" else jnp.bfloat16)
    result = {
        "device": kind,
        "rounds": args.rounds,
        "seed": SEED,
        "rows": rows,
        "derived": claims,
        "absent": rivals.absent(),
        "environment": result_environment(),
    }
    name = f"kernels_{table_name(kind).removesuffix('.json')}"
    print(markdown(result, platform))
    with writing(args.out, REMEDY):
        write_json_atomic(args.out / f"{name}.json", result)
        (args.out / f"{name}.md").write_text(markdown(result, platform), "utf-8")
        plot(args.out / f"{name}.png", rows)
    judged = [row["reached"] for row in (*rows, *claims) if "reached" in row]
    return 0 if all(judged) else 1


if __name__ == "__main__":
    run_cli(main)
