"""What a run does, most valuable first: sections, their share of the time, and the cases of each, in full and small."""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels.shapes import Shape
from pallas_kernels.typical_calls import CALLS

MINUTES = 8.0  # that the seconds below are for
SECTIONS = {  # seconds of each at most; what one leaves is the next one's
    "environment": 40,
    "numerics": 215,
    "roofs": 25,
    "attention": 100,
    "recurrence": 40,
    "sparse": 40,
    "model": 60,
}
MORE = ("flash, packed and windowed", "flash, ALiBi and key bias", "linear_scan, packed and carried on")
ROUNDS = 5  # samples of each contender
LEAST = 0.05  # seconds of a sample


@dataclasses.dataclass(frozen=True)
class Case:
    """Contenders that are sampled in turn. `flops` and `bytes`: of one call, where a rate of them is asked for."""

    name: str
    family: str  # of `speed` and `torch_speed`
    shape: Shape
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    sides: tuple[str, ...] = ("jax", "torch")
    flops: float = 0.0
    bytes: float = 0.0


def numerics(small: bool) -> list[tuple[str, Shape]]:
    """Ops and shapes, every op once before any is met again; the largest fill a device with blocks of threads."""
    if small:
        shape = Shape("T70_D64", 1, 70, 2, 1, 64, 64)
        return [(name, shape) for name in (*CALLS, *MORE)]
    first, *others = (
        Shape("T1000_D64", 2, 1000, 4, 2, 64, 64),
        Shape("T257_D96_V64", 1, 257, 4, 2, 96, 64),
        Shape("T4096_D128", 1, 4096, 4, 2, 128, 128),
        Shape("T600_D192", 1, 600, 4, 2, 192, 192),
    )
    more = [(name, shape) for shape in (first, others[1]) for name in MORE]
    return [*((name, first) for name in CALLS), *more[:3], *((n, s) for s in others for n in CALLS), *more[3:]]


def roofs(small: bool) -> list[Case]:
    """Products of random numbers, and copies, which read and write every byte."""
    size, mebibytes = (128, 4) if small else (8192, 4096)
    return [
        Case("products", "products", Shape(f"{size}", 1, size, 1, 1, 1, 1), flops=2.0 * size**3),
        Case("copies", "copies", Shape(f"{mebibytes} MiB", 1, mebibytes, 1, 1, 1, 1), bytes=2.0 * mebibytes * 2**20),
    ]


def attention(small: bool) -> list[Case]:
    """Causal, 16k tokens in all, as many heads as make a width of 2048."""
    lengths = (64,) if small else (8192, 2048, 16384, 4096)
    cases = []
    for length in lengths:
        for dim in (64,) if small else (128, 64):
            heads = 2 if small else 2048 // dim
            shape = Shape(f"T{length}_D{dim}", 1 if small else 16384 // length, length, heads, heads, dim, dim)
            pairs = shape.batch * heads * length**2 / 2  # that are seen
            for part, backward, products in (("forward", False, 2), ("forward and backward", True, 7)):
                name = f"{part} {shape.name}"
                cases.append(Case(name, "attention", shape, {"backward": backward}, flops=2.0 * products * pairs * dim))
    return cases


def recurrence(small: bool) -> list[Case]:
    """Linear attention with a decay per head; the bytes are its inputs and outputs once."""
    cases = []
    for length in (64,) if small else (4096, 16384):
        shape = Shape(f"T{length}", 1, length, 2, 2, 64, 64)
        if not small:
            shape = Shape(f"T{length}", 65536 // length, length, 16, 16, 128, 128)
        once = 2.0 * shape.batch * length * shape.heads * shape.dim
        for part, backward, arrays in (("forward", False, 4), ("forward and backward", True, 4 + 7)):
            cases.append(Case(f"{part} {shape.name}", "recurrence", shape, {"backward": backward}, bytes=arrays * once))
    return cases


def sparse(small: bool) -> list[Case]:
    """A tenth of the blocks against all of them; a cache read through its pages against a copy of it."""
    if small:
        shape, many = Shape("T256", 1, 256, 2, 1, 64, 64), Shape("T1024", 1, 1024, 2, 1, 64, 64)
    else:
        shape, many = Shape("T32768", 1, 32768, 32, 8, 128, 128), Shape("T32768_B16", 16, 32768, 32, 8, 128, 128)
    cache = 2.0 * many.batch * many.kv_heads * many.length * many.dim * 2
    jax = ("jax",)
    return [
        Case(f"a tenth of the blocks {shape.name}", "sparse", shape, sides=jax),
        Case(f"all pages {many.name}", "whole cache", many, sides=jax, bytes=cache),
        Case(f"a sixteenth of the pages {many.name}", "decode", many, sides=jax, bytes=cache / 16),
    ]


def model(small: bool) -> list[dict[str, int]]:
    """Rows, tokens of each prompt, and new tokens."""
    if small:
        return [{"batch": 1, "prompt": 32, "new": 16}]
    return [{"batch": 1, "prompt": 2048, "new": 128}, {"batch": 32, "prompt": 512, "new": 128}]
