"""Read a run folder or a converted checkpoint: its configuration and its newest valid parameters."""

from __future__ import annotations

import dataclasses
import os
import typing
from pathlib import Path
from typing import Any

import jax

from jaxattn.config_fields import FLOAT32, check_values, hints
from jaxattn.errors import ConfigError, Incomplete, Mismatch, UserError, shown
from jaxattn.hf_tokenizer import has_tokenizer
from jaxattn.json_text import read_object
from jaxattn.places import SIDE
from jaxattn.runs import manifest as mf
from jaxattn.runs import parameters
from jaxattn.runs.checkpoint import Checkpoints
from jaxattn.runs.config import RunConfig, with_older_fields
from jaxattn.runs.leaf_io import name_of
from jaxattn.runs.lora import merge

PARAMS = "params"  # what a saved state calls its parameters


def read_config(folder: Path) -> RunConfig:
    """The `config.json` of a run.

    Raises:
      UserError: it is missing, broken, or has fields this version does not know.
    """
    path = folder / "config.json"
    if not os.path.isfile(path):  # which takes a name that cannot be for one that is not there
        raise UserError(f"{folder} holds no run (config.json is missing); check the path.")
    raw = read_object(path, "restore it or start the run anew")
    cfg = config_from_dict(RunConfig, with_older_fields(raw), str(path))
    # A converted checkpoint brings its tokenizer, wherever it is moved, and so does a run that started from one.
    side = folder / SIDE
    own = side / "tokenizer.json" if (side / "tokenizer.json").is_file() else side
    gone = bool(cfg.start.source) and not Path(cfg.data.tokenizer).exists() and has_tokenizer(side)
    if gone or (cfg.preset == "converted" and (cfg.data.tokenizer != "bytes" or has_tokenizer(side))):
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, tokenizer=str(own)))
    return cfg


def config_from_dict(kind: type, raw: Any, origin: str, prefix: str = "") -> Any:
    """Rebuild a nested frozen dataclass from its `asdict` form; unknown fields are refused by name.

    Raises:
      UserError: an unknown field, or a value that the field cannot have.
    """
    if not isinstance(raw, dict):
        raise UserError(
            f"{origin}: {prefix[:-1]} is {shown(raw)} but must be an object; use the file that was written."
        )
    known = hints(kind)
    if unknown := sorted(prefix + k for k in set(raw) - set(known)):
        raise UserError(
            f"{origin} has fields this version does not know: {', '.join(unknown)}; use the version that wrote it."
        )
    values = {}
    for name, value in raw.items():
        if dataclasses.is_dataclass(known[name]):
            value = config_from_dict(typing.cast(type, known[name]), value, origin, f"{prefix}{name}.")
        elif isinstance(value, list):  # JSON has no tuples
            value = tuple(_number(part) for part in value) if known[name] == tuple[float, ...] else tuple(value)
        elif known[name] is float:
            value = _number(value)
        values[name] = value
    try:
        check_values(prefix[:-1], kind, values)
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error


def _number(value: Any) -> Any:
    """A field's number as a float: an editor's 1 means no other thing than 1.0."""
    return float(value) if type(value) is int and abs(value) < FLOAT32 else value


def load_base(cfg: RunConfig) -> Any:
    """The parameters that the run starts (or started) from, f32, those that its model has.

    Raises:
      CheckpointError: the checkpoint is gone, or is not the one the run started from.
    """
    folder = Path(cfg.start.source)
    if not folder.is_dir():
        raise Incomplete(f"{folder}, the checkpoint that this run started from, is not there; move it back.")
    if manifest_digest(folder, cfg.start.step) != cfg.start.digest:
        raise Mismatch(
            f"step {cfg.start.step} of {folder} is not the checkpoint that this run started from; restore that one."
        )
    params, _ = load_params(folder, read_config(folder), cfg.start.step)
    return parameters.keep(params, cfg.model)


def manifest_digest(folder: Path, step: int) -> str:
    """sha256 of a checkpoint's manifest, "" without one."""
    path = Checkpoints(folder / "checkpoints", config={}, read_only=True).path(step) / mf.NAME
    return mf.hash_file(path).sha256 if path.is_file() else ""


def merge_lora(cfg: RunConfig, params: Any, frozen: Any = None) -> Any:
    """The model's parameters from those of a training state, which for LoRA are updates of the `frozen` ones."""
    if not cfg.lora.rank:
        return params
    return jax.jit(merge, static_argnums=2)(load_base(cfg) if frozen is None else frozen, params, cfg.lora)


def load_params(
    folder: Path, cfg: RunConfig, step: int | None = None, dtype: str | None = "float32"
) -> tuple[Any, int]:
    """Parameters of the newest valid checkpoint (or of `step`), and its step; nothing else of it is read.

    A converted checkpoint holds parameters in the dtype of its source; they come as `dtype` (None: as they are).

    Raises:
      CheckpointError: there is none, or none verifies.
    """
    checkpoints = Checkpoints(folder / "checkpoints", config={}, read_only=True)
    if checkpoints.latest() is None:
        raise Incomplete(f"{folder} has no checkpoint yet; train longer or lower --checkpoint.every.")
    saved, sharding = checkpoints.leaves(step), jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def retyped(path: tuple[Any, ...], x: Any) -> jax.ShapeDtypeStruct:
        leaf = saved.get(f"{PARAMS}/{name_of(path)}")
        return jax.ShapeDtypeStruct(x.shape, dtype or (leaf.dtype if leaf else x.dtype), sharding=sharding)

    wanted = {PARAMS: jax.tree_util.tree_map_with_path(retyped, parameters.abstract_trained(cfg))}
    restored = checkpoints.restore(wanted, step=step, allow_cast=True, only=PARAMS)
    return merge_lora(cfg, restored.state[PARAMS]), restored.step
