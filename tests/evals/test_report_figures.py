"""The figures of one to ten runs with long names, judged by the boxes that are drawn: nothing overlaps, nothing is cut
off, every run can be told, every panel keeps its size. And the colours, as colour-blind eyes see them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from evals.groups import MARKERS, PALETTE, Group, read_groups
from evals.plot_parts import Plot
from evals.plot_style import in_style
from evals.plots import accuracy, dynamics, extreme, loss, sink_rate, throughput
from evals.plots_heads import emergence, heads, positions
from evals.plots_maps import all_maps, maps
from tests.evals.run_folders import make_run

PATTERN = "softmax(window=32), sigmoid(normalise=True, train_len={}), softmax_off_by_one, relu"
NAMES = ["softmax", *(PATTERN.format(64 * 2**i) for i in range(9))]
FIGURES = (loss, sink_rate, dynamics, throughput, emergence, heads, positions, maps, extreme)
LEAST = 0.45  # inches of a panel's sides


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Ten runs of ten attentions, and ten of five with two seeds each; on text with 8 heads, and on Bigram-Backcopy."""
    root = tmp_path_factory.mktemp("a folder whose name is rather long")
    name = "a-long-name-that-differs-in-its-end-alone-{}"
    make = lambda bb, i, seed=0: make_run(
        root / f"{bb}" / name.format(f"{i}-seed{seed}"), attn=NAMES[i], bb=bb, heads=1 if bb else 8, seed=seed,
        sink=0.93 - 0.08 * i, slot=5.0 if i == 1 else None,
    )  # fmt: skip
    seeded = [make(True, i, seed) for i in range(5) for seed in (0, 1)]
    return {"bb, seeds": seeded, "text": [make(False, i) for i in range(10)], "one name": seeds_of(root)}


def seeds_of(root: Path) -> list[Path]:
    return [make_run(root / "seeds" / f"{'x' * 60}-seed{s}", attn=NAMES[-1], bb=False, seed=s) for s in range(10)]


def drawn(groups: list[Group]) -> Iterator[tuple[str, Plot]]:
    """Every figure these runs have, laid out."""
    with in_style(sum(len(group.runs) for group in groups)):
        for make in FIGURES:
            plot = make(groups)
            assert plot is not None, make.__name__
            plot.figure.draw_without_rendering()
            yield make.__name__, plot
        if (plot := all_maps(groups[0], len(groups))) is not None:
            plot.figure.draw_without_rendering()
            yield "all_maps", plot


def texts(figure: Figure) -> list[tuple[str, Bbox]]:
    """Drawn texts with the boxes of their ink, half a pixel smaller so that touching is not overlapping."""
    found: list[Text] = [text for legend in figure.legends for text in legend.get_texts()]
    for ax in figure.axes:
        found += [ax.title, ax._left_title, ax._right_title, *ax.texts]
        if ax.axison:
            for axis in (ax.xaxis, ax.yaxis):
                found += [axis.label, axis.offsetText, *(tick.label1 for tick in axis._update_ticks())]
    boxes = [(text.get_text().strip(), text.get_window_extent()) for text in found if text.get_visible()]
    return [(said, box.padded(-0.4)) for said, box in boxes if said]


def check(name: str, plot: Plot, groups: list[Group]) -> None:
    """All that a careful reader could object to and a program can see."""
    figure, dpi = plot.figure, plot.figure.dpi
    page = figure.bbox.padded(2)
    boxes = texts(figure)
    for said, box in boxes:
        assert page.containsx(box.x0), (name, said)
        assert page.containsx(box.x1), (name, said)
        assert page.containsy(box.y0), (name, said)
        assert page.containsy(box.y1), (name, said)
    for (a, box), (b, other) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other), (name, a, b, box, other)
    legends = [*figure.legends, *(ax.get_legend() for ax in figure.axes if ax.get_legend())]
    assert len(legends) <= 1, name
    if name not in ("heads", "emergence", "maps", "extreme", "all_maps"):  # whose panels have names
        shown = [text.get_text() for text in legends[0].get_texts()] if legends else []
        assert len(set(shown)) == len(shown), name
        assert len(shown) >= len(groups) if len(groups) > 1 else True, (name, shown)
    elif name != "all_maps":
        titles = [t for ax in figure.axes if ax.axison and (t := ax.get_title(loc="left")) and "queries" not in t]
        runs = sum(len(group.runs) for group in groups)
        panels = len(groups) if name in ("extreme", "maps") else runs
        assert len(set(titles)) == (panels if runs > 1 else len(set(titles))), (name, titles)
    for ax in plot.axes.ravel():
        if ax.axison:
            box = ax.get_window_extent()
            assert min(box.width, box.height) / dpi > LEAST, (name, box.width / dpi, box.height / dpi)
    assert plot.rows, name


@pytest.mark.parametrize("count", [1, 2, 4, 6, 10])
def test_runs_with_long_names(folders: dict[str, list[Path]], count: int) -> None:
    groups = read_groups(folders["text"][:count])
    assert len(groups) == count
    for name, plot in drawn(groups):
        check(name, plot, groups)


@pytest.mark.parametrize("count", [2, 6, 10])
def test_seeds_of_several_attentions(folders: dict[str, list[Path]], count: int) -> None:
    groups = read_groups(folders["bb, seeds"][:count])
    assert [len(group.runs) for group in groups] == [2] * (count // 2)
    for name, plot in drawn(groups):
        check(name, plot, groups)


def test_ten_seeds_of_one_attention(folders: dict[str, list[Path]]) -> None:
    groups = read_groups(folders["one name"])
    assert [len(group.runs) for group in groups] == [10]
    for name, plot in drawn(groups):
        check(name, plot, groups)


def test_reference_lines_close_together_keep_their_names_apart(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    data = json.loads((run / "data.json").read_text())
    data["entropies"] = {"unigram_nats": 2.46, "bigram_nats": 2.44, "oracle_nats": 2.42}
    (run / "data.json").write_text(json.dumps(data))
    with in_style():
        plot = loss(groups := read_groups([run]))
    plot.figure.draw_without_rendering()
    check("loss", plot, groups)
    names = [text for text in plot.axes[0, 0].texts if text.get_text()]
    assert [text.get_text() for text in names] == ["oracle", "bigram entropy", "unigram entropy"]


def test_bands_are_mean_and_range(folders: dict[str, list[Path]]) -> None:
    groups = read_groups(folders["bb, seeds"][:4])
    with in_style():
        plot = sink_rate(groups)
        weights = dynamics(groups)
    assert plot is not None
    assert weights is not None
    values = np.array([run.series("sink_rate")[1] for run in groups[0].runs])
    line, region = plot.axes[0, 0].get_lines()[0], plot.axes[0, 0].collections[0]
    np.testing.assert_allclose(line.get_ydata(), values.mean(0))
    corners = region.get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([corners.min(), corners.max()], [values.min(), values.max()])
    assert [text.get_text().strip() for text in plot.figure.legends[0].get_texts()][-1] == "mean and range over seeds"
    tables = np.array([run.tables("first_token_weight_nontrigger")[1].max((1, 2)) for run in groups[0].runs])
    rows = [r for r in weights.rows if r["group"] == groups[0].label and r["quantity"] == "start-token weight"]
    for name, over in (("mean", tables.mean(0)), ("smallest", tables.min(0)), ("largest", tables.max(0))):
        np.testing.assert_allclose([r["value"] for r in rows if r["seed"] == name], over)


def test_a_task_has_its_accuracy(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", bb=False)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "val_loss" in row:
            row |= {"val_accuracy": row["step"] / 1000, "val_exact": row["step"] / 2000}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with in_style():
        plot = accuracy(groups := read_groups([run]))
    assert plot is not None
    plot.figure.draw_without_rendering()
    check("accuracy", plot, groups)


# --------------------------------------------------------------------------------------------------- colours

# Machado, Oliveira and Fernandes (2009), severity 1: linear RGB as protan, deutan and tritan eyes see it.
EYES = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(colors: list[str], eye: str) -> np.ndarray:
    """CIELAB (D65) of sRGB colours as an eye sees them [n, 3]."""
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colors])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ np.asarray(EYES[eye]).T, 0, 1)
    to_xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                       [0.0193339, 0.1191920, 0.9503041]])  # fmt: skip
    xyz = linear @ to_xyz.T / [0.95047, 1, 1.08883]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], -1)


@pytest.mark.parametrize(("eye", "least"), [("normal", 22), ("protan", 22), ("deutan", 22), ("tritan", 15)])
def test_ten_colours_are_apart_for_every_eye(eye: str, least: float) -> None:
    found = lab(list(PALETTE), eye)
    apart = np.linalg.norm(found[:, None] - found[None], axis=-1) + 1e9 * np.eye(len(found))
    assert apart.min() > least
    assert (found[:, 0] < 77).all()  # dark enough on white
    assert len(set(PALETTE)) == len(set(MARKERS)) == 10
