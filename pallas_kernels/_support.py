"""What each op's backends can do, found by asking them: every entry is a call that was traced or refused.

A feature is a variant of one call. It is traced for the backend's own platform with shapes alone, so the table is the
code's own answer on any machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct as Struct

from jaxattn.errors import ConfigError
from jaxattn.masks import self_visibility
from jaxattn.rope import Alibi, RelativeBias
from pallas_kernels import _interpret, _versions
from pallas_kernels.flash import Score, flash
from pallas_kernels.linear_scan import linear_scan
from pallas_kernels.shapes import Shape
from pallas_kernels.typical_calls import CALLS, Call

RUNS_ON = {
    "reference": "any device",
    "xla": "any device",
    "tpu": "a TPU",
    "gpu": "a GPU of NVIDIA's Hopper kind",
}
BACKENDS = tuple(RUNS_ON)
SHAPE = Shape("support", 1, 256, 4, 2, 64, 64)
SOFTMAX = Score()
Variant = Callable[[str], Any]  # backend -> result, under jax.eval_shape


@dataclasses.dataclass(frozen=True)
class Entry:
    """One cell of the table: whether `backend` of `op` serves `feature`, else its reason."""

    op: str
    feature: str
    backend: str
    reason: str = ""

    @property
    def served(self) -> bool:
        return not self.reason


def support() -> list[Entry]:
    """Every op × feature × backend, in the order of the table."""
    return [
        Entry(op, feature, backend, refusal(variant, backend))
        for op, features in variants().items()
        for feature, variant in features.items()
        for backend in BACKENDS
    ]


def refusal(variant: Variant, backend: str) -> str:
    """Why the backend does not serve a call; empty where it does."""
    kernel = backend in ("tpu", "gpu")
    with _interpret.compiling_for(backend) if kernel else contextlib.nullcontext():
        try:
            jax.eval_shape(lambda: variant(backend))
        except (NotImplementedError, ConfigError) as error:
            return str(error)
    return ""


def variants() -> dict[str, dict[str, Variant]]:
    """Calls by op and feature."""
    found: dict[str, dict[str, Variant]] = {}
    for name, make in CALLS.items():
        op, _, member = name.partition(", ")
        features = found.setdefault(op, {})
        if member:
            features[member] = _traced(make(SHAPE, jnp.bfloat16), gradient=True)
            continue
        for label, dtype in (("float32", jnp.float32), ("bfloat16", jnp.bfloat16)):
            features[label] = _traced(make(SHAPE, dtype), gradient=False)
        features["float32, products of bfloat16 allowed"] = _rounded(_traced(make(SHAPE, jnp.float32), gradient=False))
        if make(SHAPE, jnp.bfloat16).differentiable:
            features["gradient"] = _traced(make(SHAPE, jnp.bfloat16), gradient=True)
        wide = dataclasses.replace(SHAPE, value_dim=96)
        features["value dim unlike key dim"] = _traced(make(wide, jnp.bfloat16), gradient=False)
        features["head dim 192"] = _traced(
            make(dataclasses.replace(SHAPE, dim=192, value_dim=192), jnp.bfloat16), False
        )
    found["flash"] |= _of_flash()
    found["linear_scan"] |= _of_linear_scan()
    for op in ("block_sparse", "probe"):
        for label, heads in (("key bias", 1), ("key bias per query head", SHAPE.heads)):
            found[op][label] = _biased(CALLS[op](SHAPE, jnp.bfloat16), heads)
    return found


def _traced(call: Call, gradient: bool) -> Variant:
    def run(backend: str) -> Any:
        return jax.eval_shape(call.gradient(backend) if gradient else call.run(backend), *call.arguments)

    return run


def _biased(call: Call, heads: int) -> Variant:
    """With a key bias, and its gradient where the call has one."""
    bias = Struct((1, heads, SHAPE.size), jnp.float32)

    def run(backend: str) -> Any:
        function = lambda bias, *arrays: call.function(*arrays, key_bias=bias, backend=backend)
        loss = lambda *arrays: jnp.sum(function(*arrays).astype(jnp.float32))
        return jax.eval_shape(jax.grad(loss) if call.differentiable else function, bias, *call.arguments)

    return run


def _rounded(variant: Variant) -> Variant:
    """Where JAX is told that operands of products may be rounded."""

    def run(backend: str) -> Any:
        with jax.default_matmul_precision("BF16_BF16_F32"):
            return variant(backend)

    return run


def _of_flash() -> dict[str, Variant]:
    q, k, v = CALLS["flash"](SHAPE, jnp.bfloat16).arguments
    segments = jnp.ones((1, SHAPE.length), jnp.int32)

    def variant(score: Score = SOFTMAX, bias: Any = None, options: Any = None, **rules: Any) -> Variant:
        def run(backend: str) -> Any:
            vis = self_visibility(1, SHAPE.length, **rules)
            more: dict[str, Any] = {"scale": 0.1} | (options or {})
            call = lambda q, k, v: flash(q, k, v, vis, score, bias=bias, backend=backend, **more)
            return jax.eval_shape(call, q, k, v)

        return run

    return {
        "not causal": variant(causal=False),
        "window": variant(window=64),
        "packed segments": variant(segment_ids=segments),
        "prefix": variant(prefix_len=jnp.array([8])),
        "p-norm": variant(Score("exp", "p_norm", p=0.5)),
        "relu over count": variant(Score("relu", "count")),
        "ALiBi": variant(bias=Alibi(jnp.ones(4))),
        "relative bias": variant(bias=RelativeBias(jnp.zeros((32, 4)))),
        "scale per query and head": variant(options={"scale": jnp.ones((1, SHAPE.length, 4))}),
        "key bias": variant(options={"key_bias": jnp.zeros((1, 1, SHAPE.length))}),
        "log-sum-exp or row mass": variant(options={"stats": True}),
    }


def _of_linear_scan() -> dict[str, Variant]:
    q, k, v, _ = CALLS["linear_scan"](SHAPE, jnp.bfloat16).arguments
    decay = Struct((1, SHAPE.length, SHAPE.heads), jnp.float32)
    state = Struct((1, SHAPE.heads, SHAPE.dim, SHAPE.value_dim), jnp.float32)

    def variant(*extra: str, **options: Any) -> Variant:
        shapes = [{"log_decay": decay, "initial_state": state}[name] for name in extra]

        def run(backend: str) -> Any:
            call = lambda q, k, v, *rest: linear_scan(
                q, k, v, backend=backend, **dict(zip(extra, rest, strict=True)), **options
            )
            return jax.eval_shape(call, q, k, v, *shapes)

        return run

    return {
        "no decay": variant(),
        "decay per token": variant("log_decay"),
        "initial state": variant("initial_state"),
        "packed segments": variant(segments=jnp.ones((1, SHAPE.length), jnp.int32)),
    }


def markdown() -> str:
    """The table, and below it what each backend runs on and every reason once."""
    entries, lines = support(), ["| op | feature | " + " | ".join(BACKENDS) + " |", "|---" * (2 + len(BACKENDS)) + "|"]
    reasons: list[str] = []

    def cell(entry: Entry) -> str:
        if entry.served:
            return "yes"
        if entry.reason not in reasons:
            reasons.append(entry.reason)
        return f"no ({reasons.index(entry.reason) + 1})"

    for i in range(0, len(entries), len(BACKENDS)):
        row = entries[i : i + len(BACKENDS)]
        lines.append(f"| {row[0].op} | {row[0].feature} | " + " | ".join(map(cell, row)) + " |")
    notes = [f"{n}. {reason}" for n, reason in enumerate(reasons, 1)]
    needs = "; ".join(f"{backend}: JAX {_versions.oldest(backend)}, {where}" for backend, where in RUNS_ON.items())
    return "\n".join([*lines, "", f"Needed at least: {needs}.", "", *notes]) + "\n"
