"""What is on the machine: asked of each side in its own process, a failure of one saying nothing of the other."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

NEEDED = ("jax", "jaxlib", "numpy", "jaxtyping", "flax")  # without which there is no run; flax brings others
USED = {  # and what becomes of it where it is not there
    "matplotlib": "no picture",
    "torch": "no rivals of PyTorch",
    "triton": "no rivals in Triton",
    "flash-linear-attention": "linear_scan has no rival",
    "gguf": "the model's weights are random",
    "tyro": "the model's weights are random",
    "nvidia-cudnn-cu13": "jax.nn's cuDNN attention may be missing",
}
ALSO = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc")


def packages() -> dict[str, str]:
    """Versions of what a run needs or uses; empty where it is not installed."""

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return ""

    return {name: version(name) for name in (*NEEDED, *USED, *ALSO)}


def machine() -> dict[str, Any]:
    """Of the parent process: nothing of this starts JAX."""
    return {
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "packages": packages(),
        "commit": commit(),
        "gpu": _output(
            "nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"
        ),
        "ptxas": {path: "".join(re.findall(r"release [\d.]+", _output(path, "--version"))) for path in _ptxas()},
    }


def commit() -> str:
    """The git hash of this tree, `+` behind it where files differ from it; empty outside of a repository."""
    here = str(Path(__file__).parent)
    found = _output("git", "-C", here, "rev-parse", "HEAD")
    return found + ("+" if found and _output("git", "-C", here, "status", "--porcelain", "-uno") else "")


def _ptxas() -> list[str]:
    """Compilers of NVIDIA's assembly language that JAX may find: on the path, CUDA's, and its wheel's."""
    wheel = importlib.util.find_spec("nvidia")
    places = [Path(shutil.which("ptxas") or "/nowhere"), Path("/usr/local/cuda/bin/ptxas")]
    for folder in (wheel.submodule_search_locations or []) if wheel else []:
        places += Path(folder).glob("*/bin/ptxas")
    return sorted({str(path.resolve()) for path in places if path.is_file()})


def _output(*command: str) -> str:
    """What a program prints, or nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def jax_side() -> dict[str, Any]:
    """The device as JAX sees it, a product done on it, and why our kernels for GPUs cannot be built, if so."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import _mosaic_gpu

    device = jax.devices()[0]
    x = jnp.ones((256, 256), jnp.bfloat16)
    total = float(jnp.sum((x @ x).astype(jnp.float32)))
    if total != 256.0**3:
        raise ArithmeticError(f"ones times ones sum to {total}, not to {256**3}")
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "capability": str(getattr(device, "compute_capability", "")),
        "bytes_limit": (device.memory_stats() or {}).get("bytes_limit"),
        "kernels": _mosaic_gpu.missing() or "can be built",
    }


def torch_side() -> dict[str, Any]:
    """The device as PyTorch sees it."""
    import torch

    from scripts.bench.device.tasks import Absent

    if not torch.cuda.is_available():
        raise Absent(f"torch {torch.__version__} sees no GPU")
    return {
        "device": torch.cuda.get_device_name(0),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "fla": importlib.util.find_spec("fla") is not None,
    }
