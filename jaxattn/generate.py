"""`python -m jaxattn.generate CKPT --prompt "..."`: continue a text with a converted checkpoint or a trained run.

Text streams to stdout as it is made; what was read and the time it took go to stderr. Only a command: the library
function is `jaxattn.generate(model, params, tokens, ...)`, which this module answers as too, because Python puts it in
the function's place when it is imported.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import sys
import time
import types
from pathlib import Path
from typing import Any, get_args

import numpy as np

from jaxattn._generate import generate, state_room
from jaxattn.backends import of_decoding
from jaxattn.command import run_cli
from jaxattn.errors import ConfigError
from jaxattn.nn.decoding import variables_of
from jaxattn.nn.stream import TAGS
from jaxattn.policies.command import add_flags, asked
from jaxattn.policies.report import line, measured
from jaxattn.sampling import Sampling
from jaxattn.text import load, stream_text
from jaxattn.types import Backend


class _Callable(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return generate(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jaxattn.generate", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="converted checkpoint or run folder")
    parser.add_argument("--prompt", required=True, help="text to continue; with --chat, the user's message")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the checkpoint's chat template")
    parser.add_argument("--system", help="system message (with --chat)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default 128")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], help="end before this text; may be repeated")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype (default: the model's)")
    parser.add_argument("--attn", help="other options of the model's attention, such as softmax(window=64)")
    parser.add_argument("--backend", choices=get_args(Backend), help="of attention (default: the model's)")
    add_flags(parser)
    parser.add_argument("--policy-report", action="store_true", help="say what the policy held and read")
    args = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that does not have every character gets a question mark
        sys.stdout.reconfigure(errors="replace")
    if args.system and not args.chat:
        raise ConfigError(f"--system is {args.system!r} but there is no --chat; add it.")
    how = Sampling(args.temperature, args.top_k, args.top_p, args.min_p)
    loaded = load(args.checkpoint, dtype=args.dtype, attn=args.attn, backend=args.backend, asked=asked(args))
    loaded = loaded.prepared(consume=True)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    messages.append({"role": "user", "content": args.prompt})
    if args.chat and loaded.model.keeping.tagged:
        ids, tags = loaded.tagged_chat(messages)
        variables = variables_of(loaded.params) | {TAGS: {"prompt": np.asarray([tags], np.int32)}}
        loaded = dataclasses.replace(loaded, params=variables)
    else:
        ids = loaded.chat(messages) if args.chat else loaded.encode(args.prompt)
    print(f"[{of_decoding(loaded.model, loaded.params)}]", file=sys.stderr, flush=True)
    if not args.chat:
        print(args.prompt, end="", flush=True)
    begin, first, made, counted = time.perf_counter(), None, [], {}
    look = lambda states: counted.update(measured(loaded.model, states)) if args.policy_report else None
    for piece in stream_text(
        loaded, ids, max_new_tokens=args.max_new_tokens, how=how, seed=args.seed, stop=args.stop, counted=made.append,
        watch=look,
    ):  # fmt: skip
        first = first or time.perf_counter() - begin
        print(piece, end="", flush=True)
    print()
    seconds = time.perf_counter() - begin
    print(
        f"[{len(ids)} prompt tokens; first text after {first or 0:.1f} s, {seconds:.1f} s in all]",
        file=sys.stderr,
    )
    if args.policy_report:
        room, behind = state_room(loaded.model, len(ids), args.max_new_tokens), sum(made[1:])
        rate = behind / max(seconds - (first or 0), 1e-9)
        cost = line(loaded.model, length=len(ids) + sum(made), capacity=room, counted=counted)
        print(f"[{cost}; {rate:.1f} tokens/s behind the first {made[0] if made else 0}]", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_cli(main)
