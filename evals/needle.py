"""`python -m evals.needle CKPT --text FILE --lengths 512,1k,2k --depths 5 [--keys N] [--policy …] --out DIR`

Hides a five-digit number at every depth of texts of every length and asks for it, under the checkpoint's chat template
where it has one. With --keys N the text has N numbers with a word each, and one is asked for. A prompt and its answer
have the length together; the number is put behind the sentence that ends at or in front of its depth. The answer begins
with the words of the hidden sentence, read token by token, and goes on greedily; what counts is the first number in it.
Writes needle.json and needle.png: the share of digits, each in its place, and of whole numbers given back.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from evals.needles import KEYED, NUMBER, WORDS, Asked, ask, number, numbers_of, right, sentence_ends, vocabulary
from evals.plots_tables import needle_grid
from evals.progress import bar
from evals.text_file import read_text_file
from evals.write_result import results_in
from jaxattn.analysis.answers import answer, read_prompts
from jaxattn.command import run_cli
from jaxattn.errors import ConfigError
from jaxattn.policies.command import add_flags, asked
from jaxattn.policies.report import totals
from jaxattn.runs.rundir import result_environment, write_atomic, write_json_atomic
from jaxattn.text import Loaded, load

NEW = 16  # tokens of an answer behind its first words
TOKENS = 8192  # of prompts that are read at once


def depths_of(count: int) -> list[float]:
    """Shares of a text, from its beginning to its end."""
    return np.linspace(0, 1, count).tolist() if count > 1 else [0.5]


def questions(
    loaded: Loaded, ids: np.ndarray, *, length: int, depths: list[float], keys: int = 1, cases: int = 1, seed: int = 0
) -> list[Asked]:
    """`cases` questions for every depth, the cases of a depth in a row, each about another part of the text.

    Raises:
      ConfigError, DataError: of `evals.needles.ask`.
    """
    rng, ends, out = np.random.default_rng((seed, length, keys)), sentence_ends(loaded.tokenizer, ids), []
    count = len(depths) * cases
    spare = max(0, len(ids) - length)
    for n in range(count):
        names = rng.permutation(WORDS)[:keys].tolist()
        hidden = [(name, number(rng)) for name in names]
        start = int(spare * n / max(1, count - 1))
        question, depth = KEYED if keys > 1 else NUMBER, depths[n // cases]
        out.append(ask(loaded, ids, question, hidden, length=length, depth=depth, ends=ends, start=start))
    return out


def answers(loaded: Loaded, questions: list[Asked], stop: frozenset[int]) -> list[str]:
    """What the model says to each, behind the words that an answer begins with."""
    out: list[str] = []
    size = max(1, TOKENS // max(len(q.prompt) for q in questions))
    for first in range(0, len(questions), size):
        part = questions[first : first + size]
        whole = [*part, *[part[-1]] * (min(size, len(questions)) - len(part))]  # one program
        said = [q.said for q in whole]
        cursor = read_prompts(loaded.model, loaded.params, [q.prompt for q in whole], room=max(map(len, said)) + NEW)
        found = answer(loaded.model, loaded.params, cursor, said, new=NEW, stop=stop)
        out += [loaded.tokenizer.decode(ids) for ids in found[: len(part)]]
    return out


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evals.needle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="converted checkpoint or run of text")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text file to hide numbers in")
    parser.add_argument("--lengths", default="512,1k", help="tokens of prompt and answer (default 512,1k)")
    parser.add_argument("--depths", type=int, default=5, help="how many, from beginning to end (default 5)")
    parser.add_argument("--cases", type=int, default=1, help="questions for each length and depth (default 1)")
    parser.add_argument("--keys", type=int, default=1, help="numbers in a text, of which one is asked for (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of numbers and words (default 0)")
    parser.add_argument("--out", type=Path, required=True, help="folder for needle.json and needle.png")
    add_flags(parser)
    args = parser.parse_args()
    lengths = numbers_of(args.lengths, "--lengths")
    for flag, most in (("depths", 1000), ("cases", 1000), ("keys", len(WORDS))):
        if not 1 <= getattr(args, flag) <= most:
            raise ConfigError(f"--{flag} is {getattr(args, flag)} but must be from 1 to {most}.")
    if args.seed < 0:
        raise ConfigError(f"--seed is {args.seed} but must be at least 0.")
    text = read_text_file(args.text)
    loaded = load(args.checkpoint, asked=asked(args))
    limit = loaded.model.position_limit
    if limit and max(lengths) + NEW > limit:
        raise ConfigError(
            f"--lengths has {max(lengths)} tokens, and up to {NEW} of an answer that goes on are read too, but the "
            f"model knows {limit} positions: ask for at most {limit - NEW}."
        )
    depths = depths_of(args.depths)
    ids = np.asarray(loaded.tokenizer.encode(text, add_special_tokens=False), np.int32)
    how = {"depths": depths, "keys": args.keys, "cases": args.cases, "seed": args.seed}
    asked_for = {length: questions(loaded, ids, length=length, **how) for length in lengths}  # refused before any runs
    loaded = loaded.prepared(consume=True)
    stop = vocabulary(loaded).breaks | set(loaded.stop_tokens)
    with results_in(args.out):
        cells: list[dict[str, Any]] = []
        for length in bar("lengths")(lengths):
            said = answers(loaded, asked_for[length], stop)
            for row, depth in enumerate(depths):
                mine = slice(row * args.cases, (row + 1) * args.cases)
                own = list(zip(asked_for[length][mine], said[mine], strict=True))
                cells.append({"length": length, "depth": depth, **_cell(own)})
        result = {
            "checkpoint": args.checkpoint.name,
            "policy": loaded.model.policy or "dense",
            "text": args.text.name,
            "chat": bool(loaded.templates),
            **how,
            "lengths": lengths,
            "digits": float(np.mean([cell["digits"] for cell in cells])),
            "whole": float(np.mean([cell["whole"] for cell in cells])),
            "cells": cells,
            "cost": totals(loaded.model, length=max(lengths) - 1, capacity=max(lengths)),
            "environment": result_environment(),
        }
        shares = np.array([cell["digits"] for cell in cells]).reshape(len(lengths), len(depths)).T
        name = f"{args.checkpoint.name}, {loaded.model.policy or 'dense'}: {result['digits']:.0%} of digits"
        write_atomic(args.out / "needle.png", needle_grid(shares, lengths, depths, name))
        write_json_atomic(args.out / "needle.json", result)
    print(_table(cells, lengths, depths))
    print(f"digits given back {result['digits']:.1%}, whole numbers {result['whole']:.1%}: {args.out / 'needle.json'}")
    return 0


def _cell(own: list[tuple[Asked, str]]) -> dict[str, Any]:
    """Shares over the questions of a length and depth, and the answers as they are."""
    marks = [right(said, question.answer) for question, said in own]
    return {
        "digits": float(
            np.mean([mark.digits / len(question.answer) for mark, (question, _) in zip(marks, own, strict=True)])
        ),
        "whole": float(np.mean([mark.whole for mark in marks])),
        "answers": [[question.answer, said] for question, said in own],
    }


def _table(cells: list[dict[str, Any]], lengths: list[int], depths: list[float]) -> str:
    """A line a depth."""
    lines = ["  depth " + " ".join(f"{length:>7}" for length in lengths)]
    for row, depth in enumerate(depths):
        shares = [cells[column * len(depths) + row]["digits"] for column in range(len(lengths))]
        lines.append(f"{depth:>7.0%} " + " ".join(f"{share:>7.2f}" for share in shares))
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
