"""Compiling for an H100 without one, and what the compiler says about each kernel."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import _mosaic_gpu, _versions, compiling_for

TARGET = Path(__file__).with_name("h100.txtpb")
SHARED_BYTES = _mosaic_gpu.SHARED_BYTES
ALIGNMENT = 1024  # of shared memory, which starts behind at most so many bytes
BARRIERS = r"num_barriers=(\d+)[^)]*\): (\d+)"  # of a kind, and how many of that kind
SALT, COMPILATIONS = "__", itertools.count()
DUMP = "MOSAIC_GPU_DUMP_TO"
SERIALIZED = "wgmma.mma_async instructions are serialized"  # what the compiler says where it lost the overlap


@dataclasses.dataclass(frozen=True)
class Resources:
    """Of one kernel. Registers are per thread as compiled; instructions are counted in PTX."""

    name: str
    registers: int
    spill_bytes: int  # stores and loads
    stack_bytes: int
    shared_bytes: int
    wgmma: int
    tma: int
    barriers: int


def missing() -> str | None:
    """Why nothing can be compiled for an H100 here, or None."""
    if reason := _versions.too_old_for_gpus():
        return reason
    for name in ("jax_cuda13_plugin", "jax_plugins.xla_cuda13"):
        try:
            if importlib.util.find_spec(name) is None:
                return f"no compiler for GPUs here: {name} is not installed"
        except ModuleNotFoundError:
            return f"no compiler for GPUs here: {name} is not installed"
    return None


@functools.cache
def sharding() -> NamedSharding:
    """Places an argument on the one H100 that is compiled for."""
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=TARGET.read_text())
    return NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())


def struct(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    """An argument on the H100."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding())


def compiled(function: Callable[..., Any], *arguments: Any) -> tuple[Any, list[Resources]]:
    """`jax.jit(function)` compiled for arguments made by `struct`, and the resources of its Mosaic kernels.

    A kernel that needs more shared memory than there is does not lower; JAX says how much.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        _dumping(folder),
        _uncached(),
        mock.patch.object(_mosaic_gpu, "launch", _renamed(_mosaic_gpu.launch)),
        compiling_for("gpu"),
    ):
        program = jax.jit(function).lower(*arguments).compile()
        return program, _read(Path(folder))


def _renamed(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Kernels under names that no earlier one had: of one that it knows the compiler would say nothing."""
    number = next(COMPILATIONS)
    return lambda how, *rest: launch(dataclasses.replace(how, name=f"{how.name}{SALT}{number}"), *rest)


@contextlib.contextmanager
def _dumping(folder: str) -> Iterator[None]:
    """The kernels' compiler reads this variable each time."""
    before = os.environ.get(DUMP)
    os.environ[DUMP] = folder
    try:
        yield
    finally:
        os.environ.pop(DUMP)
        if before is not None:
            os.environ[DUMP] = before


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """A program from JAX's cache would compile no kernel, and leave nothing to read."""
    before = jax.config.jax_enable_compilation_cache  # pyrefly: ignore[missing-attribute]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _read(folder: Path) -> list[Resources]:
    return [_resources(path) for path in sorted(folder.glob("*.ptxas"))]


def _resources(path: Path) -> Resources:
    name = re.sub(r"_\d+$", "", path.stem)
    said, ptx = path.read_text(), path.with_suffix(".ptx").read_text()
    assert SERIALIZED not in said, f"{name}: products wait for each other: {said}"
    # Lowering and compiling number the kernels differently: of kernels of one name the largest demand is taken.
    asked = [file.read_text() for file in path.parent.glob(f"{name}_*.resources.txt")]
    number = lambda pattern, text: sum(int(n) for n in re.findall(pattern, text))
    barriers = max(sum(int(n) * int(m) for n, m in re.findall(BARRIERS, text)) for text in asked)
    scratch = max(number(r"smem_scratch_bytes=(\d+)", text) for text in asked)
    return Resources(
        name=name.split(SALT)[0],
        registers=max(int(n) for n in re.findall(r"[Uu]sed (\d+) registers", said)),
        spill_bytes=number(r"(\d+) bytes spill", said),
        stack_bytes=number(r"(\d+) bytes stack frame", said),
        shared_bytes=scratch + 8 * barriers + ALIGNMENT,
        wgmma=ptx.count("wgmma.mma_async"),
        tma=ptx.count("cp.async.bulk.tensor"),
        barriers=barriers,
    )
