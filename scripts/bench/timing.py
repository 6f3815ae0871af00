"""Timing of calls that take turns: on a noisy machine only ratios inside one run mean anything."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

LEAST = 0.05  # seconds of one sample; shorter calls are repeated inside it


def once(call: Callable[[], Any]) -> float:
    """Seconds of one call, its results waited for."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def queued(call: Callable[[], Any], count: int) -> float:
    """Seconds of one of `count` calls that wait in the device's queue, which works in order; the last is waited for."""
    start, last = time.perf_counter(), None
    for _ in range(count):
        last = call()
    jax.block_until_ready(last)
    return (time.perf_counter() - start) / count


def repeats_for(call: Callable[[], Any], least: float = LEAST) -> int:
    """How many queued calls take `least` seconds, on a device that has been woken by as many."""
    count = max(1, round(least / max(queued(call, 3), 1e-7)))
    return max(1, round(least / max(queued(call, count), 1e-7)))


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int, least: float = LEAST) -> dict[str, list[float]]:
    """Seconds a call, one sample a round of each; the order is reversed every second round. The first call of each,
    which compiles, is not counted."""
    repeats = {}
    for name, call in calls.items():
        once(call)
        repeats[name] = max(1, round(least / max(once(call), 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for r in range(rounds):
        for name in calls if r % 2 == 0 else reversed(list(calls)):
            total = sum(once(calls[name]) for _ in range(repeats[name]))
            seconds[name].append(total / repeats[name])
    return seconds


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Median, least and most of the ratio of two contenders' seconds, round by round."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
