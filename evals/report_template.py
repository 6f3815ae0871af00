"""The page of a report: HTML shell, style sheet, captions, glossary, tables. Nothing loads from outside."""

from __future__ import annotations

import base64
import html
import struct
from collections.abc import Collection, Mapping, Sequence
from string import Template

from evals.definitions import MEASURED, TERMS
from evals.groups import Group
from evals.plot_style import dpi_of
from evals.plots import Drawn

CSS_DPI = 112  # pixels of the page per inch of a figure
ENDS = ("png", "svg", "csv")

CSS = """
:root { color-scheme: light; --ink: #1f2328; --soft: #5b636d; --line: #dfe2e6; --wash: #f6f7f8;
  --mark: #fff4d6; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 15px/1.55 "Helvetica Neue", Helvetica, Arial,
  "Liberation Sans", sans-serif; }
main { max-width: 1024px; margin: 0 auto; padding: 44px 28px 80px; }
h1 { font: 600 30px/1.2 Georgia, "Times New Roman", "Liberation Serif", serif; margin: 0 0 6px;
  overflow-wrap: anywhere; }
h2 { font: 600 20px/1.3 Georgia, "Times New Roman", "Liberation Serif", serif; margin: 52px 0 12px;
  padding-top: 14px; border-top: 1px solid var(--line); }
section:first-of-type h2 { margin-top: 24px; }
h3 { font-size: 15px; margin: 26px 0 8px; }
p { margin: 8px 0; max-width: 96ch; }
.lede, figcaption, .missing, footer { color: var(--soft); }
nav { margin: 10px 0 24px; font-size: 13.5px; }
nav a { color: var(--soft); margin-right: 16px; text-decoration: none; border-bottom: 1px solid var(--line); }
.verdict { max-width: none; margin: 10px 0; padding: 10px 16px; background: var(--wash);
  border-left: 4px solid var(--run); overflow-wrap: anywhere; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; background: var(--run);
  margin-right: 6px; }
.row { display: grid; grid-template-columns: 1fr 1fr; gap: 10px 20px; align-items: start; }
figure { margin: 16px 0 20px; max-width: 100%; break-inside: avoid; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { font-size: 13.5px; line-height: 1.45; margin-top: 6px; max-width: 96ch; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 32px; align-items: start; }
.pair table { width: 100%; }
figcaption b { color: var(--ink); }
.files a, .lede a { color: var(--soft); font-size: 12px; margin-right: 5px; }
.verdict ul { margin: 6px 0 2px; padding-left: 18px; color: var(--soft); font-size: 13.5px; }
.cautions { margin: 8px 0; padding-left: 20px; max-width: 96ch; }
dt code { font-size: 11.5px; font-weight: 400; color: var(--soft); overflow-wrap: anywhere; }
.missing { padding: 10px 14px; border: 1px dashed #c4c9cf; border-radius: 4px; max-width: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; margin: 8px 0 4px; font-variant-numeric: tabular-nums;
  border-top: 1.5px solid var(--ink); border-bottom: 1.5px solid var(--ink); }
th, td { padding: 4px 22px 4px 4px; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
th[scope=row] { font-weight: 400; color: var(--soft); min-width: 190px; }
thead th { border-bottom: 1px solid var(--ink); }
tbody tr + tr > * { border-top: 1px solid #eef0f2; }
tr.differs > * { background: var(--mark); }
tr.differs th[scope=row] { color: var(--ink); }
details { margin: 12px 0; }
summary { cursor: pointer; font-weight: 600; }
.config td { font-family: ui-monospace, Menlo, Consolas, "Liberation Mono", monospace; font-size: 12.5px; }
dl { display: grid; grid-template-columns: minmax(130px, 220px) 1fr; gap: 6px 20px; font-size: 14px; }
dt { font-weight: 600; } dd { margin: 0; max-width: 74ch; }
footer { margin-top: 40px; font-size: 13px; }
@media (max-width: 720px) { .row, .pair, dl { grid-template-columns: 1fr; } main { padding: 24px 14px; } }
"""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>$css</style>
</head>
<body>
<main>
<header>
<h1>$title</h1>
<p class="lede">$lede</p>
<nav aria-label="Sections">$nav</nav>
</header>
$body
<footer>Written by <code>python -m evals.report</code>. Everything shown is in this file; the numbers
come from the run folders named above. Figures and tables are also in <code>$files</code> beside it.</footer>
</main>
</body>
</html>
""")

# name of the figure -> (title, what it shows and what to look for); also the alt text
CAPTIONS = {
    "loss": (
        "Loss",
        "Look for the step at which validation (marked) falls below the bigram entropy: from there on the "
        "model needs attention. The scale ends at the first loss.",
    ),
    "accuracy": (
        "Accuracy on the task",
        "Look for the step at which it leaves chance: from there on the model finds its answers by attention.",
    ),
    "sink_rate": (
        "Sink rate over training",
        "Look for the step at which the share of heads that dump on the first token leaves zero.",
    ),
    "dynamics": (
        "What happens together",
        "Look for the start-token weight rising while the value norm of that token falls: each makes the "
        "other cheaper.",
    ),
    "emergence": (
        "When and where the sink emerges",
        "Each row is a head: look for rows that turn dark, and at which step.",
    ),
    "throughput": (
        "Throughput",
        "Look for a flat line; the scale ends at twice the median, the first point may hold compilation.",
    ),
    "heads": (
        "Start-token weight of every head",
        "Look for dark cells: those heads are sinks.",
    ),
    "positions": (
        "Sink rate by key position",
        "Look for a position 1 that stands alone: only the first token is a sink.",
    ),
    "maps": (
        "The strongest start-token head, with its tokens",
        "Look for a dark first column, and for queries (rows) that skip it to read elsewhere.",
    ),
    "all_maps": (
        "Attention maps by head",
        "Look for maps whose only dark part is the first column; the number is the start-token weight.",
    ),
    "extreme": (
        "Extreme tokens by layer",
        "Look for a layer with a high sink logit (left), a first-token value far below the others (middle) "
        "and a first-token residual far above them (right).",
    ),
}


def glossary(keys: Collection[str]) -> str:
    """The definitions of numbers that are there, terms first: the same texts as in sinks.json."""
    entries = "".join(
        f"<dt>{escape(d.name)}{f'<br><code>{escape(d.key)}</code>' if d.key else ''}</dt><dd>{escape(d.text)}</dd>\n"
        for d in (*TERMS, *MEASURED)
        if (d.key or d.needs) in {*keys, ""}
    )
    return f"<dl>{entries}</dl>"


def escape(value: object) -> str:
    """`value` as HTML text, also good inside an attribute."""
    return html.escape(str(value))


class Figures:
    """Hands out the drawn figures as numbered HTML, with links to their files in `folder`."""

    def __init__(self, figures: Mapping[str, Drawn], runs: int, folder: str) -> None:
        self._figures = figures
        self._scale = CSS_DPI / dpi_of(runs)
        self._folder = folder
        self._count = 0

    def show(self, name: str, groups: Sequence[Group], more: str = "") -> str:
        """A figure with caption and alt text, at its natural size; nothing if it was not drawn."""
        drawn = self._figures.get(name)
        if drawn is None:
            return ""
        self._count += 1
        title, caption = CAPTIONS[name.rstrip("0123456789").rstrip("_")]
        width, height = (round(n * self._scale) for n in struct.unpack(">II", drawn.png[16:24]))
        names, text = ", ".join(group.title for group in groups), f"{caption} {more}".strip()
        links = " ".join(f'<a href="{escape(self._folder)}/{name}.{end}">{end.upper()}</a>' for end in ENDS)
        return (
            f'<figure>\n<img src="data:image/png;base64,{base64.b64encode(drawn.png).decode()}" width="{width}" '
            f'height="{height}" alt="{escape(f"{title}: {names}. {text}")}">\n'
            f"<figcaption><b>Figure {self._count}. {title}.</b> {escape(text)} "
            f'<span class="files">{links}</span></figcaption>\n</figure>'
        )


def table(groups: Sequence[Group], rows: Sequence[tuple[str, list[str]]], kind: str = "", mark: bool = False) -> str:
    """One row per name and one column per group; `mark` points out the rows in which they differ."""
    head = "".join(
        f'<th scope="col"><span class="dot" style="--run:{g.color}"></span>{escape(g.label)}</th>' for g in groups
    )
    body = ""
    for name, values in rows:
        marked = mark and differs(values)
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        row, sign = ('<tr class="differs">', "≠ ") if marked else ("<tr>", "")
        body += f'{row}<th scope="row">{sign}{escape(name)}</th>{cells}</tr>\n'
    head = f"<thead><tr><td></td>{head}</tr></thead>\n" if len(groups) > 1 else ""
    even = f"table-layout: fixed; width: 100%; min-width: {190 + 115 * len(groups)}px" if len(groups) > 2 else ""
    return f'<div class="scroll"><table class="{kind}" style="{even}">\n{head}<tbody>\n{body}</tbody></table></div>'


def differs(values: Sequence[str]) -> bool:
    """Whether the runs do not all have the same value."""
    return len(set(values)) > 1
