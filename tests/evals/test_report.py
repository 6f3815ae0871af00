"""The report of synthetic runs: what it says, and that it is self-contained."""

from __future__ import annotations

import ast
import csv
import html
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from evals.definitions import MEASURED
from evals.report import write_report
from tests.evals.run_folders import LAYERS, make_run, write
from tests.in_process import called

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


class _Page(HTMLParser):
    """Collects tags, images and the text of table rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[tuple[str, list[str]]] = []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append((dict(attrs).get("class") or "", []))
        self._cell = tag in ("td", "th", "span")
        if tag in ("td", "th"):
            self.rows[-1][1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][1][-1] += data

    def row(self, name: str) -> list[str]:
        """The values beside a row's name."""
        return next(cells[1:] for _, cells in self.rows if cells and cells[0] == name)


def report(*folders: Path) -> tuple[str, _Page]:
    out = write_report(folders, folders[0] / "report.html")
    text = out.read_text(encoding="utf-8")
    return text, _Page(text)


@pytest.fixture(scope="module")
def softmax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "soft")


@pytest.fixture(scope="module")
def sigmoid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "sig", attn="sigmoid", sink=0.0)


def test_one_run_is_reported_with_its_own_numbers(softmax: Path) -> None:
    text, page = report(softmax)
    sinks = json.loads((softmax / "sinks.json").read_text())
    weight = sinks["first_token_weight_nontrigger"][1][0]
    assert page.row("Backcopy risk (nats)") == ["0.0021"]
    assert page.row("Bigram excess (nats)") == ["0.0253"]
    assert page.row("Sink₁") == ["33.33 %"]
    assert page.row("Largest start-token weight, non-trigger queries") == [f"{weight:.4g} (layer 1 head 0)"]
    assert page.row("Smallest value drain") == [f"{sinks['value_drain'][1][0]:.4g} (layer 1 head 0)"]
    assert page.row("Threshold ε, length T, sequences") == ["0.3, 48, 100"]
    # The logistic rise to 0.93 passes 0.3 between the evaluations at 300 and 350.
    assert "a sink: largest start-token weight on non-trigger queries 0.93, layer 1 head 0" in text
    assert "; some head above 0.3 from step 350 on; " in text
    assert page.row("Some head above 0.3") == ["from step 350 on"]
    assert "0.707 below the bigram entropy (2.410)" in text
    assert "0.055 above the oracle (1.648" in text


def test_nothing_is_loaded_from_outside_and_every_figure_is_described(softmax: Path) -> None:
    text, page = report(softmax)
    links = [a.get(k) or "" for _, a in page.tags for k in ("src", "href", "srcset", "data", "action") if k in a]
    assert links
    beside = [link for link in links if not link.startswith(("data:image/png;base64,", "#"))]
    assert all((softmax / link).is_file() for link in beside)
    assert all(link.split("/")[0] == "plots" for link in beside)
    assert not re.search(r"@import|url\(|<script|<link|https?://", text)
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 10
    assert all(len(attrs["alt"] or "") > 40 for attrs in images)
    assert len(text) < 3_000_000
    numbers = [int(n) for n in re.findall(r"<b>Figure (\d+)\.", text)]
    assert numbers == list(range(1, 11))


def test_every_figure_and_table_is_left_as_files_the_same_every_time(softmax: Path) -> None:
    text, page = report(softmax)
    read = lambda: {path.name: path.read_bytes() for path in (softmax / "plots").iterdir()}
    first = read()
    stems = {name.partition(".")[0] for name in first if name.endswith(".png")}
    assert {"loss", "heads", "maps", "extreme", "emergence", "dynamics", "sink_rate"} <= stems
    assert first.keys() == {f"{s}.{end}" for s in stems for end in ("png", "svg", "csv")} | {
        f"{table}.csv" for table in ("key_numbers", "config", "environment", "data")
    }
    assert all(data.startswith(PNG) for name, data in first.items() if name.endswith(".png"))
    assert all(ElementTree.fromstring(data).tag.endswith("svg") for name, data in first.items() if ".svg" in name)
    linked = {attrs["href"] for tag, attrs in page.tags if tag == "a" and not (attrs["href"] or "#").startswith("#")}
    assert linked == {f"plots/{name}" for name in first}
    shutil.rmtree(softmax / "plots")
    assert report(softmax)[0] == text
    assert read() == first


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text("utf-8"))))


def test_csv_files_hold_what_is_drawn(softmax: Path) -> None:
    report(softmax)
    logged = [json.loads(line) for line in (softmax / "metrics.jsonl").read_text().splitlines()]
    sinks = json.loads((softmax / "sinks.json").read_text())
    loss = [row for row in rows_of(softmax / "plots" / "loss.csv") if row["quantity"] == "training loss"]
    assert [(float(r["step"]), float(r["value"])) for r in loss] == [(r["step"], r["loss"]) for r in logged]
    assert {(r["group"], r["seed"], r["run"]) for r in loss} == {("softmax", "0", "soft")}
    heads = rows_of(softmax / "plots" / "heads.csv")
    found = {(r["quantity"], int(r["layer"]), int(r["head"])): float(r["value"]) for r in heads}
    for key in ("first_token_weight", "first_token_weight_nontrigger", "first_token_weight_trigger"):
        for layer in range(LAYERS):
            assert found[key, layer, 0] == sinks[key][layer][0]
    numbers = {r["quantity"]: r for r in rows_of(softmax / "plots" / "key_numbers.csv")}
    assert float(numbers["Smallest value drain"]["value"]) == sinks["value_drain"][1][0]
    assert numbers["Smallest value drain"]["place"] == "layer 1 head 0"
    assert {r["field"]: r[str(softmax)] for r in rows_of(softmax / "plots" / "config.csv")}["optim.lr"] == "0.001"


def test_comparison_has_a_column_per_run_and_marks_what_differs(softmax: Path, sigmoid: Path, tmp_path: Path) -> None:
    out = write_report([softmax, sigmoid], tmp_path / "new" / "cmp.html", "Two ops")
    text = out.read_text(encoding="utf-8")
    page = _Page(text)
    assert "<title>Two ops</title>" in text
    assert page.row("Sink₁") == ["33.33 %", "0 %*"]
    assert page.row("≠ attn") == ["softmax", "sigmoid"]
    marked = {cells[0] for kind, cells in page.rows if kind == "differs"}
    assert {"≠ attn", "≠ model.mixers"} <= marked
    assert page.row("optim.lr") == ["0.001", "0.001"]
    assert "≠ optim.lr" not in marked
    assert re.search(r"<b>sigmoid</b>: no sink \(Sink₁ 0\.0 %\*", text)
    assert (tmp_path / "new" / "cmp_files" / "loss.svg").is_file()
    assert 'href="cmp_files/loss.svg"' in text


def test_a_run_in_training_says_what_is_missing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "text", bb=False, heads=8, done=False, steps=600)
    text, page = report(run)
    assert "still training, as of step 600 of 1000: a sink: largest start-token weight 0.7" in text
    assert "some head above 0.3 from step 400 on" in text
    assert "has no final sinks.json yet (step 600 of 1000)" in text
    assert "has no final maps.npz yet" in text
    assert page.row("Steps") == ["600 of 1000"]
    for name in ("environment.json", "data.json"):
        (run / name).unlink()
    assert "no environment.json in the run folder" in report(run)[0]


def test_a_run_without_any_evaluation_still_has_curves(tmp_path: Path) -> None:
    run = make_run(tmp_path / "young", done=False, steps=40)
    text, page = report(run)
    assert "no evaluation yet (step 40 of 1000)" in text
    assert [tag for tag, _ in page.tags].count("img") == 2


def test_text_of_a_run_is_never_markup(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\"$\\frac{"
    run = make_run(tmp_path / "a <img src=x onerror=y> & 注意 ü", attn=evil)
    _, page = report(run)
    assert not {"script", "i", "b onerror"} & {tag for tag, _ in page.tags}
    assert all("onerror" not in attrs for _, attrs in page.tags)
    assert page.row("Attention") == [evil]
    assert page.row("optim.note") == ["<i>raw</i>"]


def test_unnormalised_weights_are_judged_by_their_row_shares(tmp_path: Path) -> None:
    run = make_run(tmp_path / "sig", attn="sigmoid", sink=0.0)
    sinks = json.loads((run / "sinks.json").read_text())
    sinks["first_token_weight_nontrigger_raw"] = [[0.5]] * LAYERS  # sigmoid(0) on every key is no sink
    write(run / "sinks.json", sinks)
    text, page = report(run)
    assert "no sink (Sink₁ 0.0 %*" in text
    assert page.row("Largest start-token weight, non-trigger queries, raw") == ["0.5 (layer 0 head 0)"]
    sinks["step"] = 1010
    sinks["first_token_weight_nontrigger"] = [[0.05], [0.9], [0.03]]
    write(run / "sinks.json", sinks)
    text, page = report(run)
    assert "a sink: largest start-token weight on non-trigger queries 0.90*, layer 1 head 0" in text
    assert page.row("Some head above 0.3") == ["at step 1010"]
    assert page.row("Largest start-token weight, non-trigger queries") == ["0.9* (layer 1 head 0)"]


def test_what_is_shown_is_defined_and_nothing_else_is(softmax: Path, tmp_path: Path) -> None:
    text = report(softmax)[0]
    sinks = json.loads((softmax / "sinks.json").read_text())
    for definition in MEASURED:
        if sinks.get(definition.key) is not None:
            assert f"<code>{definition.key}</code></dt><dd>{html.escape(definition.text)}</dd>" in text, definition.key
    assert "<dt>Trigger, non-trigger query</dt>" in text
    assert "<code>val_accuracy</code>" not in text
    assert "<dt>Slot</dt>" not in text
    plain = report(make_run(tmp_path / "text", bb=False, slot=3.0))[0]
    assert "<dt>Slot</dt>" in plain
    assert "trigger quer" not in plain
    assert "<dt>Oracle</dt>" not in plain


def test_a_diverged_run_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", done=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1010, "loss": NaN, "tokens_per_s": 1}\n')
    text, page = report(run)
    assert "the loss is not finite any more" in text
    assert page.row("Training loss (nats)") == ["not finite"]


def command(*args: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "evals.report", *map(str, args)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_command_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "ein Lauf ü")
    done = command(run)
    assert (done.returncode, done.stdout.strip()) == (0, str(run / "report.html")), done.stderr
    assert len(list((run / "plots").glob("*.png"))) == 10
    missing = called("evals.report", tmp_path / "nowhere")
    assert missing.returncode == 2
    assert re.fullmatch(r"error: .*nowhere is not a run directory: it does not exist.*\.\n", missing.stderr)
    unwritable = called("evals.report", run, "--out", run / "config.json" / "x" / "r.html")
    assert unwritable.returncode == 2
    assert re.fullmatch(r"error: the report cannot be written to .*: Not a directory; .*\.\n", unwritable.stderr)
    assert "2 runs are compared but --out is not given" in called("evals.report", run, run).stderr


def test_the_report_itself_needs_no_jax() -> None:
    """All it takes of the library are errors and how a command ends, so that it opens where no JAX works."""
    todo, seen = ["report"], set()
    while todo:
        name = todo.pop()
        seen.add(name)
        for node in ast.walk(ast.parse((ROOT / "evals" / f"{name}.py").read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if modules == ["evals"]:
                modules = [f"evals.{a.name}" for a in node.names]
            for module in modules:
                package = module.split(".")[0]
                light = module in ("jaxattn.command", "jaxattn.errors", "jaxattn.json_text")
                assert light or package not in ("jax", "jaxattn", "train", "flax"), (name, module)
                if package == "evals" and module.split(".")[1] not in seen:
                    todo.append(module.split(".")[1])
    assert {"findings", "plots", "plots_maps", "cautions", "definitions"} <= seen
