"""A trained run, opened to be measured: configuration, weights, and its model, perhaps with other attention options."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from jaxattn.errors import ConfigError, cannot_write
from jaxattn.models import ModelConfig, at_context
from train.config import RunConfig
from train.load import abstract_state, load_params, open_source, read_config
from train.rundir import write_json_atomic


@dataclasses.dataclass(frozen=True)
class Trained:
    """`model` is what to run; `cfg.model` is what was trained."""

    cfg: RunConfig
    model: ModelConfig
    params: Any
    step: int
    attn: str

    def held_out(self, count: int) -> jax.Array:
        """Token ids [count, T] of sequences the run did not train on, those the sink metric is read on.

        Raises:
          UserError: the run's data cannot be read.
        """
        from evals.sinks import held_out

        cfg = dataclasses.replace(self.cfg, eval=dataclasses.replace(self.cfg.eval, sequences=count))
        return jax.numpy.asarray(held_out(cfg, open_source(cfg)[0]))

    def check_length(self, length: int) -> None:
        """Refuse more positions than a learned table has.

        Raises:
          ConfigError: naming the longest that is possible.
        """
        most = self.model.max_positions
        if self.model.position == "learned" and length > most:
            raise ConfigError(f"{length} tokens are asked for but the model has {most} learned positions; use {most}.")


def open_trained(folder: str | Path, attn: str | None = None, step: int | None = None) -> Trained:
    """The newest valid checkpoint of a run (or that of `step`), with the attention as trained or as given.

    Raises:
      UserError: no run, no checkpoint, or an attention that has other parameters than the trained one.
    """
    folder = Path(folder)
    cfg = read_config(folder)
    attn = None if attn is None else at_context(attn, cfg.data.context)
    model = cfg.model if attn is None else cfg.model.with_attention(attn)
    if attn is not None and _shapes(cfg, model) != _shapes(cfg, cfg.model):
        raise ConfigError(
            f"--attn={attn!r} has other parameters than the run's {cfg.attn!r}: change only options that own none, "
            "such as window."
        )
    params, found = load_params(folder, cfg, step)
    return Trained(cfg, model, params, found, attn or cfg.attn)


def _shapes(cfg: RunConfig, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    params = abstract_state(dataclasses.replace(cfg, model=model))["params"]
    return {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write JSON where the user asked for it.

    Raises:
      UserError: it cannot be written.
    """
    try:
        write_json_atomic(path, result)
    except OSError as error:
        raise cannot_write(path, error, "choose another --json") from error
