"""`python -m evals.duo_gates CKPT --text FILE --out DIR`: which key heads may stream, for the policy `duo`.

Trains a gate for every key head on passkeys hidden in the text (`jaxattn.analysis.duo_gates`), the model's weights
frozen, and writes DIR/heads.json with the head table `duo` and a picture of the gates. Then:

    python -m jaxattn.generate CKPT --policy='duo(sparsity=0.5, sinks=16, recent=64)' --heads DIR/heads.json …

The gates are of streaming heads with --sinks and --recent tokens; so few as make a difference at --length.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from evals.heads import bar
from evals.passkeys import passkeys
from evals.plot_style import figure, heat, in_style, png
from evals.text_file import read_text_file
from evals.write_result import results_in
from jaxattn.analysis.duo_gates import Gates, Training, train_gates
from jaxattn.command import run_cli
from jaxattn.errors import ConfigError
from jaxattn.head_tables import head_file
from jaxattn.policies.command import Asked
from jaxattn.policies.duo import TABLE, Spec
from jaxattn.runs.rundir import write_atomic, write_json_atomic
from jaxattn.text import Loaded, load


def picture(gates: Gates) -> bytes:
    """PNG: the gates of all key heads, and how far the twins were apart while these were trained."""
    layers, heads = gates.values.shape
    with in_style():
        made = figure(6.4, max(2.2, 0.11 * layers + 1.0))
        left, right = made.subplots(1, 2)
        made.colorbar(heat(left, gates.values), ax=left, label="gate")
        left.set(xlabel="key head", ylabel="layer", xticks=range(0, heads, max(1, heads // 8)))
        right.plot(gates.losses, color="#0072b2", lw=0.9)
        right.set(xlabel="step", ylabel="squared distance of the last vectors")
        return png(made)


def train(loaded: Loaded, text: str, spec: Spec, how: Training, *, length: int, keys: int, words: int) -> Gates:
    """The gates of a checkpoint on passkeys in a text.

    Raises:
      ConfigError: a sample that does not fit the model or the text.
    """
    limit = loaded.model.position_limit
    if limit and length > limit:
        raise ConfigError(f"--length is {length} but the model knows {limit} positions: make it shorter.")
    if spec.sinks + spec.recent >= length:
        raise ConfigError(
            f"--sinks {spec.sinks} and --recent {spec.recent} hold all of a --length of {length}, so every head could "
            "stream: make it longer, or keep less."
        )
    ids = np.asarray(loaded.tokenizer.encode(text, add_special_tokens=False), np.int32)
    samples = passkeys(loaded.tokenizer, ids, length=length, keys=keys, words=words)
    return train_gates(loaded.model, loaded.params, samples, spec, how, show=bar("gates"))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evals.duo_gates", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="converted checkpoint or run of text")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text file")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sample (default 1024)")
    parser.add_argument("--keys", type=int, default=5, help="passkeys of a sample (default 5; paper: 10)")
    parser.add_argument("--words", type=int, default=8, help="words of a passkey (default 8; paper: 32)")
    parser.add_argument("--sinks", type=int, default=16, help="of a streaming head (default 16; paper: 128)")
    parser.add_argument("--recent", type=int, default=64, help="of a streaming head (default 64; paper: 256)")
    parser.add_argument("--steps", type=int, default=200, help="samples (default 200; paper: 2000)")
    parser.add_argument("--learning-rate", type=float, default=0.02, help="default 0.02")
    parser.add_argument("--penalty", type=float, default=0.05, help="of the mean gate (default 0.05)")
    parser.add_argument("--out", type=Path, required=True, help="folder for heads.json and the picture")
    args = parser.parse_args()
    spec = Spec(sinks=args.sinks, recent=args.recent)
    how = Training(args.steps, args.learning_rate, args.penalty)
    text = read_text_file(args.text)
    loaded = load(args.checkpoint, asked=Asked("dense"))
    with results_in(args.out):
        gates = train(loaded, text, spec, how, length=args.length, keys=args.keys, words=args.words)
        write_atomic(args.out / "duo.png", picture(gates))
        write_json_atomic(
            args.out / "heads.json", head_file({TABLE: gates.table(loaded.model.num_heads)}, loaded.params)
        )
    quarters = ", ".join(f"{np.quantile(gates.values, q):.2f}" for q in (0.25, 0.5, 0.75))
    print(f"gates of {gates.values.size} key heads: mean {gates.values.mean():.2f}, quartiles {quarters}")
    print(f"head tables: {args.out / 'heads.json'}")
    return 0


if __name__ == "__main__":
    run_cli(main)
