"""Training speed against sequence length, and the cost of a decoded token against what came before it.

    python -m scripts.reproduce.constant_speed [--preset cpu|gpu] [--rounds 5]

Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention (arXiv 2405.17381). One small
decoder per attention, a fixed number of tokens a step (batch x length), lengths from 1k to 32k. All programs are
compiled first; then every round runs each of them once, in a new order, so that what slows the machine down slows
all of them. Medians over rounds. Decoding measures the last tokens of T, behind all the others. Exits 1 if an
expectation fails:

  training    lightning and linear: slowest length at least 0.9 of the fastest; softmax: below half of its own best
  decoding    recurrent attentions: the same state bytes at every T, and ms a token within a factor of 1.5
  decoding    softmax: the state grows in proportion to T, and ms a token to more than twice those of the least T
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import jaxattn
from jaxattn import _generate as generation
from jaxattn.command import run_cli
from jaxattn.errors import ConfigError
from jaxattn.mechanisms import get, names
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from jaxattn.reader import piece_for
from jaxattn.runs.config import OptimConfig
from scripts.reproduce import _study as study
from train.step import init_state, make_train_step

TRAINED = ("lightning", "linear", "softmax")
DECODED = ("linear", "lightning", "transnormer", "based", "titans", "aaren", "softmax")
PAPER = (
    "tokens per GPU and second flat from 1K to 128K for lightning attention; forward 0.59 / 2.24 / 4.41 / 17.7 ms at "
    "1K / 4K / 8K / 32K tokens against 0.23 / 2.74 / 10.4 / 163 ms of FlashAttention-2 (A100)."
)


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes; attentions that are quadratic in the length stop at `quadratic_up_to`."""

    layers: int
    width: int
    heads: int
    vocab: int
    tokens: int
    lengths: tuple[int, ...]
    quadratic_up_to: int
    decode_lengths: tuple[int, ...]
    decode_tokens: int  # what is before them is read in whole pieces of `generation.CHUNK`
    dtype: Literal["float32", "bfloat16"] = "float32"

    def model(self, attn: str) -> ModelConfig:
        return ModelConfig(
            vocab_size=self.vocab,
            num_layers=self.layers,
            d_model=self.width,
            num_heads=self.heads,
            mixers=(attn,),
            mlps=("swiglu",),
            position="nope",
            dtype=self.dtype,
        )


SCALES = {
    "cpu": Scale(
        layers=2, width=128, heads=2, vocab=512, tokens=32_768, lengths=(1024, 2048, 4096, 8192, 16_384, 32_768),
        quadratic_up_to=8192, decode_lengths=(1024, 4096, 16_384), decode_tokens=512,
    ),
    "gpu": Scale(
        layers=12, width=1024, heads=8, vocab=50_432, tokens=131_072,
        lengths=(1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072), quadratic_up_to=32_768,
        decode_lengths=(1024, 4096, 16_384, 65_536), decode_tokens=512, dtype="bfloat16",
    ),
}  # fmt: skip


def training_step(model: ModelConfig, batch: int, length: int) -> Callable[[], float]:
    """Compile one step; each call of the result runs it once more and returns its seconds."""
    optim = OptimConfig()
    step = make_train_step(model, optim, 1000)
    state = init_state(model, optim, 1000, seed=0)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (batch, length + 1)).astype(np.int32)
    inputs = {
        "tokens": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "positions": jnp.tile(jnp.arange(length, dtype=jnp.int32), (batch, 1)),
        "segment_ids": jnp.ones((batch, length), jnp.int32),
        "loss_mask": jnp.ones((batch, length), bool),
    }

    def once() -> float:
        nonlocal state
        start = time.perf_counter()
        state, numbers = step(state, inputs)
        numbers["loss"].block_until_ready()
        return time.perf_counter() - start

    once()
    return once


def decoding_step(model: ModelConfig, length: int, count: int) -> tuple[Callable[[], float], int]:
    """Compile `count` tokens of decoding that fill a state up to `length` tokens; seconds a token, and its bytes.

    The tokens before these have been read: of a state that is empty, an attention may skip what holds nothing.
    """
    decoder, before = Decoder(model), length - count
    params = decoder.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    variables = jaxattn.decoding_variables(model, params)
    prompt = np.random.default_rng(0).integers(0, model.vocab_size, (1, before)).astype(np.int32)
    piece, keys = piece_for(model, before), jax.random.split(jax.random.key(0), 1)
    room = -(-before // piece) * piece + count
    cursor = generation.prefill(model, variables, prompt, np.array([before]), room, keys)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cursor.states))

    @partial(jax.jit, donate_argnums=0)
    def step(states: Any, token: Any, position: Any) -> Any:
        out: Any = decoder.apply(variables, states, token, position, method="step")
        logits, states = out
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), states

    def once() -> float:
        states, token = jax.tree.map(jnp.copy, cursor.states), jnp.zeros((1, 1), jnp.int32)
        jax.block_until_ready(states)
        begin = time.perf_counter()
        for i in range(before, length):
            token, states = step(states, token, jnp.full((1, 1), i, jnp.int32))
        token.block_until_ready()
        return (time.perf_counter() - begin) / count

    once()
    return once, size


def rounds(programs: dict[Any, Callable[[], float]], count: int) -> dict[Any, list[float]]:
    """Every program once a round, in an order that changes."""
    found: dict[Any, list[float]] = {key: [] for key in programs}
    for number in range(count):
        order = list(programs)
        random.Random(number).shuffle(order)
        for key in order:
            found[key].append(programs[key]())
    return found


def measure_training(scale: Scale, count: int) -> list[study.Row]:
    """Rows of tokens per second by attention and length."""
    programs = {}
    for attn in TRAINED:
        for length in scale.lengths:
            if get(attn).capabilities.state != "recurrent" and length > scale.quadratic_up_to:
                continue
            print(f"compiling {attn} at {length}", flush=True)
            programs[attn, length] = training_step(scale.model(attn), scale.tokens // length, length)
    return [
        {
            "what": "training",
            "attention": attn,
            "length": length,
            "tokens_per_s": scale.tokens / float(np.median(seconds)),
            "slowest": scale.tokens / max(seconds),
            "fastest": scale.tokens / min(seconds),
        }
        for (attn, length), seconds in rounds(programs, count).items()
    ]


def measure_decoding(scale: Scale, count: int) -> list[study.Row]:
    """Rows of ms per token and state bytes by attention and length."""
    programs, sizes = {}, {}
    for attn in DECODED:
        if attn not in names():
            print(f"{attn} is not registered and is left out", flush=True)
            continue
        for length in scale.decode_lengths:
            print(f"compiling {attn} for decoding behind {length}", flush=True)
            programs[attn, length], sizes[attn, length] = decoding_step(scale.model(attn), length, scale.decode_tokens)
    return [
        {
            "what": "decoding",
            "attention": attn,
            "length": length,
            "ms_per_token": 1000 * float(np.median(seconds)),
            "slowest": 1000 * max(seconds),
            "fastest": 1000 * min(seconds),
            "state_bytes": sizes[attn, length],
        }
        for (attn, length), seconds in rounds(programs, count).items()
    ]


def expect(rows: list[study.Row]) -> list[study.Expectation]:
    """The acceptance lines."""
    out = []
    for attn in TRAINED:
        speeds = study.select(rows, "tokens_per_s", what="training", attention=attn)
        share = min(speeds) / max(speeds)
        if get(attn).capabilities.state == "recurrent":
            out.append(study.Expectation(f"training, {attn}: slowest >= 0.9 of fastest", f"{share:.2f}", share >= 0.9))
        else:
            out.append(study.Expectation(f"training, {attn}: slowest < 0.5 of fastest", f"{share:.2f}", share < 0.5))
    for attn in dict.fromkeys(row["attention"] for row in rows if row["what"] == "decoding"):
        sizes = study.select(rows, "state_bytes", what="decoding", attention=attn)
        times = study.select(rows, "ms_per_token", what="decoding", attention=attn)
        lengths = study.select(rows, "length", what="decoding", attention=attn)
        growth, slower = sizes[-1] / sizes[0], max(times) / min(times)
        if get(attn).capabilities.state == "recurrent":
            text = f"decoding, {attn}: one state size, ms a token within 1.5"
            out.append(study.Expectation(text, f"{growth:.2f}, {slower:.2f}", growth == 1 and slower < 1.5))
        else:
            ratio = lengths[-1] / lengths[0]
            text = f"decoding, {attn}: the state grows with T ({ratio:g} times)"
            out.append(study.Expectation(text, f"{growth:.2f}", abs(growth / ratio - 1) < 0.05))
            text = f"decoding, {attn}: ms a token more than double"
            out.append(study.Expectation(text, f"{times[-1] / times[0]:.2f}", times[-1] > 2 * times[0]))
    return out


def tables(rows: list[study.Row]) -> str:
    """Training and decoding, one line an attention and length."""
    lines = ["| training | length | tokens/s, median | slowest round | fastest round |", "|---|---|---|---|---|"]
    for row in rows:
        if row["what"] == "training":
            numbers = " | ".join(f"{row[k]:,.0f}" for k in ("tokens_per_s", "slowest", "fastest"))
            lines.append(f"| {row['attention']} | {row['length']} | {numbers} |")
    lines += ["", "| decoding | behind | ms/token, median | slowest | fastest | state bytes |", "|---" * 6 + "|"]
    for row in rows:
        if row["what"] == "decoding":
            numbers = " | ".join(f"{row[k]:.3f}" for k in ("ms_per_token", "slowest", "fastest"))
            lines.append(f"| {row['attention']} | {row['length']} | {numbers} | {row['state_bytes']:,} |")
    return "\n".join(lines)


def draw(rows: list[study.Row], left: Any, middle: Any, right: Any) -> None:
    """Tokens per second in training; ms per token and state bytes in decoding."""
    for ax, what, key in (
        (left, "training", "tokens_per_s"),
        (middle, "decoding", "ms_per_token"),
        (right, "decoding", "state_bytes"),
    ):
        colors, x = dict(zip(DECODED, study.COLORS, strict=False)), []
        for attn in dict.fromkeys(row["attention"] for row in rows if row["what"] == what):
            x = study.select(rows, "length", what=what, attention=attn)
            y = study.select(rows, key, what=what, attention=attn)
            ax.plot(x, y, "o-", color=colors[attn], label=attn, ms=3)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(x, [f"{n // 1024}k" for n in x])
    left.set_xticks(sorted({r["length"] for r in rows if r["what"] == "training"}))
    left.set_xticklabels([f"{n // 1024}k" for n in sorted({r["length"] for r in rows if r["what"] == "training"})])
    left.set(xlabel="tokens a sequence", ylabel="training tokens/s")
    middle.set(xlabel="tokens before", ylabel="decoding ms/token")
    right.set(xlabel="tokens before", ylabel="decode state (bytes)")
    middle.legend(fontsize=6.5)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.reproduce.constant_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="how often each program is timed (default 5)")
    parser.add_argument("--longest", type=int, help="leave longer sequences out, to try the script")
    parser.add_argument("--out", type=study.Path, default=study.RESULTS, help="where the table and the plot go")
    args = parser.parse_args()
    scale = SCALES[args.preset]
    if args.rounds < 1:
        raise ConfigError(f"--rounds is {args.rounds} but must be at least 1.")
    if args.longest is not None:
        if args.longest < scale.lengths[1]:
            raise ConfigError(f"--longest is {args.longest} but must leave two lengths: use {scale.lengths[1]}.")
        keep = lambda lengths: tuple(n for n in lengths if n <= args.longest)
        scale = dataclasses.replace(scale, lengths=keep(scale.lengths), tokens=max(keep(scale.lengths)))
        scale = dataclasses.replace(scale, decode_lengths=keep(scale.decode_lengths) or scale.decode_lengths[:1])
    study.check(args)
    rows = measure_training(scale, args.rounds) + measure_decoding(scale, args.rounds)
    study.save_figure(args.out / "constant_speed.png", 9.6, 3.0, 3, lambda *axes: draw(rows, *axes))
    return study.finish(
        "constant_speed",
        args.out,
        title="Speed against sequence length",
        setup={
            "preset": args.preset,
            "layers": scale.layers,
            "width": scale.width,
            "heads": scale.heads,
            "tokens a step": scale.tokens,
            "rounds": args.rounds,
        },
        rows=rows,
        table=tables(rows),
        expectations=expect(rows),
        paper=PAPER,
    )


if __name__ == "__main__":
    run_cli(main)
