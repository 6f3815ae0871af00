"""JAX's side of the timed cases: contenders are made ready, sampled in turn with those of `torch_speed`, dropped.

A sample is the seconds of one call of many that wait in the device's queue, each of which writes over the results of
the one before; the host waits once, behind the last.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.masks import self_visibility
from pallas_kernels import Score, flash
from pallas_kernels.linear_scan import linear_scan
from pallas_kernels.shapes import Shape
from scripts.bench.device.tasks import Absent, short
from scripts.bench.kernels.cases import OURS, decode, inputs, reusing, sparse, whole_cache
from scripts.bench.kernels.tables import SIGMOID
from scripts.bench.timing import queued, repeats_for

Call = Callable[[], Any]
AGREE = 4e-2  # of the largest entry: contenders of one mathematical function
_held: dict[str, dict[str, Call]] = {}  # by case
_same: dict[str, dict[str, str]] = {}  # by case: whose numbers are to be whose
_repeats: dict[tuple[str, str], int] = {}


def make(case: str, family: str, shape: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The contenders of a case, none of which has run, and why others are not here."""
    _held[case], absent, _same[case] = FAMILIES[family](Shape(**shape), **options)
    return {"contenders": list(_held[case]), "absent": absent}


def ready(case: str, contender: str) -> dict[str, Any]:
    """Compiles a contender and runs it once.

    Raises:
      Absent: it is not ours, and this device or version does not have it.
    """
    begun = time.monotonic()
    _repeats[case, contender] = 0
    try:
        jax.block_until_ready(_held[case][contender]())
    except (NotImplementedError, RuntimeError, ValueError) as error:  # JAX's own are RuntimeErrors
        if contender.startswith(OURS):
            raise
        raise Absent(f"{type(error).__name__}: {short(error)}") from error
    return {"first_s": round(time.monotonic() - begun, 2)}


def compare(case: str, contenders: list[str]) -> dict[str, Any]:
    """The largest difference of those that compute the same, of the largest entry.

    Raises:
      ValueError: some disagree, so that times of them mean nothing.
    """
    held, pairs = _held[case], [pair for pair in _same[case].items() if set(pair) <= set(contenders)]
    found = {name: _differ(held[name](), held[of]()) for name, of in pairs}
    if wrong := {name: worst for name, worst in found.items() if not worst <= AGREE}:
        raise ValueError(f"contenders disagree, so nothing is timed: {wrong}")
    return {"differences": found}


def sample(case: str, contender: str, least: float) -> dict[str, Any]:
    """Seconds of one call, in the mean over as many as take `least` seconds."""
    call = _held[case][contender]
    count = _repeats[case, contender] or repeats_for(call, least)
    _repeats[case, contender] = count
    return {"seconds_a_call": queued(call, count), "repeats": count}


def drop(case: str) -> dict[str, Any]:
    """Lets go of a case's arrays and programs."""
    _held.pop(case, None)
    return {}


def _differ(a: Any, b: Any) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    f64 = lambda x: np.asarray(x.astype(jnp.float32), np.float64)
    return max(float(np.abs(f64(x) - f64(y)).max() / np.abs(f64(y)).max()) for x, y in pairs)


Family = tuple[dict[str, Call], dict[str, str], dict[str, str]]  # contenders, who is absent, whose numbers are whose


def _backend() -> str:
    """The kernels by name on a GPU, so that nothing slower is timed for them; a dry run times what XLA makes."""
    return "gpu" if jax.default_backend() == "gpu" else "auto"


def _pulled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Forward and backward pass from a given gradient of the output."""
    return lambda q, k, v, do: jax.vjp(function, q, k, v)[1](do)


def attention(shape: Shape, backward: bool) -> Family:
    """Causal attention: ours with softmax and with sigmoid, and JAX's own by cuDNN."""
    q, k, v = inputs(shape, jnp.bfloat16)
    do = jax.random.normal(jax.random.key(9), (*q.shape[:3], v.shape[3]), q.dtype)
    vis, scale, backend = self_visibility(shape.batch, shape.length), 1 / math.sqrt(shape.dim), _backend()
    ours = lambda score: lambda q, k, v: flash(q, k, v, vis, score, scale=scale, backend=backend)
    by: Literal["cudnn", "xla"] = "cudnn" if backend == "gpu" else "xla"
    rival = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation=by)
    functions = {f"{OURS} softmax": ours(Score()), f"{OURS} sigmoid": ours(SIGMOID), f"jax.nn {by}": rival}
    bind = lambda f: reusing(_pulled(f), q, k, v, do) if backward else reusing(f, q, k, v)
    return {name: bind(f) for name, f in functions.items()}, {}, {f"jax.nn {by}": f"{OURS} softmax"}


def recurrence(shape: Shape, backward: bool) -> Family:
    """Linear attention with a decay per head, and our softmax attention over the same tokens."""
    q, k, v = inputs(shape, jnp.bfloat16)
    do = jax.random.normal(jax.random.key(9), (*q.shape[:3], v.shape[3]), q.dtype)
    vis, backend = self_visibility(shape.batch, shape.length), _backend()
    decay = -(2.0 ** -jnp.arange(1, shape.heads + 1, dtype=jnp.float32))
    scan = lambda q, k, v: linear_scan(q, k, v, log_decay=decay, backend=backend)[0]
    soft = lambda q, k, v: flash(q, k, v, vis, Score(), scale=shape.dim**-0.5, backend=backend)
    bind = lambda f: reusing(_pulled(f), q, k, v, do) if backward else reusing(f, q, k, v)
    return {OURS: bind(scan), f"{OURS} flash": bind(soft)}, {}, {}


def _of_kernels(make: Callable[[Shape], dict[str, Call]]) -> Callable[[Shape], Family]:
    return lambda shape: (make(shape), {}, {})


def products(shape: Shape) -> Family:
    """A square product of `shape.length` by cuBLAS, of random numbers: zeros take less power and run faster."""
    a, b = (jax.random.normal(jax.random.key(n), (shape.length,) * 2, jnp.bfloat16) for n in (0, 1))
    return {"jax matmul": reusing(lambda a, b: a @ b, a, b)}, {}, {}


def copies(shape: Shape) -> Family:
    """A copy of `shape.length` MiB."""
    x = jax.random.normal(jax.random.key(0), (shape.length, 1 << 18), jnp.float32)
    return {"jax copy": reusing(lambda x: x.copy(), x)}, {}, {}


FAMILIES: dict[str, Callable[..., Family]] = {
    "products": products,
    "copies": copies,
    "attention": attention,
    "recurrence": recurrence,
    "sparse": _of_kernels(sparse(0.1, 128, dtype=jnp.bfloat16)),
    "decode": _of_kernels(decode(1 / 16, 64, dtype=jnp.bfloat16)),
    "whole cache": _of_kernels(whole_cache(64, dtype=jnp.bfloat16)),
}
