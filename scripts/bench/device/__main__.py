"""Numbers and speed of every op on a GPU in one run that nobody watches: at most eight minutes, most valuable first.

    python -m scripts.bench.device --out FOLDER [--minutes 8] [--only SECTION ...] [--gguf FILE] [--dry-run]

Needs Python 3.12, JAX 0.11.2 or newer with its CUDA plugin, numpy, jaxtyping and flax; what else it uses where it is
there, `--packages` says. What it writes is whole at any moment: a line of `results.jsonl` for each case as soon as it
is known, `summary.md` and `summary.png` behind each section. Cases run in processes of their own that are killed when
late, so that a kernel that hangs, crashes or spoils its device costs its own case only. Ends with 1 if a number is
wrong or a case failed; what is not installed, or refused with a reason, is no failure.

`--dry-run` does all of it small on a CPU, kernels in JAX's simulator of GPUs: that it works, its times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from pathlib import Path

from jaxattn.command import run_cli
from jaxattn.errors import UserError
from scripts.bench.device import environment, sections, summary
from scripts.bench.device.plan import MINUTES, SECTIONS
from scripts.bench.device.run import RESULTS, Run
from scripts.bench.device.tasks import short
from scripts.bench.device.workers import Crew
from scripts.outputs import folder_to_write

GRACE = 10  # seconds behind the last minute, should this process itself be held up
SIDES = 6  # of JAX's processes that compile and check at once
QUIET = {"PYTHONUNBUFFERED": "1", "TF_CPP_MIN_LOG_LEVEL": "1"}


def environments(small: bool, count: int) -> dict[str, dict[str, str]]:
    """Variables of each process. None takes the device's memory ahead; where there is no GPU, JAX must say so."""
    jax = {"JAX_PLATFORMS": "cpu", "NPROC": "8"} if small else {"JAX_PLATFORMS": "cuda"}
    share = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / (count + 1):.2f}"}
    torch = {"JAX_PLATFORMS": "cpu"} | ({"CUDA_VISIBLE_DEVICES": ""} if small else {})
    return {**{f"jax{n}": QUIET | jax | share for n in range(count)}, "torch": QUIET | torch}


def print_packages() -> None:
    """What is needed and used, and what becomes of the run without it."""
    versions = environment.packages()
    for name in environment.NEEDED:
        print(f"{name}: {versions[name] or 'MISSING'} (needed)")
    for name, without in environment.USED.items():
        print(f"{name}: {versions[name] or 'missing'} (without it: {without})")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.device",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time of all together (default %(default)g)")
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=list(SECTIONS), help="these sections")
    parser.add_argument("--gguf", default="", help="SmolLM2's weights; random ones of its shape without")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default %(default)s)")
    parser.add_argument("--processes", type=int, default=0, help="of JAX; default: 6, or half of the CPUs")
    parser.add_argument("--dry-run", action="store_true", help="small, on a CPU, kernels simulated")
    parser.add_argument("--packages", action="store_true", help="say what is needed and used, and end")
    args = parser.parse_args()
    if args.packages:
        print_packages()
        return 0
    if args.out is None:
        raise UserError("--out is missing: name a folder for the results.")
    if not args.minutes > 0:
        raise UserError(f"--minutes is {args.minutes:g} but must be more than 0.")
    if (args.out / RESULTS).exists():
        raise UserError(f"{args.out} holds the results of an earlier run: name another folder by --out.")
    folder_to_write(args.out)
    cpus = len(os.sched_getaffinity(0))
    count = args.processes or max(1, min(SIDES, cpus if args.dry_run else cpus // 2))
    if args.dry_run:
        print("dry run: everything small, on a CPU; no time in it means anything.", flush=True)
    with Crew(args.out / "logs", environments(args.dry_run, count)) as crew:
        run = Run(args.out, crew, args.minutes, args.dry_run, args.seed, args.gguf)

        def stop(*_: object) -> None:
            """Whoever waits for a worker is told, and the summary is written on the way out."""
            crew.close()
            sys.exit(143)

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGALRM, stop)
        signal.alarm(int(60 * args.minutes) + GRACE)
        try:
            for name in args.only:
                run.begin(name)
                try:
                    sections.RUNS[name](run)
                except Exception as error:  # noqa: BLE001, as the other sections are worth having whatever it was
                    traceback.print_exc()
                    run.write(name, status="failed", reason=f"{type(error).__name__}: {short(error)}")
                summary.write(run)
        finally:
            summary.write(run)
    print((args.out / "summary.md").read_text("utf-8"))
    return 1 if run.faults() else 0


if __name__ == "__main__":
    run_cli(main)
