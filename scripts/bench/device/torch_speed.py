"""PyTorch's side of the timed cases, in a process without JAX: timed by the GPU's own events."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from pallas_kernels.shapes import Shape
from scripts.bench.device.tasks import Absent, short

Call = Callable[[], Any]
_held: dict[str, dict[str, Call]] = {}  # by case
_repeats: dict[tuple[str, str], int] = {}
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SEED = 0


def make(case: str, family: str, shape: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The contenders of a case, and why others are not here."""
    torch.manual_seed(SEED)
    _held[case], absent = FAMILIES[family](Shape(**shape), **options)
    return {"contenders": list(_held[case]), "absent": absent}


def ready(case: str, contender: str) -> dict[str, Any]:
    """Runs a contender once.

    Raises:
      Absent: this build, or this GPU, does not have it.
    """
    _repeats[case, contender] = 0
    try:
        _held[case][contender]()
        if CUDA:
            torch.cuda.synchronize()
    except (RuntimeError, ImportError) as error:
        raise Absent(f"{type(error).__name__}: {short(error)}") from error
    return {}


def compare(case: str, contenders: list[str]) -> dict[str, Any]:
    """Nothing: they are given other random numbers than JAX's."""
    return {"differences": {}}


def sample(case: str, contender: str, least: float) -> dict[str, Any]:
    """Seconds of one call, in the mean over as many as take `least` seconds."""
    call, key = _held[case][contender], (case, contender)
    _repeats[key] = _repeats[key] or max(1, round(least / max(_seconds(call, 3), 1e-7)))
    return {"seconds_a_call": _seconds(call, _repeats[key]), "repeats": _repeats[key]}


def drop(case: str) -> dict[str, Any]:
    """Lets go of a case's tensors."""
    _held.pop(case, None)
    return {}


def _seconds(call: Call, count: int) -> float:
    if not CUDA:
        begun = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - begun) / count
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(count):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / count


def _drawn(*shape: int, dtype: Any = torch.bfloat16) -> Any:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def _pulled(function: Callable[..., Any], tensors: list[Any], backward: bool) -> Call:
    """The forward pass, or both from a given gradient of the output."""

    def forward() -> Any:
        with torch.no_grad():
            return function(*tensors)

    kept: list[Any] = []

    def both() -> Any:
        if not kept:
            kept.append(torch.randn_like(forward()))
            for x in tensors:
                x.requires_grad_()
        return torch.autograd.grad(function(*tensors), tensors, kept[0])

    return both if backward else forward


def attention(shape: Shape, backward: bool) -> tuple[dict[str, Call], dict[str, str]]:
    """Causal scaled_dot_product_attention by FlashAttention-2 and by cuDNN; on a CPU whatever it takes."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = {"torch SDPA flash": SDPBackend.FLASH_ATTENTION, "torch SDPA cudnn": SDPBackend.CUDNN_ATTENTION}
    kinds = kinds if CUDA else {"torch SDPA": SDPBackend.MATH}
    heads = (shape.heads, shape.dim), (shape.kv_heads, shape.dim), (shape.kv_heads, shape.value_dim)
    drawn = [_drawn(shape.batch, n, shape.length, dim) for n, dim in heads]
    attend: Any = torch.nn.functional.scaled_dot_product_attention
    group = {"enable_gqa": True} if shape.heads > shape.kv_heads else {}

    def by(kind: Any) -> Callable[..., Any]:
        def call(q: Any, k: Any, v: Any) -> Any:
            with sdpa_kernel(kind):
                return attend(q, k, v, is_causal=True, scale=1 / math.sqrt(shape.dim), **group)

        return call

    return {name: _pulled(by(kind), [x.clone() for x in drawn], backward) for name, kind in kinds.items()}, {}


def recurrence(shape: Shape, backward: bool) -> tuple[dict[str, Call], dict[str, str]]:
    """flash-linear-attention's Triton kernel of the same recurrence."""
    name = "fla simple_gla"
    if not CUDA:
        return {}, {name: "needs a GPU"}
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError as error:
        return {}, {name: f"cannot be imported: {error}"}
    heads = (shape.dim, shape.dim, shape.value_dim)
    q, k, v = (_drawn(shape.batch, shape.length, shape.heads, dim) for dim in heads)
    decay = -(2.0 ** -torch.arange(1, shape.heads + 1, device=DEVICE))
    steps = decay.expand(shape.batch, shape.length, shape.heads).contiguous()
    call = lambda q, k, v: chunk_simple_gla(q, k, v, g=steps, scale=1.0)[0]
    return {name: _pulled(call, [q, k, v], backward)}, {}


def products(shape: Shape) -> tuple[dict[str, Call], dict[str, str]]:
    """A square product of `shape.length`."""
    a, b, out = (_drawn(shape.length, shape.length) for _ in range(3))
    return {"torch matmul": lambda: torch.mm(a, b, out=out)}, {}


def copies(shape: Shape) -> tuple[dict[str, Call], dict[str, str]]:
    """A copy of `shape.length` MiB."""
    x = _drawn(shape.length, 1 << 18, dtype=torch.float32)
    y = torch.empty_like(x)
    return {"torch copy": lambda: y.copy_(x)}, {}


FAMILIES: dict[str, Callable[..., tuple[dict[str, Call], dict[str, str]]]] = {
    "products": products,
    "copies": copies,
    "attention": attention,
    "recurrence": recurrence,
}
