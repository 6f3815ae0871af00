"""What a kernel is built for when that is not this process's own device: a simulator, or another platform.

Both values are part of the key of JAX's caches, so a function compiled inside one context is not reused
outside of it.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax

_mode = jax.make_user_context(default_value=False)
_target = jax.make_user_context(default_value="")


def interpreted(how: Any = "plain") -> contextlib.AbstractContextManager[Any]:
    """Inside, kernels of named backends are simulated, on any device.

    Args:
      how: "plain" (a loop over the grid in XLA), "off", or the parameters of a machine simulator, such as
        `pltpu.InterpretParams(detect_races=True)`.
    """
    modes = {"plain": True, "off": False}
    return _mode(modes[how] if isinstance(how, str) else how)


def compiling_for(platform: str) -> contextlib.AbstractContextManager[Any]:
    """Inside, programs are traced for `platform` ("tpu" or "gpu"), attached or not: for compiling ahead of time."""
    return _target(platform)


def mode() -> Any:
    """The value for `pallas_call(interpret=)`."""
    return _mode.value


def platform() -> str:
    """The platform programs are traced for; attached devices are only asked for outside `compiling_for`."""
    return _target.value or jax.default_backend()


def targeted() -> bool:
    """Whether programs are compiled for a platform by name, ahead of time."""
    return bool(_target.value)
