"""JAX's simulators of TPUs and GPUs: the one file that knows what of them is private or differs between versions."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any, Literal
from unittest import mock

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _mosaic_gpu, _versions

LEDGERS = {  # where a kernel's races are written down, and under which name
    "tpu": ("jax._src.pallas.mosaic.interpret.interpret_pallas_call", "RaceDetectionState"),
    "gpu": ("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks", "GPURaceDetectionState"),
}
needs_gpus = pytest.mark.skipif(_versions.too_old_for_gpus() is not None, reason=str(_versions.too_old_for_gpus()))
needs_costs = pytest.mark.skipif(
    _versions.too_old_for_gpus() is None and not _versions.with_cost(_mosaic_gpu.plgpu().kernel, None),
    reason=f"kernels for GPUs take no estimate of their cost in JAX {jax.__version__}",
)


def skip_module_without_gpus() -> None:
    """For the head of a test module whose every test simulates a GPU."""
    if reason := _versions.too_old_for_gpus():
        pytest.skip(reason, allow_module_level=True)


def simulator(chip: Literal["tpu", "gpu"], **options: Any) -> Any:
    """One whose memory holds nan where nothing has been written."""
    make = pltpu.InterpretParams if chip == "tpu" else _mosaic_gpu.plgpu().InterpretGPUParams
    return make(uninitialized_memory="nan", **options)


@contextlib.contextmanager
def without_races(chip: Literal["tpu", "gpu"]) -> Iterator[Any]:
    """A simulator that looks for races; on leaving, none of the kernels run inside may have had one.

    JAX keeps the last kernel's verdict only, so each is noted as it is begun.
    """
    place, name = LEDGERS[chip]
    module, verdicts = importlib.import_module(place), []
    ledger = getattr(module, name)

    def begin(*args: Any, **more: Any) -> Any:
        verdicts.append(ledger(*args, **more))
        return verdicts[-1]

    with mock.patch.object(module, name, begin):
        yield simulator(chip, detect_races=True)
    assert verdicts, "no kernel was simulated"
    assert not any(verdict.races_found for verdict in verdicts)
