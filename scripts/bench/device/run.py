"""The state of a run: time left, the file of results, and who is asked."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from scripts.bench.device.plan import MINUTES, SECTIONS
from scripts.bench.device.workers import Crew

RESULTS = "results.jsonl"
FAULTS = ("failed", "late", "died")  # of a row: something is wrong with us or with the device
LEAST = 4.0  # seconds below which nothing more is begun


@dataclasses.dataclass
class Run:
    """Every row is on the disk before the next case begins; rows have a section, a case and a status."""

    out: Path
    crew: Crew
    minutes: float
    small: bool
    seed: int
    gguf: str = ""

    def __post_init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._begun = time.monotonic()
        self._until = self._begun
        self._section = ""
        self._lock = threading.Lock()
        self.out.mkdir(parents=True, exist_ok=True)
        self._file = open(self.out / RESULTS, "a", encoding="utf-8")  # noqa: SIM115, as it is open for all of the run

    @property
    def jax(self) -> list[str]:
        """Names of JAX's workers."""
        return [name for name in self.crew.workers if name.startswith("jax")]

    def begin(self, section: str) -> None:
        """The section's time runs from here."""
        self._section = section
        share = SECTIONS[section] * self.minutes / MINUTES
        self._until = min(time.monotonic() + share, self._begun + 60 * self.minutes - LEAST)

    def left(self) -> float:
        """Seconds of the section."""
        return self._until - time.monotonic()

    def out_of_time(self, case: str, **more: Any) -> bool:
        """Whether too little is left to begin a case, which is then written down as skipped."""
        if self.left() >= LEAST:
            return False
        self.write(case, status="skipped", reason=f"no time left in the section {self._section}", **more)
        return True

    def write(self, case: str, **row: Any) -> dict[str, Any]:
        """Adds a row, on the disk when this returns."""
        row = {"section": self._section, "case": case, **row, "at_s": round(time.monotonic() - self._begun, 1)}
        with self._lock:
            self.rows.append(row)
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        said = {k: row[k] for k in ("worst", "reason") if row.get(k)}
        print(f"{row['at_s']:6.1f} s  {self._section}: {case}: {row['status']} {said or ''}", flush=True)
        return row

    def of(self, section: str) -> list[dict[str, Any]]:
        """The rows of a section."""
        return [row for row in self.rows if row["section"] == section]

    def faults(self) -> list[dict[str, Any]]:
        """Rows that say that something is wrong, or that numbers are missing; in a small run nothing may be skipped."""
        faults = (*FAULTS, "skipped") if self.small else FAULTS
        missing = [row for row in self.of("numerics") if row["status"] == "absent"]
        return missing + [row for row in self.rows if row["status"] in faults or row.get("right") is False]
