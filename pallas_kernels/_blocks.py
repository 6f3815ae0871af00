"""Block sizes by measurement: one small JSON table per kind of device, written by `scripts.bench.tune`.

`blocks/cpu.json`, `blocks/tpu-v5-lite.json`, `blocks/nvidia-h100-80gb-hbm3.json`, ...; a kind without a table, and
programs compiled ahead of time, get the defaults in the code.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax

from pallas_kernels import _interpret

FOLDER = Path(__file__).parent / "blocks"


def table_name(device_kind: str) -> str:
    """File name of a device kind's table: "TPU v5 lite" -> "tpu-v5-lite.json"."""
    words = "".join(c if c.isalnum() else " " for c in device_kind.lower()).split()
    return "-".join(words) + ".json"


def blocks(op: str, backend: str, dim: int, **defaults: int) -> dict[str, int]:
    """Sizes for a call with head dim `dim`: the measured ones of the next larger dim in the table, else `defaults`.

    Returns:
      the same names as `defaults`.
    """
    if _interpret.mode() is not False or _interpret.targeted():
        return defaults
    measured = _table(jax.devices()[0].device_kind).get(f"{op}/{backend}", {})
    fitting = sorted(int(d) for d in measured if int(d) >= dim)
    return defaults | {k: v for k, v in measured[str(fitting[0])].items() if k in defaults} if fitting else defaults


@functools.cache
def _table(device_kind: str) -> dict[str, dict[str, dict[str, int]]]:
    path = FOLDER / table_name(device_kind)
    return json.loads(path.read_text("utf-8"))["blocks"] if path.is_file() else {}
