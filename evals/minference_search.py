"""`python -m evals.minference_search CKPT --text FILE [--tokens N] --out heads.json`

Finds the sparse pattern and the budgets of every head for the policy `minference`, on the beginning of a text: what
reads no more than an A-shape of `--init` and `--local` tokens and comes closest to dense attention's output. Writes the
head tables, and beside them a picture of the patterns and of how far they are from dense. Then:

    python -m jaxattn.generate CKPT --policy='minference(block=64)' --heads heads.json …
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm

from evals.plot_style import figure, heat, in_style, png
from evals.progress import bar
from evals.text_file import read_text_file
from jaxattn.analysis.minference_search import Found, search
from jaxattn.command import run_cli
from jaxattn.errors import ConfigError, DataError, writing
from jaxattn.head_tables import head_file
from jaxattn.policies.command import Asked
from jaxattn.policies.minference import PATTERN, PATTERNS, Spec
from jaxattn.runs.rundir import write_atomic, write_json_atomic
from jaxattn.text import load

COLORS = ("#0072b2", "#e69f00", "#009e73")


def plot(found: Found) -> bytes:
    """Layers and heads: which pattern, and the distance from dense of the A-shape and of what was chosen."""
    layers, heads = found.tables[PATTERN].shape
    best, shape = found.errors.min(axis=2), found.errors[:, :, 0]
    with in_style():
        made = figure(8.6, max(2.4, 0.11 * layers + 1.0))
        left, middle, right = made.subplots(1, 3)
        colours = {"cmap": ListedColormap(COLORS), "norm": BoundaryNorm([-0.5, 0.5, 1.5, 2.5], 3)}
        kinds = heat(left, found.tables[PATTERN], **colours)
        made.colorbar(kinds, ax=left, ticks=range(3)).ax.set_yticklabels([name.replace("_", "\n") for name in PATTERNS])
        values = np.concatenate([shape[shape > 0], best[best > 0], [1e-6]])
        norm = LogNorm(max(1e-6, float(np.min(values))), max(1e-5, float(np.max(values[np.isfinite(values)]))))
        for ax, table in ((middle, shape), (right, best)):
            drawn = heat(ax, np.maximum(table, 1e-6), norm=norm)
        made.colorbar(drawn, ax=right, label="|o - dense|² / |dense|²")
        for ax, name in ((left, "pattern"), (middle, "A-shape"), (right, "pattern of the head")):
            ax.set(title=name, xlabel="head", xticks=range(0, heads, max(1, heads // 8)))
        left.set_ylabel("layer")
        share = found.target / found.dense
        made.suptitle(f"at most {100 * share:.1f} % of dense attention's tiles", fontsize=8.5)
        return png(made)


def summary(found: Found) -> dict[str, Any]:
    """What the command prints."""
    counts = {name: int(np.sum(found.tables[PATTERN] == n)) for n, name in enumerate(PATTERNS)}
    return {
        "heads": counts,
        "target_density": found.target / found.dense,
        "density": float(found.tiles.mean()) / found.dense,
        "error_a_shape": float(found.errors[:, :, 0].mean()),
        "error": float(found.errors.min(axis=2).mean()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evals.minference_search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="converted checkpoint or run of text")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text file")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text, read as one prompt (default 4096)")
    parser.add_argument("--init", type=int, help="first tokens of the A-shape (default: 1/32 of the tokens)")
    parser.add_argument("--local", type=int, help="nearest tokens of the A-shape (default: 1/8 of the tokens)")
    parser.add_argument("--block", type=int, default=64, help="tokens of a block (default 64)")
    parser.add_argument("--out", type=Path, required=True, help="head tables, JSON")
    args = parser.parse_args()
    text = read_text_file(args.text)
    loaded = load(args.checkpoint, asked=Asked("dense"))
    limit = loaded.model.position_limit
    if args.tokens < 2 or (limit and args.tokens > limit):
        raise ConfigError(f"--tokens is {args.tokens} but must be from 2 to {limit or 'any number'}.")
    ids = np.asarray(loaded.encode(text), np.int32)[: args.tokens]
    if len(ids) < args.tokens:
        raise DataError(f"{args.text} has {len(ids)} tokens but --tokens is {args.tokens}: give a longer text.")
    share = lambda given, part: -(-args.tokens // part) if given is None else given
    spec = Spec(init=share(args.init, 32), local=share(args.local, 8), block=args.block)
    found = search(loaded.model, loaded.params, ids, spec, show=bar("layers"))
    with writing(args.out, "choose another --out"):
        write_json_atomic(args.out, head_file(found.tables, loaded.params))
        write_atomic(args.out.with_suffix(".png"), plot(found))
    print(json.dumps(summary(found), indent=2))
    return 0


if __name__ == "__main__":
    run_cli(main)
