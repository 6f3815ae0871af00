"""`python -m evals.perplexity CKPT --text FILE [--context N] [--stride S] [--token-by-token | --prefill N]`

How well a text is predicted.

Windows of `context` tokens move on by `stride`; a token is scored once, in the first window that holds it, so with
stride < context it has at least context - stride tokens before it. stride = context (the default) cuts the text into
separate pieces. The text begins as its tokenizer begins one, with a start token or with its own first token, which is
not scored. `--token-by-token` reads those pieces through the decode state, one token at a time: slow, and the same
numbers if the mechanism's decoding is right and the policy leaves nothing out; `--prefill N` reads the first N tokens
as a prompt. Printed and written with --json: nats per token, perplexity, bits per
byte of the text that is scored.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from evals.length import window_losses
from evals.text_file import read_text_file
from evals.write_result import write_result
from jaxattn.command import run_cli
from jaxattn.errors import ConfigError, DataError
from jaxattn.models import ModelConfig
from jaxattn.policies.command import add_flags, asked
from jaxattn.policies.report import totals
from jaxattn.text import Loaded, load
from jaxattn.tokenizer import Tokenizer

BATCH = 4  # windows at once


class Window(NamedTuple):
    """tokens [context + 1], padded on the right; targets [first, last) of it are scored."""

    tokens: np.ndarray
    length: int
    first: int


def windows(ids: np.ndarray, context: int, stride: int) -> Iterator[Window]:
    """Windows that score every token but the first once."""
    done = 0  # targets scored so far; target t is ids[t + 1]
    for start in range(0, max(1, len(ids) - 1), stride):
        piece = ids[start : start + context + 1]
        last = start + len(piece) - 1
        if last > done:
            yield Window(np.pad(piece, (0, context + 1 - len(piece))), len(piece), done - start)
            done = last
        if last >= len(ids) - 1:
            return


def losses(
    model: ModelConfig,
    params: Any,
    ids: np.ndarray,
    *,
    context: int,
    stride: int,
    prefill: int | None = None,
    show: bool = False,
) -> np.ndarray:
    """-log p (nats) of every token but the first, f64 [len(ids) - 1].

    Args:
      prefill: read the first tokens of a window as a prompt and the rest one by one as an answer; None reads windows
        as the model's layers have to be read.

    Raises:
      ConfigError: impossible context or stride.
    """
    limit = model.position_limit
    if context < 2 or (limit and context > limit):
        raise ConfigError(f"--context is {context} but must be from 2 to {limit or 'any number'}.")
    if not 1 <= stride <= context:
        raise ConfigError(f"--stride is {stride} but must be from 1 to --context {context}.")
    if prefill is not None and stride != context:
        raise ConfigError(f"--stride is {stride} but --token-by-token reads separate pieces: leave it at {context}.")
    context = min(context, len(ids) - 1)  # a longer window would hold nothing more
    if prefill is not None and not 0 <= prefill <= context:
        raise ConfigError(f"--prefill is {prefill} but must be from 0 to the {context} tokens of a window.")
    found, cut = [], list(windows(np.asarray(ids, np.int32), context, min(stride, context)))
    groups = range(0, len(cut), BATCH)
    for i in _bar(groups) if show and len(cut) > BATCH else groups:
        group = cut[i : i + BATCH]
        filled = group + [group[0]] * (min(BATCH, len(cut)) - len(group))  # one shape
        tokens, lengths = np.stack([w.tokens for w in filled]), np.array([w.length - 1 for w in filled])
        start = None if prefill is None else min(prefill, int(lengths.min()))
        bar = _bar if show and len(cut) <= BATCH else iter
        out = window_losses(model, params, tokens, lengths, prefill=start, show=bar).astype(np.float64)
        found += [row[w.first : w.length - 1] for row, w in zip(out, group, strict=False)]
    return np.concatenate(found)


def _bar(numbers: Iterable[int]) -> Iterable[int]:
    """A progress bar over a loop."""
    return track(list(numbers), "reading", transient=True, console=Console(stderr=True))


def perplexity(
    loaded: Loaded,
    text: str,
    *,
    context: int,
    stride: int,
    prefill: int | None = None,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """What the command prints; `max_tokens` takes the beginning of the text alone.

    Raises:
      DataError: fewer than two tokens, or a loss that is no number.
      ConfigError: impossible context, stride or max_tokens.
    """
    if max_tokens is not None and max_tokens < 2:
        raise ConfigError(f"--max-tokens is {max_tokens} but must be at least 2.")
    ids, size = loaded.encode(text) if text else [], len(text.encode())
    if max_tokens is not None and len(ids) > max_tokens:
        ids = ids[:max_tokens]
        size = len(loaded.tokenizer.decode(ids).rstrip("\ufffd").encode())
    if len(ids) < 2:
        raise DataError(f"the text has {len(ids)} tokens, but a prediction needs at least 2.")
    values = losses(
        loaded.model, loaded.params, np.asarray(ids), context=context, stride=stride, prefill=prefill, show=True
    )
    mean = float(values.mean())
    if not math.isfinite(mean):
        raise DataError(f"the model gives no numbers on this text (its mean loss is {mean}).")
    return {
        "tokens": len(values),
        "context": context,
        "stride": stride,
        "token_by_token": prefill is not None,
        "prefill": prefill or 0,
        "policy": loaded.model.policy or "dense",
        **totals(loaded.model, length=context, capacity=context),
        "nats_per_token": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "bits_per_byte": float(values.sum()) / math.log(2) / max(1, size - _bytes(loaded.tokenizer, ids[0])),
    }


def _bytes(tokenizer: Tokenizer, token: int) -> int:
    """How much of the text the first token stands for: nothing, if it is a start token."""
    text = tokenizer.decode([token])
    if "\ufffd" not in text:
        return len(text.encode())
    written = tokenizer.token(token) or ""  # half a character: a byte, or one sign for every byte
    return 1 if written.startswith("<0x") else len(written)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m evals.perplexity", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="converted checkpoint or run of text")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text file")
    parser.add_argument("--context", type=int, help="tokens per window (default: what was trained, at most 1024)")
    parser.add_argument("--stride", type=int, help="tokens from window to window (default: the context)")
    parser.add_argument("--token-by-token", action="store_true", help="through the decode state, as an answer")
    parser.add_argument("--prefill", type=int, metavar="N", help="so, but the first N tokens of a window as a prompt")
    parser.add_argument("--max-tokens", type=int, help="only the beginning of the text")
    parser.add_argument("--attn", help="other options of the model's attention, such as softmax(window=64)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result here")
    add_flags(parser)
    args = parser.parse_args()
    text = read_text_file(args.text)
    loaded = load(args.checkpoint, attn=args.attn, asked=asked(args))
    context = min(1024, loaded.context) if args.context is None else args.context
    stride = context if args.stride is None else args.stride
    prefill = args.prefill if args.prefill is not None else 0 if args.token_by_token else None
    result = perplexity(loaded, text, context=context, stride=stride, prefill=prefill, max_tokens=args.max_tokens)
    print(json.dumps(result, indent=2), flush=True)
    if args.json:
        write_result(args.json, result)
    return 0


if __name__ == "__main__":
    run_cli(main)
