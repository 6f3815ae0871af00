"""Open a run directory: its configuration, its data source and its newest valid parameters."""

from __future__ import annotations

import dataclasses
import os
import typing
from pathlib import Path
from typing import Any

import jax

from jaxattn.errors import ConfigError, Incomplete, Mismatch, UserError, shown
from jaxattn.fields import FLOAT32, check_values, hints
from jaxattn.hf_tokenizer import has_tokenizer
from jaxattn.json_text import read_object
from jaxattn.models import ModelConfig
from jaxattn.text import SIDE
from train import base
from train import manifest as mf
from train.checkpoint import Checkpoints
from train.config import RunConfig, with_older_fields
from train.data import Source, make_source
from train.leaf_io import name_of
from train.lora import merge
from train.step import init_state


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


def open_source(cfg: RunConfig) -> tuple[Source, ModelConfig]:
    """The data source, and the model with the vocabulary it needs.

    Raises:
      UserError: the data cannot be read, or model.vocab_size is smaller than the data's.
    """
    source = make_source(cfg.data, seed=cfg.seed, process_index=jax.process_index(), process_count=jax.process_count())
    size = cfg.model.vocab_size or source.vocab_size
    if size < source.vocab_size:
        raise UserError(
            f"model.vocab_size is {size} but the data has {source.vocab_size} tokens; raise it or set it to 0."
        )
    return source, dataclasses.replace(cfg.model, vocab_size=size)


def first_state(cfg: RunConfig) -> Any:
    """The training state at step 0, before a checkpoint's parameters are put into it."""
    if not cfg.lora.rank:
        return init_state(cfg.model, cfg.optim, cfg.steps, cfg.seed)
    return init_state(cfg.model, cfg.optim, cfg.steps, cfg.seed, cfg.lora, base.new_paths(cfg))


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
    return base.keep(params, cfg.model)


def manifest_digest(folder: Path, step: int) -> str:
    """sha256 of a checkpoint's manifest, "" without one."""
    path = Checkpoints(folder / "checkpoints", config={}, read_only=True).path(step) / mf.NAME
    return mf.hash_file(path).sha256 if path.is_file() else ""


def whole(cfg: RunConfig, params: Any, frozen: Any = None) -> Any:
    """The model's parameters from those of a training state, which for LoRA are updates of the `frozen` ones."""
    if not cfg.lora.rank:
        return params
    return jax.jit(merge, static_argnums=2)(load_base(cfg) if frozen is None else frozen, params, cfg.lora)


def abstract_state(cfg: RunConfig, sharding: Any = None) -> Any:
    """Shapes and dtypes of the training state."""
    shapes = jax.eval_shape(lambda: first_state(cfg))
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)


def load_params(
    folder: Path, cfg: RunConfig, step: int | None = None, dtype: str | None = "float32"
) -> tuple[Any, int]:
    """Parameters of the newest valid checkpoint (or of `step`), and its step.

    A converted checkpoint holds parameters alone, in the dtype of its source; they come as `dtype` (None: as they are).

    Raises:
      CheckpointError: there is none, or none verifies.
    """
    checkpoints = Checkpoints(folder / "checkpoints", config={}, read_only=True)
    if checkpoints.latest() is None:
        raise Incomplete(f"{folder} has no checkpoint yet; train longer or lower --checkpoint.every.")
    wanted, saved = abstract_state(cfg), checkpoints.leaves(step)
    if all(name.startswith("params/") for name in saved):
        wanted = {"params": wanted["params"]}

    def retyped(path: tuple[Any, ...], x: Any) -> jax.ShapeDtypeStruct:
        leaf = saved.get(f"params/{name_of(path)}")
        return jax.ShapeDtypeStruct(x.shape, dtype or (leaf.dtype if leaf else x.dtype), sharding=x.sharding)

    wanted["params"] = jax.tree_util.tree_map_with_path(retyped, wanted["params"])
    restored = checkpoints.restore(wanted, step=step, allow_cast=True)
    return whole(cfg, restored.state["params"]), restored.step
