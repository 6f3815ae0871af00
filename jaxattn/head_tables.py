"""Head tables: a number for every head, by name, in a file that profilers write and policies read.

    heads.json      {"zero_tuning": [[1.0, 2.0, ...], ...], ...}      [layers, heads] each
                    {"model": [0.1, ...], ...}                        what tells the model they were made with

They are variables of the model (`jaxattn.nn.attention.HEADS`), so one compiled program serves every table; what decides
how much is held becomes an option of the policy (`settled`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxattn.errors import ConfigError, DataError, shown
from jaxattn.json_text import read_object
from jaxattn.models import ModelConfig
from jaxattn.nn.attention import HEADS
from jaxattn.nn.decoding import variables_of
from jaxattn.policies import resolve, text_of

REMEDY = "name a file of head tables that were made with this model"
MODEL = "model"
POINTS = 64
ALIKE = 0.8  # cosine of two models' numbers: other bits and some training leave 0.95 and more, another seed 0 ± 0.13


def identity(params: Mapping[str, Any]) -> list[float]:
    """Some of the embedding's numbers, which stay about the same when a model is rounded or tuned."""
    embed: Any = variables_of(params)["params"]["embed"]
    rows, columns = (np.linspace(0, n - 1, POINTS).astype(int) for n in embed.shape)
    columns = columns[np.random.default_rng(0).permutation(POINTS)]
    return [float(f"{x:.4g}") for x in np.asarray(embed[rows, columns], np.float32)]


def head_file(tables: Mapping[str, np.ndarray], params: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a file of tables [L, H] that were made with a model of these parameters."""
    return {MODEL: identity(params), **{name: np.asarray(table).tolist() for name, table in tables.items()}}


def check_made_with(path: Path, params: Mapping[str, Any]) -> None:
    """Refuse a file of tables that says it was made with another model; one that says nothing passes.

    Raises:
      ConfigError: naming the file.
    """
    given = read_object(path, REMEDY, DataError).get(MODEL)
    if given is None:
        return
    own = np.asarray(identity(params))
    try:
        theirs = np.asarray(given, np.float64)
    except (TypeError, ValueError):
        theirs = np.zeros(0)
    alike = theirs.shape == own.shape and float(own @ theirs) >= ALIKE * float(
        np.linalg.norm(own) * np.linalg.norm(theirs)
    )
    if not alike:
        raise ConfigError(f"{path} holds head tables of another model, as its {MODEL!r} tells: {REMEDY}.")


def read_head_tables(path: Path, model: ModelConfig) -> dict[str, np.ndarray]:
    """The tables [L, H] of a file.

    Raises:
      ConfigError: a table of another model, or one that holds something else than finite numbers.
      UserError: the file cannot be read.
    """
    tables, shape = {}, (model.num_layers, model.num_heads)
    for name, rows in read_object(path, REMEDY, DataError).items():
        if name == MODEL:
            continue
        try:
            table = np.asarray(rows, np.float32)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{path}: {shown(name)} must be {shape[0]} rows of {shape[1]} numbers.") from error
        if table.shape != shape or not np.isfinite(table).all():
            raise ConfigError(
                f"{path}: {shown(name)} has shape {list(table.shape)} but must be finite numbers {list(shape)}, one a "
                "layer and head; make the table with this model."
            )
        tables[name] = table
    return tables


def settled(policy: str, tables: Mapping[str, np.ndarray], kv_heads: int) -> str:
    """The text of policies, their options filled in where these tables [L, H] decide about sizes.

    Raises:
      ConfigError: of `jaxattn.policies.resolve`.
    """
    parts = [(own, spec, own.settle) for own, spec in resolve(policy).parts]
    if not any(settle for _, _, settle in parts):
        return policy
    return ", ".join(
        text_of(own, settle(spec, dict(tables), kv_heads) if settle else spec) for own, spec, settle in parts
    )


def with_head_tables(model: ModelConfig, params: Mapping[str, Any], tables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of parameters (or of variables) and tables [L, H].

    Raises:
      ConfigError: the model's policy reads a table that is not there, or layers are scanned.
    """
    if tables and model.scan_layers:
        raise ConfigError("head tables need model.scan_layers=False; `unstack_layers` converts the parameters.")
    layers = {
        f"layer_{layer}": {"attn": {name: jnp.asarray(table[layer]) for name, table in tables.items()}}
        for layer in range(model.num_layers)
    }
    variables = dict(params) if "params" in params else {"params": params}
    return variables | ({HEADS: layers} if tables else {})
