"""`python -m evals.report RUN_DIR [RUN_DIR ...]`: one HTML page on when, where and why sinks emerge.

One run gives a report of that run (and its figures in RUN_DIR/plots); several give a comparison with curves
overlaid, heat maps on one colour scale and one table column per run. A run that is still training is reported
as far as it has come.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from evals.findings import key_numbers, loss_sentence, progress, verdict
from evals.plots import MAX_ROWS, draw, save_plots
from evals.plots_heads import MAX_PANELS
from evals.report_template import CSS, GLOSSARY, PAGE, Figures, differs, escape, table
from evals.run_files import NONTRIGGER, PROXY, Run, flatten, read_runs
from jaxattn.errors import DataError, run_cli

LOCAL = ("run_dir", "resume", "overwrite", "report")  # differ between any two runs and say nothing
log = logging.getLogger("jaxattn")


def write_report(run_dirs: Sequence[str | Path], out: str | Path, title: str | None = None) -> Path:
    """Write the report of one or several run folders to `out` and return its path.

    Raises `DataError`: a folder that is no run, a damaged file, an `out` that cannot be written.
    """
    if not run_dirs:
        raise DataError("no run directory was given: pass at least one.")
    out = Path(out)
    runs = read_runs(run_dirs)
    figures = draw(runs)
    _write(out, page(runs, figures, title))
    if len(runs) == 1:
        try:
            save_plots(runs[0].path, figures)
        except DataError as error:  # an archived run may be read-only; the report went elsewhere
            log.warning("%s", error)
    return out


def _write(out: Path, text: str) -> None:
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(text.encode("utf-8", "replace"))
        os.replace(temporary, out)
    except OSError as error:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            log.debug("%s was left behind", temporary)
        why = error.strerror or error
        raise DataError(f"the report cannot be written to {out}: {why}; choose another --out.") from error


# ------------------------------------------------------------------------------------------------ the page


def page(runs: Sequence[Run], figures: dict[str, bytes], title: str | None = None) -> str:
    """The whole HTML text."""
    names = " vs ".join(run.label for run in runs)
    title = title or "Attention sinks: " + (names if len(names) < 80 else f"{len(runs)} runs compared")
    shown = Figures(figures, len(runs))
    sections = (  # in reading order, which is the order of the figures' numbers
        ("summary", "Summary", _summary(runs)),
        ("curves", "Training curves", _curves(runs, shown)),
        ("heads", "Where: layers, heads, positions", _located(runs, shown)),
        ("maps", "Attention maps", _map_section(runs, shown)),
        ("extreme", "Why: extreme tokens", _extreme_section(runs, shown)),
        ("setup", "Configuration and environment", _setup(runs)),
        ("glossary", "Definitions", _glossary()),
    )
    body = "\n".join(f'<section id="{key}">\n<h2>{n}</h2>\n{text}\n</section>' for key, n, text in sections)
    return PAGE.substitute(
        title=escape(title),
        css=CSS,
        lede=" · ".join(f"<code>{escape(run.path)}</code>" for run in runs),
        nav="".join(f'<a href="#{key}">{name}</a>' for key, name, _ in sections),
        body=body,
    )


def _missing(runs: Iterable[Run], file: str, what: str) -> str:
    """A note for each run that lacks a file."""
    return "".join(
        f'<p class="missing"><b>{escape(run.label)}</b> has no {file} yet ({escape(progress(run))}): {what}</p>'
        for run in runs
    )


# ---------------------------------------------------------------------------------------------- sections


def _summary(runs: Sequence[Run]) -> str:
    verdicts = "\n".join(
        f'<p class="verdict" style="--run:{run.color}"><b>{escape(run.label)}</b>: {escape(verdict(run))}.</p>'
        for run in runs
    )
    torn = "".join(
        f'<p class="missing"><b>{escape(run.label)}</b>: the last line of metrics.jsonl is incomplete and '
        "was left out; the run is still writing it, or was killed.</p>"
        for run in runs
        if run.torn
    )
    numbers = key_numbers(runs)
    if len(runs) == 1:  # one narrow column would leave the page empty: two side by side
        half = (len(numbers) + 1) // 2
        tables = f'<div class="pair">{table(runs, numbers[:half])}{table(runs, numbers[half:])}</div>'
    else:
        tables = table(runs, numbers)
    parts = [verdicts, torn, "<h3>Key numbers</h3>", tables]
    if any(run.star for run in runs):
        parts.append('<p class="lede">* row-normalised |A| in place of A, see Definitions.</p>')
    differing = [row for row in _config_rows(runs) if differs(row[1]) and row[0] not in LOCAL]
    if len(runs) > 1:
        text = table(runs, differing, "config") if differing else "<p>The configurations are the same.</p>"
        parts += ["<h3>What differs in the configuration</h3>", text]
    return "\n".join(parts)


def _curves(runs: Sequence[Run], figures: Figures) -> str:
    sentences = "".join(
        f"<p>{f'<b>{escape(run.label)}</b>: ' if len(runs) > 1 else ''}{escape(text)}</p>"
        for run in runs
        if len(runs) <= 4 and (text := loss_sentence(run))  # the table has these numbers for any number of runs
    )
    loss = figures.show("loss", runs)
    none = '<p class="missing">No evaluation has been logged yet, so there is no sink rate to plot.</p>'
    return "\n".join(
        (
            sentences,
            f'<div class="row">\n{loss}{figures.show("sink_rate", runs) or none}\n</div>',
            figures.show("accuracy", runs),
            figures.show("dynamics", runs, _dynamics_note(runs)),
            figures.show("emergence", runs, f"At most the {MAX_ROWS} heads with the largest weight at the end."),
            figures.show("throughput", runs),
        )
    )


def _dynamics_note(runs: Sequence[Run]) -> str:
    keys = {key for run in runs for row in run.metrics for key in row}
    notes = ["Extremes over layers and heads"]
    notes += ["risks below 1e-4 are drawn there"] if "risk_bigram_excess" in keys else []
    notes += ["1 (dashed) means no value drain"] if "value_drain" in keys else []
    raw = [run.label for run in runs if run.star and run.is_bb and NONTRIGGER + PROXY not in keys]
    notes += [f"weights of {', '.join(raw)} as the model uses them, not row-normalised"] if raw else []
    return "; ".join(notes) + "."


def _located(runs: Sequence[Run], figures: Figures) -> str:
    early = [run for run in runs if run.sinks is None]
    note = _missing(early, "sinks.json", "the newest evaluation in metrics.jsonl is shown where there is one.")
    return "\n".join((note, figures.show("heads", runs), figures.show("positions", runs)))


def _map_section(runs: Sequence[Run], figures: Figures) -> str:
    parts = [_missing([r for r in runs if r.maps is None], "maps.npz", "no example attention maps to show.")]
    shown = [run for run in runs if run.maps is not None]
    scale = "Each row is scaled to sum to one and the colour scale is a square root, so that small weights show."
    mass = [
        f"{run.label} {low:.3g} to {high:.3g}"
        for run in shown
        if run.maps and run.star
        for low, high in [run.maps.mass()]
    ]
    if mass:
        scale += f" Row sums before scaling: {', '.join(mass)}."
    if any((run.data.get("meta") or {}).get("trigger_ids") for run in shown):
        scale += " Trigger queries have orange labels."
    if len(runs) > 1 and shown:
        scale += " The first 32 tokens are shown."
    parts.append(figures.show("maps", shown, scale))
    cap = max(4, MAX_PANELS // len(runs))
    for i, run in enumerate(runs):
        if run.maps is None:
            continue
        heads = run.maps.weights.shape[1] * run.maps.weights.shape[2]
        more = f"The {cap} of {heads} heads with the largest weight" if heads > cap else f"All {heads} heads"
        more += f" ({run.label})." if len(runs) > 1 else "."
        parts.append(figures.show(f"all_maps_{i}" if len(runs) > 1 else "all_maps", [run], more))
    return "\n".join(parts)


def _extreme_section(runs: Sequence[Run], figures: Figures) -> str:
    lacking = [run for run in runs if run.sinks is None]
    return _missing(lacking, "sinks.json", "norms of the first token against the others come with it.") + figures.show(
        "extreme", runs, "One dot per head; filled is the first token, open the mean of the others."
    )


# ------------------------------------------------------------------------------------------------- tables


def _config_rows(runs: Sequence[Run], of: str = "config") -> list[tuple[str, list[str]]]:
    """Every dotted field of any run with its value in each run."""
    flat = [flatten(getattr(run, of)) if getattr(run, of) else {} for run in runs]
    return [(key, [f.get(key, "–") for f in flat]) for key in dict.fromkeys(k for f in flat for k in f)]


def _setup(runs: Sequence[Run]) -> str:
    parts = []
    for of, name, file in (
        ("config", "Configuration", ""),
        ("environment", "Environment", "environment.json"),
        ("data", "Data", "data.json"),
    ):
        rows = _config_rows(runs, of)
        if not rows:
            parts.append(f'<p class="missing">{name}: no {file} in the run folder.</p>')
            continue
        count = sum(differs(values) for _, values in rows)
        found = f"{count} differ{'s' if count == 1 else ''}, marked ≠" if count else "none differs"
        many = f"; {found}" if len(runs) > 1 else ""
        fields = table(runs, rows, "config", mark=len(runs) > 1)
        parts.append(f"<details>\n<summary>{name} ({len(rows)} fields{many})</summary>\n{fields}\n</details>")
    return "\n".join(parts)


def _glossary() -> str:
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>\n" for k, v in GLOSSARY) + "</dl>"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evals.report",
        description="Write one self-contained HTML report of a training run, or a comparison of several.",
        epilog="examples:\n  python -m evals.report runs/bb-softmax-seed0\n"
        "  python -m evals.report runs/bb-softmax-seed0 runs/bb-sigmoid-seed0 --out compare.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a run; may be training still"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write (one run: default RUN_DIR/report.html)"
    )
    parser.add_argument("--title", metavar="TEXT", help="heading of the page (default: the attention names)")
    args = parser.parse_args()
    if args.out is None and len(args.run_dirs) > 1:
        raise DataError(f"{len(args.run_dirs)} runs are compared but --out is not given: add --out report.html.")
    print(write_report(args.run_dirs, args.out or args.run_dirs[0] / "report.html", args.title))
    return 0


if __name__ == "__main__":
    run_cli(main)
