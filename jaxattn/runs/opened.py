"""A trained run, opened to be measured: configuration, weights, and its model, perhaps with other attention options."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxattn.errors import ConfigError
from jaxattn.head_tables import check_made_with, read_head_tables, settled, with_head_tables
from jaxattn.models import ModelConfig, at_context
from jaxattn.policies.command import Asked
from jaxattn.runs.config import RunConfig
from jaxattn.runs.load import load_params, read_config
from jaxattn.runs.parameters import abstract_params

PLAIN = Asked()


@dataclasses.dataclass(frozen=True)
class Trained:
    """`model` is what to run; `cfg.model` is what was trained."""

    cfg: RunConfig
    model: ModelConfig
    params: Any
    step: int
    attn: str

    def check_length(self, length: int) -> None:
        """Refuse more positions than a learned table has.

        Raises:
          ConfigError: naming the longest that is possible.
        """
        most = self.model.max_positions
        if self.model.position == "learned" and length > most:
            raise ConfigError(f"{length} tokens are asked for but the model has {most} learned positions; use {most}.")


def open_trained(folder: str | Path, attn: str | None = None, step: int | None = None, asked: Asked = PLAIN) -> Trained:
    """The newest valid checkpoint of a run (or that of `step`), with the attention as trained or as given.

    Args:
      asked: how keys are kept and read; with head tables `Trained.params` are variables.

    Raises:
      UserError: no run, no checkpoint, an attention that has other parameters than the trained one, or a policy that
        the model cannot use.
    """
    folder = Path(folder)
    cfg = read_config(folder)
    attn = None if attn is None else at_context(attn, cfg.data.context)
    model = cfg.model if attn is None else cfg.model.with_attention(attn)
    if attn is not None and _shapes(model) != _shapes(cfg.model):
        raise ConfigError(
            f"--attn={attn!r} has other parameters than the run's {cfg.attn!r}: change only options that own none, "
            "such as window."
        )
    tables = {} if asked.heads is None else read_head_tables(asked.heads, model)
    if asked.policy is not None:
        model = dataclasses.replace(model, policy=settled(asked.policy, tables, model.kv_heads))
    params, found = load_params(folder, cfg, step)
    if asked.heads is not None:
        check_made_with(asked.heads, params)
        params = with_head_tables(model, params, tables)
    return Trained(cfg, model, params, found, attn or cfg.attn)


def _shapes(model: ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    return {path: x.shape for path, x in abstract_params(model).items()}
