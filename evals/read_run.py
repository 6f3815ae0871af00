"""Reading the folder of one run, finished or still training, without importing JAX.

`read_run` checks what it reads: whatever a person could have broken ends in one sentence that names the
file (and the line). Files that only a finished run has (`sinks.json`, `maps.npz`) may be absent, and are left out
where the run went on after they were written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evals.definitions import NO_DISTRIBUTION, SHARE_EPS
from jaxattn.errors import BAD_ARCHIVE, DataError
from jaxattn.json_text import loads

CONFIG, METRICS = "config.json", "metrics.jsonl"
EPSILON = 0.3
ALPHA, NONTRIGGER, TRIGGER = (f"first_token_weight{end}" for end in ("", "_nontrigger", "_trigger"))
RAW = "_raw"


@dataclass(frozen=True)
class Maps:
    """Example attention weights [n, L, H, T, T + slots] with their tokens [n, T] and printable labels."""

    weights: np.ndarray
    tokens: np.ndarray
    labels: list[list[str]]
    slots: int

    def panel(self, example: int, layer: int, head: int) -> np.ndarray:
        """One map as row shares A' (see `evals.definitions`), which is A itself for softmax."""
        a = np.abs(self.weights[example, layer, head].astype(np.float32))
        return a / (a.sum(-1, keepdims=True) + SHARE_EPS)

    def mass(self) -> tuple[float, float]:
        """Smallest and largest row sum Σ_j A_ij over every map."""
        rows = self.weights.astype(np.float32).sum(-1)
        return float(np.nanmin(rows)), float(np.nanmax(rows))


@dataclass
class Run:
    """Everything one run folder says. `label` is set anew when several runs are shown together."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    metrics: list[dict[str, Any]]
    sinks: dict[str, Any] | None
    maps: Maps | None
    torn: bool = False
    label: str = ""
    entropies: dict[str, float] = field(default_factory=dict)

    @property
    def attn(self) -> str:
        return str(self.config.get("attn") or "attention")

    @property
    def seed(self) -> str:
        return str(self.config.get("seed", "–"))

    @property
    def last_step(self) -> int:
        return int(self.metrics[-1]["step"])

    @property
    def is_bb(self) -> bool:
        """Whether queries are split into trigger and non-trigger (Bigram-Backcopy data)."""
        return bool(self.sinks and NONTRIGGER in self.sinks) or any(NONTRIGGER in r for r in self.metrics)

    @property
    def star(self) -> str:
        """The paper's mark where row shares stand in for weights that are no distributions."""
        if self.sinks is not None:
            return "*" if self.sinks.get("proxy") else ""
        share, raw = self.matrix(ALPHA), self.matrix(ALPHA + RAW)
        if share is None or raw is None:
            return ""
        return "*" if np.nanmax(np.abs(share - raw), initial=0) > NO_DISTRIBUTION else ""

    @property
    def epsilon(self) -> float:
        """Threshold of the sink indicator: of the final evaluation, else of the run's configuration."""
        evaluation = self.config.get("eval")
        given = (self.sinks or {}, evaluation if isinstance(evaluation, dict) else {})
        return next((eps for eps in (number(place.get("epsilon")) for place in given) if eps > 0), EPSILON)

    def latest(self) -> dict[str, Any]:
        """The final evaluation, or the newest one in the metrics while there is none."""
        if self.sinks is not None:
            return self.sinks
        return next((r for r in reversed(self.metrics) if "sink_rate" in r or "first_token_weight" in r), {})

    def matrix(self, key: str, source: dict[str, Any] | None = None) -> np.ndarray | None:
        """A [L, H] table of floats (short rows padded with NaN, null = NaN); None where it is absent."""
        value = (self.latest() if source is None else source).get(key)
        if value is None:
            return None
        try:
            rows = [np.atleast_1d(np.asarray(row, dtype=np.float64)) for row in value]
            out = np.full((len(rows), max(r.size for r in rows)), np.nan)
            for row, r in zip(out, rows, strict=True):
                row[: r.size] = r
        except (TypeError, ValueError) as error:
            raise DataError(f"{self.path}: {key} is not a table of numbers with one row per layer.") from error
        return out

    def vector(self, key: str) -> np.ndarray | None:
        """A list of floats of the latest evaluation; None where it is absent."""
        value = self.matrix(key)
        return None if value is None else value[:, 0]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of every metrics row that has the number `key`."""
        rows = [(r["step"], number(r[key])) for r in self.metrics if key in r]
        return np.array([s for s, _ in rows]), np.array([v for _, v in rows])

    def tables(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps [n], values [n, L, H]) of every metrics row that has the table `key`."""
        tables = [(r["step"], self.matrix(key, r)) for r in self.metrics]
        found = [(step, table) for step, table in tables if table is not None]
        kept = [(step, table) for step, table in found if table.shape == found[-1][1].shape]
        return np.array([s for s, _ in kept]), np.array([t for _, t in kept])

    @property
    def start_key(self) -> str:
        """The start-token weight that tells a sink, plotted and judged alike: non-trigger queries', else α₁."""
        return NONTRIGGER if self.is_bb else ALPHA

    def weights(self) -> np.ndarray | None:
        """Latest [L, H] table of that start-token weight."""
        return self.matrix(self.start_key)

    def layer_names(self, rows: int) -> list[str]:
        """Model layer index of each attention layer."""
        names = (self.sinks or {}).get("attention_layers") or []
        return [str(n) for n in names] if len(names) == rows else [str(n) for n in range(rows)]

    def head_name(self, index: tuple[int, ...], rows: int) -> str:
        return f"layer {self.layer_names(rows)[index[0]]} head {index[1]}"


def number(value: Any) -> float:
    """`value` as a float; NaN for null, for what is no number and for an integer that no float holds."""
    try:
        return float(value) if isinstance(value, (int, float)) else float("nan")
    except OverflowError:
        return float("nan")


def flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    """Nested dict to {dotted key: printable value}."""
    if isinstance(tree, dict) and tree:
        parts = [flatten(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in tree.items()]
        return {k: v for part in parts for k, v in part.items()}
    return {prefix: tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False)}


def read_run(folder: str | Path) -> Run:
    """Read a run folder. Raises `DataError` with one sentence for a folder or file that is no good."""
    path = Path(folder)
    for name in (CONFIG, METRICS):
        if not (path / name).is_file():
            what = "has no" if path.is_dir() else "does not exist, so there is no"
            raise DataError(f"{path} is not a run directory: it {what} {name}; pass the folder that holds it.")
    config = _read_json(path / CONFIG)
    metrics, torn = _read_metrics(path / METRICS)
    optional = [_read_json(path / n) if (path / n).is_file() else None for n in ("environment.json", "data.json")]
    data = optional[1] or {}
    sinks = _read_json(path / "sinks.json") if (path / "sinks.json").is_file() else None
    newest = max((number(row["step"]) for row in metrics if "sink_rate" in row), default=0.0)
    if sinks is not None and number(sinks.get("step")) < newest:
        sinks = maps = None  # of before the run went on
    else:
        maps = _read_maps(path / "maps.npz") if (path / "maps.npz").is_file() else None
    found = data.get("entropies")
    found = found if isinstance(found, dict) else {}
    entropies = {k: float(v) for k, v in found.items() if np.isfinite(number(v))}
    distributions = sinks is not None and sinks.get("proxy") is False
    for row in [*metrics, *([sinks] if sinks else [])]:
        _rename_raw(row, distributions)
    run = Run(path, config, optional[0] or {}, data, metrics, sinks, maps, torn, entropies=entropies)
    run.label = run.attn
    return run


def _rename_raw(row: dict[str, Any], distributions: bool) -> None:
    """Start-token weights of versions that called raw ones plain and shares `_proxy`, under today's names."""
    for name in (NONTRIGGER, TRIGGER):
        if name not in row or name + RAW in row:
            continue
        raw = row[name + RAW] = row.pop(name)
        share = row.pop(name + "_proxy", raw if distributions else None)
        if share is not None:
            row[name] = share
        row.pop(ALPHA + RAW, None)  # was over other queries


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = loads(_read_bytes(path))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}): the file is damaged.") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds a JSON {type(found).__name__} but must hold an object.")
    return found


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Rows by step (the last one wins where a step was written twice), and whether the last line is torn."""
    lines = [(n, s) for n, s in enumerate(_read_bytes(path).split(b"\n"), 1) if s.strip()]
    rows: dict[float, dict[str, Any]] = {}
    torn = False
    for place, (n, line) in enumerate(lines):
        try:
            row = loads(line)
        except ValueError as error:
            if place == len(lines) - 1:  # a run that is being written, or was killed while writing
                torn = True
                break
            raise DataError(f"{path} line {n} is not valid JSON: delete that line or restore the file.") from error
        if not isinstance(row, dict) or not np.isfinite(number(row.get("step"))):
            raise DataError(f"{path} line {n} is not an object with a step: delete that line or restore the file.")
        rows[row["step"]] = row
    if not rows:
        raise DataError(f"{path} is empty: the run has not logged a single step yet, so there is nothing to report.")
    return [rows[step] for step in sorted(rows)], torn


def _read_maps(path: Path) -> Maps:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            weights, tokens = np.asarray(file["weights"]), np.asarray(file["tokens"])
            slots = int(file["slots"]) if "slots" in file else 0
            labels = file["labels"].astype(str).tolist() if "labels" in file else tokens.astype(str).tolist()
    except (KeyError, TypeError, *BAD_ARCHIVE) as error:
        raise DataError(f"{path} cannot be read as attention maps ({error}): delete it or evaluate again.") from error
    n, length = tokens.shape if tokens.ndim == 2 else (-1, -1)
    if weights.ndim != 5 or weights.shape[0] != n or weights.shape[3:] != (length, length + slots):
        raise DataError(
            f"{path} holds weights of shape {weights.shape}, which does not fit tokens of shape "
            f"{tokens.shape} and {slots} slots: delete it or evaluate again."
        )
    if len(labels) != n or any(len(row) != length for row in labels):
        raise DataError(f"{path} has labels that do not match its tokens {tokens.shape}: evaluate again.")
    return Maps(weights, tokens, labels, slots)
