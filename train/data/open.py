"""From a configuration to its data: the source it names, and the model with the vocabulary that the source needs."""

from __future__ import annotations

import dataclasses
import os

from jaxattn.errors import ConfigError, UserError
from jaxattn.models import ModelConfig
from jaxattn.runs.config import RunConfig
from jaxattn.runs.data_config import DataConfig, validate
from train.data.source import Source


def make_source(cfg: DataConfig, *, seed: int, process_index: int = 0, process_count: int = 1) -> Source:
    """Opens the data; the first call on a corpus trains its tokenizer and writes its tokens to the cache.

    seed: of the training stream (order of text, fresh sequences of tasks); `cfg.seed` decides what is held out.

    Raises:
      ConfigError: a field of `cfg` has an impossible value.
      DataError: the data are missing, empty, undecodable or corrupt.
    """
    validate(cfg, process_index=process_index, process_count=process_count)
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed} is not possible: choose 0 up to 2**32-1.")
    place = {"cfg": cfg, "seed": seed, "process_index": process_index, "process_count": process_count}
    if cfg.source == "bb":
        from train.data.bb_source import bigram_backcopy

        return bigram_backcopy(cfg, place)
    from train.data.tasks import is_task

    if is_task(cfg.source) and not os.path.exists(cfg.source):
        from train.data.task_source import task_source

        return task_source(cfg, place)
    from train.data.text_source import text_source

    return text_source(cfg, place)


def open_source(cfg: RunConfig) -> tuple[Source, ModelConfig]:
    """The data source, and the model with the vocabulary it needs.

    Raises:
      UserError: the data cannot be read, or model.vocab_size is smaller than the data's.
    """
    import jax

    source = make_source(cfg.data, seed=cfg.seed, process_index=jax.process_index(), process_count=jax.process_count())
    size = cfg.model.vocab_size or source.vocab_size
    if size < source.vocab_size:
        raise UserError(
            f"model.vocab_size is {size} but the data has {source.vocab_size} tokens; raise it or set it to 0."
        )
    return source, dataclasses.replace(cfg.model, vocab_size=size)
