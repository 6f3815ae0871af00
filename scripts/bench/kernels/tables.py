"""The cases of each platform, and what follows from several of them together."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import jax.numpy as jnp

from pallas_kernels import Score
from pallas_kernels.shapes import Shape
from scripts.bench.kernels.cases import (
    OURS,
    Case,
    attention,
    causal_flops,
    decode,
    recurrence,
    sparse,
    whole_cache,
)
from scripts.bench.timing import interleaved, ratio

SIGMOID = Score("sigmoid", "none", logit_bias=-8.0)
SCANS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
GROWTH = 1.25  # of the time per token over a factor of 64 in length: what counts as constant
BEYOND_CACHES = 8192  # tokens whose arrays (4 KB a token) no CPU cache holds any more
SOFTMAX_UP_TO = 16384  # tokens up to which softmax attention is timed beside the recurrence


def cases_for(platform: str) -> list[Case]:
    """Everything measured on a platform."""
    return _accelerator(platform) if platform in ("gpu", "tpu") else _cpu()


def _cpu() -> list[Case]:
    cases, f32 = [], jnp.float32
    for length, heads in ((2048, 4), (4096, 4), (8192, 2)):
        shape = Shape(f"{length}", 1, length, heads, heads // 2, 64, 64)
        for part, backward in (("forward", False), ("backward", True)):
            make = attention(Score(), backward=backward, dtype=f32)
            cases.append(
                Case(f"flash softmax {part} {length}", "flash", shape, make, 1.0, ("jax.nn xla",),
                     flops=causal_flops(shape, 7 if backward else 2))
            )  # fmt: skip
    for part, backward in (("forward", False), ("backward", True)):
        for length in SCANS:
            shape = Shape(f"{length}", 1, length, 4, 4, 64, 64)
            make = recurrence(backward=backward, dtype=f32, rival=length <= SOFTMAX_UP_TO)
            cases.append(Case(f"linear_scan {part} {length}", "linear_scan", shape, make, same=False))
    shape = Shape("16384", 1, 16384, 2, 1, 64, 64)
    dense = ("flash, dense", "jax.nn xla")
    make = sparse(0.1, 128, dtype=f32)
    cases.append(Case("block_sparse 90 % 16384", "block_sparse", shape, make, 5.0, dense, same=False))
    shape = Shape("32768", 1, 32768, 8, 8, 64, 64)
    make = decode(1 / 16, 64, dtype=f32)
    cases.append(Case("paged_decode 1/16 of 32768", "paged_decode", shape, make, 8.0, dense[:1], same=False))
    return cases


def _accelerator(platform: str) -> list[Case]:
    cases, bf16 = [], jnp.bfloat16
    best = ("jax.nn cudnn",) if platform == "gpu" else ("jax pallas tpu",)
    for dim in (64, 128):
        for length in (2048, 4096, 8192, 16384):
            shape = Shape(f"{length}_D{dim}", 16384 // length, length, 16, 16, dim, dim)
            for part, backward, bar in (("forward", False, 0.85), ("backward", True, 0.75)):
                flops = causal_flops(shape, 7 if backward else 2)
                soft = attention(Score(), backward=backward, dtype=bf16)
                name = f"{part} {shape.name}"
                cases.append(Case(f"flash softmax {name}", "flash", shape, soft, bar, best, flops=flops))
                make = attention(SIGMOID, backward=backward, dtype=bf16)
                cases.append(Case(f"flash sigmoid {name}", "flash", shape, make, flops=flops))
    for part, backward in (("forward", False), ("backward", True)):
        for length in SCANS[1:]:
            shape = Shape(f"{length}", 65536 // length, length, 16, 16, 128, 128)
            make = recurrence(backward=backward, dtype=bf16, rival=length <= SOFTMAX_UP_TO)
            cases.append(
                Case(f"linear_scan {part} {length}", "linear_scan", shape, make, 1.0, ("fla simple_gla",), same=False)
            )
    shape = Shape("32768", 1, 32768, 32, 8, 128, 128)
    make = sparse(0.1, 128, dtype=bf16)
    cases.append(Case("block_sparse 90 % 32768", "block_sparse", shape, make, 5.0, best, same=False))
    shape = dataclasses.replace(shape, heads=32, kv_heads=8)
    make = decode(1 / 16, 64, dtype=bf16)
    cases.append(Case("paged_decode 1/16 of 32768", "paged_decode", shape, make, 8.0, ("flash, dense",), same=False))
    case = Case(
        "paged_decode all of 32768", "paged_decode", shape, whole_cache(64, dtype=bf16), 1.6, ("copy",), same=False
    )
    return [*cases, case]


def derived(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Claims about several rows: where the recurrence passes softmax, sigmoid over softmax."""
    found = []
    for part in ("forward", "backward"):
        scans = [row for row in rows if row["case"].startswith(f"linear_scan {part}")]
        if len(scans) > 1:
            faster = [r["shape"]["length"] for r in scans if "flash" in r["median_ms"]
                      and r["median_ms"][OURS] < r["median_ms"]["flash"]]  # fmt: skip
            found.append({
                "claim": f"linear_scan {part} is faster than flash from {min(faster, default=0)} tokens on",
                "from": min(faster, default=None), "reached": bool(faster),
            })  # fmt: skip
        sigmoid = {r["shape"]["name"]: r for r in rows if r["case"].startswith(f"flash sigmoid {part}")}
        soft = {r["shape"]["name"]: r for r in rows if r["case"].startswith(f"flash softmax {part}")}
        shared = [name for name in sigmoid if name in soft]
        if shared:
            ratios = [soft[n]["median_ms"][OURS] / sigmoid[n]["median_ms"][OURS] for n in shared]
            found.append({
                "claim": f"sigmoid {part} against our softmax", "ratio": statistics.median(ratios),
                "least": min(ratios), "bar": 1.05, "reached": statistics.median(ratios) >= 1.05,
            })  # fmt: skip
    return found


def scaling(rounds: int, dtype: Any) -> list[dict[str, Any]]:
    """Time per token of the recurrence at every length; the lengths take turns, as contenders do elsewhere."""
    found = []
    for part, backward in (("forward", False), ("backward", True)):
        make = recurrence(backward=backward, dtype=dtype, rival=False)
        calls = {n: make(Shape(f"{n}", 1, n, 4, 4, 64, 64))[OURS] for n in SCANS}
        seconds = {int(n): s for n, s in interleaved({str(n): c for n, c in calls.items()}, rounds).items()}
        per_token = {n: [x / n for x in s] for n, s in seconds.items()}
        for first in (SCANS[0], BEYOND_CACHES):
            row = ratio(per_token[SCANS[-1]], per_token[first])
            found.append({
                "claim": f"linear_scan {part}: time per token at {SCANS[-1]} over that at {first} tokens",
                "us_per_token": {n: 1e6 * statistics.median(s) for n, s in per_token.items() if n >= first},
                **row, "bar": GROWTH, "reached": row["ratio"] <= GROWTH,
            })  # fmt: skip
    return found
