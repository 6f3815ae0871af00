"""Other people's kernels, where they are installed and run: names to functions of q, k, v.

What is absent is named by `absent`, with the reason, so that a table can say "not measured".
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.shapes import Shape

DENSE_LIMIT = 4 << 30  # bytes of scores; above, whoever holds all of them is left out


def absent() -> dict[str, str]:
    """Rivals that cannot run here, and why."""
    gpu = jax.default_backend() == "gpu"
    reasons = {}
    if not gpu:
        for name in ("jax.nn cudnn", "fla simple_gla", "jax pallas mosaic_gpu"):
            reasons[name] = "needs a GPU"
    if importlib.util.find_spec("tokamax") is None:
        reasons["tokamax"] = "is not installed"
    if importlib.util.find_spec("torch") is None:
        reasons["torch SDPA"] = "is not installed"
    if gpu and importlib.util.find_spec("fla") is None:
        reasons["fla simple_gla"] = "is not installed"
    return reasons


def softmax(shape: Shape, dtype: Any) -> dict[str, Callable[..., Any]]:
    """Causal softmax attention as JAX offers it."""
    scale, found = 1 / math.sqrt(shape.dim), {}
    missing = absent()

    def builtin(implementation: Literal["xla", "cudnn"]) -> Callable[..., Any]:
        return lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=True, implementation=implementation
        )

    if 4 * shape.batch * shape.heads * shape.length * shape.size <= DENSE_LIMIT:
        found["jax.nn xla"] = builtin("xla")
    if "jax.nn cudnn" not in missing and dtype == jnp.bfloat16:
        found["jax.nn cudnn"] = builtin("cudnn")
    if "tokamax" not in missing:
        import tokamax

        found["tokamax"] = lambda q, k, v: tokamax.dot_product_attention(q, k, v, scale=scale, is_causal=True)
    if jax.default_backend() == "tpu":
        found["jax pallas tpu"] = _jax_tpu(scale)
    return found


def _jax_tpu(scale: float) -> Callable[..., Any]:
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    def call(q: Any, k: Any, v: Any) -> Any:
        repeat = lambda x: jnp.swapaxes(jnp.repeat(x, q.shape[2] // x.shape[2], axis=2), 1, 2)
        return jnp.swapaxes(flash_attention(repeat(q), repeat(k), repeat(v), causal=True, sm_scale=scale), 1, 2)

    return call


def torch_softmax(q: Any, k: Any, v: Any, backward: bool) -> dict[str, Callable[[], Any]]:
    """PyTorch's scaled_dot_product_attention on the same numbers and device."""
    if "torch SDPA" in absent() or jax.default_backend() == "tpu":
        return {}
    import numpy as np
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        return {}
    kind = torch.bfloat16 if q.dtype == jnp.bfloat16 else torch.float32
    turn = lambda x: torch.from_numpy(np.array(x, np.float32)).to(device, kind).transpose(1, 2).contiguous()
    tensors = [turn(x).requires_grad_(backward) for x in (q, k, v)]
    weight = torch.cos(torch.arange(v.shape[-1], dtype=torch.float32, device=device))
    attend: Any = torch.nn.functional.scaled_dot_product_attention

    def call() -> Any:
        with torch.set_grad_enabled(backward):
            o = attend(*tensors, is_causal=True, enable_gqa=True)
            out = torch.autograd.grad((o.float() * weight).sum(), tensors) if backward else (o,)
        if device == "cuda":
            torch.cuda.synchronize()
        return tuple(x.detach().transpose(1, 2) for x in out)

    return {"torch SDPA": call}


def triton_linear(q: Any, k: Any, v: Any, decay: Any, backward: bool) -> dict[str, Callable[[], Any]]:
    """flash-linear-attention's kernel of the same recurrence."""
    if "fla simple_gla" in absent():
        return {}
    import numpy as np
    import torch
    from fla.ops.simple_gla import chunk_simple_gla

    turn = lambda x: torch.from_numpy(np.array(x, np.float32)).to("cuda", torch.bfloat16)
    repeat = lambda x: jnp.repeat(x, q.shape[2] // x.shape[2], axis=2)
    tensors = [turn(x).requires_grad_(backward) for x in (q, repeat(k), repeat(v))]
    steps = torch.from_numpy(np.array(decay)).to("cuda").expand(*q.shape[:3]).contiguous()
    weight = torch.cos(torch.arange(v.shape[-1], dtype=torch.float32, device="cuda"))

    def call() -> Any:
        with torch.set_grad_enabled(backward):
            o, _ = chunk_simple_gla(*tensors, g=steps, scale=1.0)
            out = torch.autograd.grad((o.float() * weight).sum(), tensors) if backward else (o,)
        torch.cuda.synchronize()
        return tuple(x.detach() for x in out)

    return {"fla simple_gla": call}
