"""`python -m evals.report RUN_DIR [RUN_DIR ...]`: one HTML page on when, where and why sinks emerge.

One run gives a report of that run, several a comparison: runs that differ in seeds alone are one group with mean and
range, curves are overlaid, heat maps have one colour scale, tables one column per group. A run that is still training
is reported as far as it has come. Every figure is also left as PNG, SVG and CSV, every table as CSV: in RUN_DIR/plots
for RUN_DIR/report.html, else in NAME_files beside the page. The page itself needs none of them.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from evals import exports
from evals.cautions import cautions
from evals.findings import group_verdict, loss_sentence, progress, verdict
from evals.groups import LOCAL, SEEDS, Group, read_groups
from evals.key_numbers import key_numbers
from evals.plots import Drawn, draw
from evals.plots_maps import MOST_GROUPS, example, panels_shown, tokens_shown
from evals.read_run import Run, flatten
from evals.report_template import CSS, PAGE, Figures, differs, escape, glossary, table
from jaxattn.command import run_cli
from jaxattn.errors import DataError

log = logging.getLogger("jaxattn")

Rows = list[tuple[str, list[str]]]


def write_report(run_dirs: Sequence[str | Path], out: str | Path, title: str | None = None) -> Path:
    """Write the report of one or several run folders to `out`, its figures and tables beside it, and return its path.

    Raises `DataError`: a folder that is no run, a damaged file, an `out` that cannot be written.
    """
    if not run_dirs:
        raise DataError("no run directory was given: pass at least one.")
    out = Path(out)
    groups = read_groups(run_dirs)
    runs = [run for group in groups for run in group.runs]
    folder = exports.folder_for(out, runs[0].path if len(runs) == 1 else None)
    figures = draw(groups)
    numbers, flat = key_numbers(groups)
    tables = {"key_numbers": flat} | {of: config_csv(runs, of) for of in ("config", "environment", "data")}
    tables = {name: rows for name, rows in tables.items() if rows}
    exports.write_page(out, page(groups, figures, numbers, title, folder.name))
    exports.save(folder, figures, tables)
    return out


# ------------------------------------------------------------------------------------------------ the page


def page(groups: Sequence[Group], figures: dict[str, Drawn], numbers: Rows, title: str | None, folder: str) -> str:
    """The whole HTML text; `folder` is where the files beside it are."""
    runs = [run for group in groups for run in group.runs]
    names = " vs ".join(group.title for group in groups)
    title = title or "Attention sinks: " + (names if len(names) < 80 else f"{len(runs)} runs compared")
    shown = Figures(figures, len(runs), folder)
    sections = (  # in reading order, which is the order of the figures' numbers
        ("summary", "Summary", _summary(groups, numbers, folder)),
        ("curves", "Training curves", _curves(groups, shown)),
        ("heads", "Where: layers, heads, positions", _located(runs, groups, shown)),
        ("maps", "Attention maps", _map_section(groups, shown)),
        ("extreme", "Why: extreme tokens", _extreme_section(runs, groups, shown)),
        ("setup", "Configuration and environment", _setup(runs, folder)),
        ("glossary", "Definitions", glossary(_keys(runs))),
    )
    body = "\n".join(f'<section id="{key}">\n<h2>{n}</h2>\n{text}\n</section>' for key, n, text in sections)
    return PAGE.substitute(
        title=escape(title),
        css=CSS,
        lede=_folders(runs),
        nav="".join(f'<a href="#{key}">{name}</a>' for key, name, _ in sections),
        body=body,
        files=escape(folder),
    )


def _keys(runs: Sequence[Run]) -> set[str]:
    """The names of all numbers that some run has."""
    rows = [row for run in runs for row in [*run.metrics, run.sinks or {}, run.entropies]]
    return {key for row in rows for key, value in row.items() if value is not None}


def _folders(runs: Sequence[Run]) -> str:
    """The run folders; what they lie in once, where they are many in one place."""
    parents = {run.path.parent for run in runs}
    if len(runs) < 3 or len(parents) > 1:
        return " · ".join(f"<code>{escape(run.path)}</code>" for run in runs)
    names = " · ".join(f"<code>{escape(run.path.name)}</code>" for run in runs)
    return f"in <code>{escape(parents.pop())}</code>: {names}"


def _missing(runs: Iterable[Run], file: str, what: str) -> str:
    """A note for each run that lacks a file, or went on after it was written."""
    return "".join(
        f'<p class="missing"><b>{escape(run.label)}</b> has no final {file} yet ({escape(progress(run))}): {what}</p>'
        for run in runs
    )


# ---------------------------------------------------------------------------------------------- sections


def _summary(groups: Sequence[Group], numbers: Rows, folder: str) -> str:
    runs = [run for group in groups for run in group.runs]
    verdicts = "\n".join(_verdict(group) for group in groups)
    torn = "".join(
        f'<p class="missing"><b>{escape(run.label)}</b>: the last line of metrics.jsonl is incomplete and '
        "was left out; the run is still writing it, or was killed.</p>"
        for run in runs
        if run.torn
    )
    if len(groups) == 1 and not groups[0].many:  # one narrow column would leave the page empty: two side by side
        half = (len(numbers) + 1) // 2
        tables = f'<div class="pair">{table(groups, numbers[:half])}{table(groups, numbers[half:])}</div>'
    else:
        tables = table(groups, numbers)
    said = ["Several seeds: mean (smallest to largest)."] if any(group.many for group in groups) else []
    said += ["* a number of row shares A', see Definitions."] if any(run.star for run in runs) else []
    said += [f'Run by run: <a href="{escape(folder)}/key_numbers.csv">CSV</a>']
    parts = [verdicts, torn, "<h3>Key numbers</h3>", tables, f'<p class="lede">{" ".join(said)}</p>']
    if warned := cautions(groups):
        said = "".join(f"<li>{escape(text)}</li>" for text in warned)
        parts.append(f'<h3>What this comparison hangs on</h3>\n<ul class="cautions">{said}</ul>')
    if len(groups) > 1:
        unlike = lambda row: differs(row[1]) and not row[0].startswith((*SEEDS, *LOCAL))
        differing = [row for row in _config_rows([group.first for group in groups]) if unlike(row)]
        text = table(groups, differing, "config") if differing else "<p>The configurations are the same.</p>"
        parts += ["<h3>What differs in the configuration</h3>", text]
    return "\n".join(parts)


def _verdict(group: Group) -> str:
    """The finding on one group, its seeds one by one below."""
    if not group.many:
        said = f"<b>{escape(group.label)}</b>: {escape(verdict(group.first))}."
    else:
        each = "".join(f"<li>seed {escape(run.seed)}: {escape(verdict(run))}.</li>" for run in group.runs)
        said = f"<b>{escape(group.title)}</b>: {escape(group_verdict(group))}.<ul>{each}</ul>"
    return f'<div class="verdict" style="--run:{group.color}">{said}</div>'


def _curves(groups: Sequence[Group], figures: Figures) -> str:
    runs = [run for group in groups for run in group.runs]
    sentences = "".join(
        f"<p>{f'<b>{escape(run.label)}</b>: ' if len(runs) > 1 else ''}{escape(text)}</p>"
        for run in runs
        if len(runs) <= 4 and (text := loss_sentence(run))  # the table has these numbers for any number of runs
    )
    over = ""
    if any(group.many for group in groups):
        over = "Curves of several seeds end where the first of them does."
    first = figures.show("loss", groups, over) + (figures.show("sink_rate", groups) or NO_RATE)
    return "\n".join(
        (
            sentences,
            f'<div class="row">\n{first}\n</div>',
            figures.show("accuracy", groups),
            figures.show("dynamics", groups, _dynamics_note(runs)),
            figures.show("emergence", groups, "Where there are many heads, those with the largest weight at the end."),
            figures.show("throughput", groups, "Medians of a few steps." if len(groups) > 1 else ""),
        )
    )


NO_RATE = '<p class="missing">No evaluation has been logged yet, so there is no sink rate to plot.</p>'


def _dynamics_note(runs: Sequence[Run]) -> str:
    keys = {key for run in runs for row in run.metrics for key in row}
    notes = ["Risks below 1e-4 are drawn there"] if "risk_bigram_excess" in keys else []
    notes += ["1 (dashed) means no value drain"] if "value_drain" in keys else []
    alike = {run.start_key for run in runs if any(run.start_key in row for row in run.metrics)}
    notes += ["start-token weights of runs on other data than Bigram-Backcopy are α₁"] if len(alike) > 1 else []
    return "; ".join(notes) + "." if notes else ""


def _located(runs: Sequence[Run], groups: Sequence[Group], figures: Figures) -> str:
    early = [run for run in runs if run.sinks is None]
    note = _missing(early, "sinks.json", "the newest evaluation in metrics.jsonl is shown where there is one.")
    bb = "A cell dark only for non-trigger queries is an active-dormant head." if any(r.is_bb for r in runs) else ""
    return "\n".join((note, figures.show("heads", groups, bb), figures.show("positions", groups)))


def _map_section(groups: Sequence[Group], figures: Figures) -> str:
    found = [(group, run) for group in groups if (run := example(group)) is not None]
    parts = [
        _missing([g.first for g in groups if example(g) is None], "maps.npz", "no example attention maps to show.")
    ]
    scale = "Each row is scaled to sum to one and the colour scale is a square root, so that small weights show."
    sums = [(group.label, *run.maps.mass()) for group, run in found if run.star and run.maps]
    mass = [f"{label} {low:.3g} to {high:.3g}" for label, low, high in sums]
    scale += f" Row sums before scaling: {'; '.join(mass)}." if mass else ""
    if any((run.data.get("meta") or {}).get("trigger_ids") for _, run in found):
        scale += " Trigger queries have orange labels."
    if len(groups) > 1:
        scale += f" The first {tokens_shown(len(found))} tokens are shown."
    if any(group.many for group in groups):
        scale += " Of several seeds the first is shown."
    parts.append(figures.show("maps", groups, scale))
    if len(groups) > MOST_GROUPS and found:
        parts.append(f'<p class="lede">All heads are drawn where at most {MOST_GROUPS} groups are compared.</p>')
    cap = panels_shown(len(groups))
    for i, group in enumerate(groups):
        run = example(group)
        if run is None or run.maps is None:
            continue
        heads = run.maps.weights.shape[1] * run.maps.weights.shape[2]
        more = f"The {cap} of {heads} heads with the largest weight" if heads > cap else f"All {heads} heads"
        more += f" of {run.label}." if len(groups) > 1 or group.many else "."
        parts.append(figures.show(f"all_maps_{i}" if len(groups) > 1 else "all_maps", [group], more))
    return "\n".join(parts)


def _extreme_section(runs: Sequence[Run], groups: Sequence[Group], figures: Figures) -> str:
    lacking = [run for run in runs if run.sinks is None]
    note = "One dot per head and seed; filled is the first token, open the mean of the others."
    text = _missing(lacking, "sinks.json", "norms of the first token against the others come with it.")
    return text + figures.show("extreme", groups, note)


# ------------------------------------------------------------------------------------------------- tables


def _config_rows(runs: Sequence[Run], of: str = "config") -> Rows:
    """Every dotted field of any run with its value in each run."""
    flat = [flatten(getattr(run, of)) if getattr(run, of) else {} for run in runs]
    return [(key, [f.get(key, "–") for f in flat]) for key in dict.fromkeys(k for f in flat for k in f)]


def config_csv(runs: Sequence[Run], of: str) -> list[dict[str, Any]]:
    """One row per field of any run, one column per run folder."""
    paths = [str(run.path) for run in runs]
    return [{"field": key, **dict(zip(paths, values, strict=True))} for key, values in _config_rows(runs, of)]


def _setup(runs: Sequence[Run], folder: str) -> str:
    parts = []
    columns = [Group([run], run.label) for run in runs]
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
        fields = table(columns, rows, "config", mark=len(runs) > 1)
        csv = f'<p class="lede"><a href="{escape(folder)}/{of}.csv">CSV</a></p>'
        parts.append(f"<details>\n<summary>{name} ({len(rows)} fields{many})</summary>\n{fields}\n{csv}\n</details>")
    return "\n".join(parts)


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
