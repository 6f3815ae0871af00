"""`python -m evals.tasks RUN_DIR [--task='passkey(context=1024)'] [--attn=...] [--json OUT]`

Accuracy of a trained run's newest checkpoint on a synthetic task. Options that --task leaves out are those of the
run's own data, `context` included; --attn swaps options that own no parameters, such as window, or retrieve of
landmark, which reads the sequences in chunks (--chunk). They are of a stream that training and validation never see.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxattn.command import run_cli
from jaxattn.errors import ConfigError
from jaxattn.policies.command import add_flags, asked
from jaxattn.signals import loading


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evals.tasks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="directory of a training run")
    parser.add_argument("--task", help="NAME or NAME(option=value, ..., context=T); default: what it was trained on")
    parser.add_argument("--attn", help="attention of the layers, for options that keep the parameters")
    parser.add_argument("--sequences", type=int, default=200, help="how many sequences (default 200)")
    parser.add_argument("--chunk", type=int, help="tokens at a time, as in generation; 0: as many as possible")
    parser.add_argument("--step", type=int, help="checkpoint step (default: the newest valid one)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result here")
    add_flags(parser)
    args = parser.parse_args()
    for flag, least in (("sequences", 1), ("chunk", 0)):
        if (value := getattr(args, flag)) is not None and value < least:
            raise ConfigError(f"--{flag} is {value} but must be at least {least}.")

    with loading():
        from evals.run_task import choose_task, line, run_task
        from evals.write_result import write_result
        from jaxattn.runs.opened import open_trained

    trained = open_trained(args.run_dir, args.attn, args.step, asked(args))
    result = run_task(trained, *choose_task(trained, args.task), args.sequences, args.chunk)
    print(line(result))
    if args.json:
        write_result(args.json, result)
    return 0


if __name__ == "__main__":
    run_cli(main)
