"""The highest rates that were measured in a run, to judge the others by."""

from __future__ import annotations

from typing import Any

from scripts.bench.device.run import Run

Row = dict[str, Any]


def roof(run: Run, field: str) -> tuple[float, str]:
    """The highest rate (`flops` or `bytes` a second) of any contender in the run, which nobody exceeds, and whose."""
    rates = [
        (row[field] / found["least"], name)
        for row in run.rows
        if row.get(field)
        for name, found in row.get("seconds_a_call", {}).items()
        if rated(row, name, field)
    ]
    return max(rates, default=(0.0, ""))


def rated(row: Row, name: str, field: str) -> bool:
    """Whether a case's bytes are those that this contender moves, as contenders that do more work beside it do not."""
    return field == "flops" or row["section"] == "roofs" or not name.endswith(("flash", "dense", "copy"))
