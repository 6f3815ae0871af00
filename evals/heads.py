"""`python -m evals.heads CKPT --profile retrieval,induction,echo,sinks --text FILE --out DIR`: what each head does.

    retrieval   what it copies out of the text while the model answers with something hidden there (arXiv 2404.15574)
    induction   attention to what followed the same token before, over random tokens repeated (arXiv 2407.15891)
    echo        attention to the same token before, over the same
    sinks       attention to the beginning of the text

Writes heads.json, head tables [layers][heads] by these names, and a picture of each. Its table `mask_heads` numbers
heads by the first profile asked for, the largest score first, so that

    python -m jaxattn.generate CKPT --policy='mask_heads(top=20)' --heads DIR/heads.json …

runs the model without its first twenty. The retrieval profile hides numbers and phrases at all depths of texts of
`--lengths` tokens; answers that do not hold more than half of them do not count. `retrieval_count` is the same with
every copy counted, at most once a token of the needle.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np

from evals.needles import NUMBER, PHRASE, ask, case_of, number, numbers_of, phrase, sentence_ends, vocabulary
from evals.plots_tables import head_map
from evals.progress import bar
from evals.text_file import read_text_file
from evals.write_result import results_in
from jaxattn.analysis import heads
from jaxattn.analysis.retrieval import THRESHOLD, Case, Retrieval, retrieval
from jaxattn.command import run_cli
from jaxattn.errors import ConfigError, DataError, suggest
from jaxattn.head_tables import head_file
from jaxattn.policies.command import Asked
from jaxattn.policies.mask_heads import TABLE
from jaxattn.runs.rundir import write_atomic, write_json_atomic
from jaxattn.text import Loaded, load

PROFILES = ("retrieval", "induction", "echo", "sinks")
NEED_TEXT = ("retrieval", "sinks")
SHOWN = 8
ANSWER = 24  # tokens of an answer


def cases(loaded: Loaded, ids: np.ndarray, *, count: int, lengths: list[int], seed: int = 0) -> list[Case]:
    """Questions for what is hidden in parts of a text: numbers and phrases in turn, at even depths, lengths in turn.

    Raises:
      ConfigError, DataError: of `evals.needles.ask`.
    """
    rng, ends, out = np.random.default_rng(seed), sentence_ends(loaded.tokenizer, ids), []
    apart = next(n for n in range(7, 7 + count) if math.gcd(n, count) == 1)  # depths not in the order of the text
    for n in range(count):
        question, answer = (NUMBER, number(rng)) if n % 2 == 0 else (PHRASE, phrase(rng))
        length = lengths[n // 2 % len(lengths)]
        start = int((len(ids) - length) * n / max(1, count - 1)) if len(ids) > length else 0
        depth = (n * apart % count + 0.5) / count
        asked = ask(loaded, ids, question, [("", answer)], length=length, depth=depth, ends=ends, start=start)
        out.append(case_of(loaded.tokenizer, asked))
    return sorted(out, key=lambda case: len(case.prompt))  # rows of a batch are about as long


def copied(loaded: Loaded, ids: np.ndarray, *, count: int, lengths: list[int], breaks: frozenset[int]) -> Retrieval:
    """The retrieval profile of a model over parts of a text."""
    asked = cases(loaded, ids, count=count, lengths=lengths)
    stop = breaks | set(loaded.stop_tokens)
    return retrieval(loaded.model, loaded.params, asked, stop=stop, new=ANSWER, show=bar("answers"))


def summary(name: str, table: np.ndarray) -> str:
    """Two lines: how many heads have a score that is worth its name, and the first of them."""
    best = np.argsort(-table.reshape(-1), kind="stable")[:SHOWN]
    named = ", ".join(f"{i // table.shape[1]}-{i % table.shape[1]} {table.reshape(-1)[i]:.2f}" for i in best)
    many = int(np.sum(table >= THRESHOLD))
    return f"{name}: {many} of {table.size} heads ({many / table.size:.1%}) at least {THRESHOLD}\n  {named}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evals.heads", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="converted checkpoint or run of text")
    parser.add_argument("--profile", default="retrieval", help=f"some of {','.join(PROFILES)} (default retrieval)")
    parser.add_argument("--text", type=Path, help="UTF-8 text file, for retrieval and sinks")
    parser.add_argument(
        "--lengths", default="512,1k", help="tokens of retrieval's prompts and answers (default 512,1k)"
    )
    parser.add_argument("--cases", type=int, default=32, help="answers of retrieval (default 32)")
    parser.add_argument(
        "--block", type=int, help="different tokens that are repeated (default: 256, or as many as fit)"
    )
    parser.add_argument("--sequences", type=int, default=4, help="rows of induction, echo and sinks (default 4)")
    parser.add_argument("--out", type=Path, required=True, help="folder for heads.json and the pictures")
    args = parser.parse_args()
    wanted = list(dict.fromkeys(word.strip() for word in args.profile.split(",")))
    for word in wanted:
        if word not in PROFILES:
            raise ConfigError(suggest("--profile", word, list(PROFILES)))
    for flag in ("cases", "sequences"):
        if getattr(args, flag) < 1:
            raise ConfigError(f"--{flag} is {getattr(args, flag)} but must be at least 1.")
    lengths = numbers_of(args.lengths, "--lengths")
    if args.text is None and any(word in NEED_TEXT for word in wanted):
        raise ConfigError(f"--profile {args.profile} reads a text: name a UTF-8 file as --text.")
    text = "" if args.text is None else read_text_file(args.text)
    loaded = load(args.checkpoint, asked=Asked("dense"))
    with results_in(args.out):
        tables = profiles(
            loaded, text, wanted, lengths=lengths, count=args.cases, rows=args.sequences, block=args.block
        )
        for name in wanted:
            write_atomic(args.out / f"{name}.png", head_map(tables[name], f"{name} score", args.checkpoint.name))
        write_json_atomic(args.out / "heads.json", head_file(tables, loaded.params))
    for name in tables:
        if name != TABLE:
            print(summary(name, tables[name]))
    print(f"head tables: {args.out / 'heads.json'}")
    return 0


def profiles(
    loaded: Loaded, text: str, wanted: list[str], *, lengths: list[int], count: int, rows: int, block: int | None
) -> dict[str, np.ndarray]:
    """The head tables [L, H] by name, the order of masking among them."""
    ids = np.asarray(loaded.tokenizer.encode(text, add_special_tokens=False), np.int32)
    known, tables = vocabulary(loaded), {}
    for name in wanted:
        if name == "retrieval":
            found = copied(loaded, ids, count=count, lengths=lengths, breaks=known.breaks)
            tables |= {"retrieval": found.mean(), "retrieval_count": found.mean("counts")}
            print(f"retrieval: {int(found.counted.sum())} of {count} answers hold their needle and count", flush=True)
        elif name == "sinks":
            tables[name] = _sinks(loaded, ids, rows)
        elif name not in tables:
            tables |= repeats(loaded, known.plain, rows, block)
    tables = {name: table for name, table in tables.items() if name.removesuffix("_count") in wanted}
    return tables | {TABLE: heads.order(tables[wanted[0]])}


def _sinks(loaded: Loaded, ids: np.ndarray, rows: int) -> np.ndarray:
    """Over parts of the text of one length, each behind what begins a text."""
    front = list(loaded.tokenizer.around[0])
    length = min(512, loaded.context) - len(front)
    if len(ids) < rows * length:
        raise DataError(
            f"the text has {len(ids)} tokens but {rows} times {length} are read for sinks: give a longer one, or a "
            "smaller --sequences."
        )
    cut = [[*front, *ids[n * length : (n + 1) * length].tolist()] for n in range(rows)]
    return heads.sinks(loaded.model, loaded.params, np.asarray(cut, np.int32))


def repeats(loaded: Loaded, plain: list[int], rows: int, block: int | None) -> dict[str, np.ndarray]:
    """Echo and induction over random tokens."""
    most = (loaded.context - 1) // heads.REPEATS
    if block is not None and not 2 <= block <= min(most, len(plain)):
        raise ConfigError(
            f"--block is {block} but must be from 2 to {min(most, len(plain))}: the model has {len(plain)} tokens and "
            f"{heads.REPEATS} times the block must fit its {loaded.context} positions."
        )
    size = min(256, most, len(plain)) if block is None else block
    start = plain[0] if loaded.first_token is None else loaded.first_token
    tokens = heads.repeated(plain, size=size, rows=rows, start=start)
    return heads.echo_and_induction(loaded.model, loaded.params, tokens, size)


if __name__ == "__main__":
    run_cli(main)
