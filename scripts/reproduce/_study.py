"""What the studies share: runs that are trained once, a table with mean and spread, expectations, the three files."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.axes import Axes

from evals.plot_style import figure, in_style, png
from jaxattn.errors import ConfigError, suggest, writing
from jaxattn.runs.config import RunConfig
from jaxattn.runs.load import read_config
from jaxattn.runs.manifest import diff_config
from jaxattn.runs.rundir import result_environment, write_json_atomic
from scripts.outputs import REMEDY, folder_to_write
from train.pretrain import run

RESULTS = Path(__file__).parent / "results"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d31", "#56b4e9", "#6a51a3", "#e69f00", "#444444", "#a50f15")
LOCAL = ("run_dir", "resume", "overwrite")  # differ between two runs of the same thing

Row = dict[str, Any]


class Expectation(NamedTuple):
    """One acceptance line: what should hold, what was found, whether it does."""

    text: str
    found: str
    holds: bool


def arguments(name: str, doc: str | None, presets: Sequence[str] = ("cpu", "gpu")) -> argparse.ArgumentParser:
    """The options every study has: --preset, --seeds, --steps, --runs-dir, --out."""
    parser = argparse.ArgumentParser(
        prog=f"python -m scripts.reproduce.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=presets, default=presets[0], help="cpu: minutes; gpu: paper sizes")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per variant (default 3)")
    parser.add_argument("--steps", type=int, help="optimiser steps, to try the script out (default: the preset's)")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs") / name, help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the table and the plot go")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse numbers below 1, and an --out where nothing can be written.

    Raises:
      UserError: naming the flag.
    """
    for flag in ("seeds", "steps"):
        value = getattr(args, flag, None)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag} is {value} but must be at least 1.")
    folder_to_write(args.out)


def train(cfg: RunConfig) -> list[Row]:
    """Train, quietly, unless this very run has ended already; returns the rows of metrics.jsonl."""
    folder = Path(cfg.run_dir)
    if not _finished(folder, cfg):
        print(f"training {folder}", flush=True)
        with contextlib.redirect_stdout(io.StringIO()):
            code = run(dataclasses.replace(cfg, overwrite=folder.exists()))
        if code or not _finished(folder, cfg):  # stopped; by SIGTERM with code 0
            raise KeyboardInterrupt
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def _finished(folder: Path, cfg: RunConfig) -> bool:
    """Whether the folder holds this configuration, trained to its end (`sinks.json` is written last)."""
    if not (folder / "sinks.json").exists():
        return False
    saved = read_config(folder)
    resolved = cfg.resolved()  # the vocabulary's size is known only once the data are open
    wanted = dataclasses.replace(resolved, model=dataclasses.replace(resolved.model, vocab_size=saved.model.vocab_size))
    return not diff_config(saved.to_dict(), wanted.to_dict(), ignore=LOCAL)


def pick(items: Sequence[Any], only: str | None, name: Callable[[Any], str]) -> list[Any]:
    """The items whose name is in the comma-separated list `only`; all of them without one.

    Raises:
      ConfigError: a name that no item has.
    """
    if only is None:
        return list(items)
    known = list(dict.fromkeys(name(item) for item in items))
    wanted = [word.strip() for word in only.split(",")]
    for word in wanted:
        if word not in known:
            raise ConfigError(suggest("--only", word, known))
    return [item for item in items if name(item) in wanted]


def last(rows: Sequence[Row], key: str) -> float:
    """The newest value of a metric."""
    return next(float(row[key]) for row in reversed(rows) if row.get(key) is not None)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    return float(np.mean(values)), float(np.std(values))


def select(rows: Sequence[Row], key: str, **wanted: Any) -> list[float]:
    """`key` of the rows whose other fields are as wanted."""
    return [row[key] for row in rows if all(row[name] == value for name, value in wanted.items())]


def markdown(rows: Sequence[Row], columns: Sequence[str], by: Sequence[str]) -> str:
    """One line for each combination of the `by` columns, the others as mean ± spread over its rows (seeds)."""
    lines = ["| " + " | ".join((*columns, "seeds")) + " |", "|" + "---|" * (len(columns) + 1)]
    for group in dict.fromkeys(tuple(row[c] for c in by) for row in rows):
        mine = [row for row in rows if tuple(row[c] for c in by) == group]
        cells = [_cell([row[c] for row in mine], c in by) for c in columns]
        lines.append("| " + " | ".join([*cells, str(len(mine))]) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: list[Any], fixed: bool) -> str:
    if fixed or not isinstance(values[0], int | float) or isinstance(values[0], bool):
        return str(values[0]) if len(set(map(str, values))) == 1 else ", ".join(map(str, values))
    mean, sd = spread(values)
    return f"{mean:.4g} ± {sd:.2g}" if len(values) > 1 else f"{mean:.4g}"


def expectations_table(expectations: Sequence[Expectation]) -> str:
    """A line for each expectation."""
    lines = ["| expected | found | |", "|---|---|---|"]
    lines += [f"| {e.text} | {e.found} | {'holds' if e.holds else '**fails**'} |" for e in expectations]
    return "\n".join(lines) + "\n"


def save_figure(path: Path, width: float, height: float, panels: int, draw: Callable[..., None]) -> None:
    """Draw `panels` axes side by side with `draw(*axes)` and write the PNG."""
    with in_style():
        made = figure(width, height)
        axes: list[Axes] = list(made.subplots(1, panels, squeeze=False)[0])
        for ax in axes:
            ax.grid(True)
        draw(*axes)
        with writing(path, REMEDY):
            path.write_bytes(png(made))


def write_rows(path: Path, rows: Sequence[Row], **more: Any) -> None:
    """Write NAME.json: the rows, what else there is to say, the device and the versions."""
    where = {"device": jax.devices()[0].device_kind, "environment": result_environment()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, {**more, "rows": list(rows), **where})


def known_rows(path: Path, setup: dict[str, Any]) -> list[Row]:
    """The rows of NAME.json that were measured before with this setup."""
    if not path.is_file():
        return []
    result = json.loads(path.read_text("utf-8"))
    return result["rows"] if result.get("setup") == setup else []


def finish(
    name: str,
    out: Path,
    *,
    title: str,
    setup: dict[str, Any],
    rows: Sequence[Row],
    table: str,
    expectations: Sequence[Expectation],
    paper: str,
) -> int:
    """Write NAME.json and NAME.md, print the table; 0 if every expectation holds, else 1."""
    device = jax.devices()[0].device_kind
    lines = [f"# {title}", ", ".join(f"{k} {v}" for k, v in setup.items()) + f". Device: {device}.", table]
    lines += [expectations_table(expectations), f"The paper: {paper}"]
    text = "\n\n".join(line.strip("\n") for line in lines) + "\n"
    print(text)
    with writing(out, REMEDY):
        write_rows(out / f"{name}.json", rows, setup=setup, expectations=[e._asdict() for e in expectations])
        (out / f"{name}.md").write_text(text, encoding="utf-8")
    return 0 if all(e.holds for e in expectations) else 1
