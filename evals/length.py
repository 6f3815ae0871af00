"""`python -m evals.length RUN_DIR [--lengths 256,512,1024] [--attn=...] [--json OUT]`: loss beyond the training length.

The same held-out text is read in windows of every length: n sequences of the longest length L, cut into L / l
windows for each l, each with the start token in front if the tokenizer begins texts with one. So every length is
scored on the same tokens, and only the context differs. Reported per length: the mean loss, the mean over the last
quarter of the window (where the context is longest), and the loss by position. Writes length.json and
plots/length.png into the run directory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from evals.plot_style import DASH, GREY, INK, figure, in_style, png
from evals.write_result import write_result
from jaxattn.command import run_cli
from jaxattn.errors import ConfigError, UserError
from jaxattn.models import ModelConfig
from jaxattn.nn.decoding import variables_of
from jaxattn.policies.command import add_flags, asked
from jaxattn.reader import hidden_in_pieces, hidden_of, hidden_one_by_one, scores
from jaxattn.runs.opened import Trained, open_trained

POINTS = 32  # of the curve over positions


def window_losses(
    model: ModelConfig,
    params: Any,
    windows: np.ndarray,
    lengths: np.ndarray | None = None,
    *,
    piece: int | None = None,
    prefill: int | None = None,
    show: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> np.ndarray:
    """-log p (nats) of each token of windows [b, T + 1] given those before it, f32 [b, T].

    Args:
      lengths: tokens [b] of each window that are read, T without it; the losses behind them mean nothing.
      piece: read that many tokens at a time through the decode state; None reads as the layers have to be read.
      prefill: read that many as a prompt and the rest one by one, as an answer; None does not.
      show: of `jaxattn.reader.hidden_one_by_one`.
    """
    variables, tokens = variables_of(params), windows[:, :-1]
    if prefill is not None:
        hidden = hidden_one_by_one(model, variables, tokens, lengths, prefill=prefill, show=show)
    elif piece is None:
        hidden = hidden_of(model, variables, tokens, lengths)
    else:
        hidden = hidden_in_pieces(model, variables, tokens, lengths, piece=piece)
    return -np.asarray(scores(model, variables, hidden, jnp.asarray(windows[:, 1:]))[0])


def cut_windows(text: np.ndarray, length: int, front: int | None = None) -> np.ndarray:
    """[n, L + 1] tokens -> [n · L / length, length + 1]: every target once.

    front: what the first token of every window becomes, the start token of a model that begins each text with one.
    """
    n, longest = text.shape[0], text.shape[1] - 1
    starts = np.arange(0, longest, length)
    cut = np.stack([text[:, s : s + length + 1] for s in starts], axis=1).reshape(n * len(starts), length + 1)
    if front is not None:
        cut[:, 0] = front
    return cut


def loss_by_length(
    trained: Trained, text: np.ndarray, lengths: list[int], front: int | None = None
) -> list[dict[str, Any]]:
    """One JSON-able row per length; `text` is [n, longest + 1], `front` as in `cut_windows`."""
    rows = []
    for length in lengths:
        windows = cut_windows(text, length, front)
        size = max(1, text.shape[1] // length)  # tokens at once: those of one longest sequence
        parts = [windows[i : i + size] for i in range(0, len(windows), size)]
        found = [window_losses(trained.model, trained.params, part) for part in parts]
        by_position = np.concatenate(found).astype(np.float64).mean(0)
        edges = np.linspace(0, length, min(POINTS, length) + 1).astype(int)
        rows.append(
            {
                "length": length,
                "windows": len(windows),
                "loss": float(by_position.mean()),
                "loss_last_quarter": float(by_position[-max(1, length // 4) :].mean()),
                "positions": [float(a + b - 1) / 2 for a, b in pairwise(edges)],
                "by_position": [float(by_position[a:b].mean()) for a, b in pairwise(edges)],
            }
        )
    return rows


def choose_lengths(text: str | None, trained_length: int) -> list[int]:
    """The lengths as given, or the training context times 1, 2, 4, 8.

    Raises:
      ConfigError: no numbers, too short, or one that does not divide the longest.
    """
    if text is None:
        return [trained_length * 2**i for i in range(4)]
    try:
        lengths = sorted({int(word) for word in text.split(",")})
    except ValueError:
        raise ConfigError(f"--lengths is {text!r} but must be numbers like 256,512,1024.") from None
    for length in lengths:
        if length < 2 or lengths[-1] % length:
            near = next(d for d in range(max(length, 2), lengths[-1] + 1) if lengths[-1] % d == 0)
            raise ConfigError(
                f"--lengths has {length}, which must be at least 2 and divide the longest, {lengths[-1]}: use {near}."
            )
    return lengths


def plot(rows: list[dict[str, Any]], attn: str, trained_length: int) -> bytes:
    """Loss by length, and by position inside the longest window."""
    with in_style():
        made = figure(8.6, 3.0)
        left, right = made.subplots(1, 2)
        x = [row["length"] for row in rows]
        left.plot(x, [row["loss"] for row in rows], "o-", color="#0072b2", label="all positions")
        left.plot(x, [row["loss_last_quarter"] for row in rows], "o--", color="#d55e00", label="last quarter")
        left.set_xscale("log", base=2)
        left.set_xticks(x, [str(n) for n in x])
        left.set(xlabel="window (tokens)", ylabel="loss (nats per token)")
        left.legend()
        right.plot(rows[-1]["positions"], rows[-1]["by_position"], color="#0072b2")
        right.axvline(trained_length, color=GREY, lw=0.8, ls=DASH)
        right.set(xlabel=f"position in a window of {x[-1]}", ylabel="loss (nats per token)")
        for ax in (left, right):
            ax.grid(True)
        made.suptitle(f"{attn}, trained at {trained_length} tokens".replace("$", r"\$"), fontsize=8.5, color=INK)
        return png(made)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evals.length", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="directory of a training run on text")
    parser.add_argument("--lengths", help="tokens, each a divisor of the longest (default: 1, 2, 4, 8 x the context)")
    parser.add_argument("--sequences", type=int, default=8, help="sequences of the longest length (default 8)")
    parser.add_argument("--attn", help="attention of the layers, for options that keep the parameters")
    parser.add_argument("--step", type=int, help="checkpoint step (default: the newest valid one)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result here instead of the run directory")
    add_flags(parser)
    args = parser.parse_args()
    if args.sequences < 1:
        raise ConfigError(f"--sequences is {args.sequences} but must be at least 1.")

    from train.data.open import open_source
    from train.data.task_source import TaskSource

    trained = open_trained(args.run_dir, args.attn, args.step, asked(args))
    context = trained.cfg.data.context
    lengths = choose_lengths(args.lengths, context)
    source, _ = open_source(trained.cfg)
    if source.indivisible:
        remedy = f"all its sequences have the training context of {context} tokens, so name a run of text"
        if isinstance(source, TaskSource):
            task = f"{source.name}(context={lengths[-1]})"
            remedy = f"measure other lengths of a task with python -m evals.tasks {args.run_dir} --task='{task}'"
        raise ConfigError(f"{args.run_dir} was trained on {source.name!r}, which is no text: {remedy}.")
    trained.check_length(lengths[-1])
    front = source.tokenizer.around[0][-1:] if source.tokenizer else []
    rows = loss_by_length(trained, source.held_out(args.sequences, lengths[-1] + 1), lengths, *front)
    result = {
        "attn": trained.attn,
        "step": trained.step,
        "source": source.name,
        "sequences": args.sequences,
        "trained_context": context,
        "lengths": rows,
    }
    print(f"{trained.attn} at step {trained.step}, trained at {context} tokens, {source.name}")
    for row in rows:
        print(
            f"  {row['length']:>8} tokens: loss {row['loss']:.4f}, last quarter {row['loss_last_quarter']:.4f}"
            f"  ({row['windows']} windows)"
        )
    write_result(args.json or args.run_dir / "length.json", result)
    if args.json is None:
        path = args.run_dir / "plots" / "length.png"
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(plot(rows, trained.attn, context))
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); give --json for another place.") from error
    return 0


if __name__ == "__main__":
    run_cli(main)
