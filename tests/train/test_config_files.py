"""config.json of a run, field by field: any value of another kind is one sentence that names the field."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import pytest

from jaxattn.config_fields import check_values
from jaxattn.errors import ConfigError, UserError
from jaxattn.models import ModelConfig
from jaxattn.runs.config import LoraConfig, OptimConfig, RunConfig
from jaxattn.runs.load import config_from_dict, read_config
from tests.train import helpers as h
from train.presets import get_preset

BASE = json.loads(json.dumps(dataclasses.asdict(get_preset("bb"))))
ODD = (
    *("many", None, [], [1], ["x"], [[]], {}, {"a": 1}, True, 3, 1.5, 1e300, float("nan"), float("inf")),
    *(2**31, 2**63, 10**400, -(2**40), "x" * 100_000),
)
WIDE = {"seed": 2**32, "unique_tokens": 2**63}  # the first number that is too large


def leaves(tree, path=()):
    for name, value in tree.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))


def at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


def of_its_kind(name, default, value):
    """Whether `value` may stand where a preset has `default`; what it means is looked at elsewhere."""
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int):
        most = WIDE.get(name, 2**31)
        least = 0 if name == "seed" else 1 - most
        return isinstance(value, int) and not isinstance(value, bool) and least <= value < most
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 3.4e38
    if isinstance(default, list):
        kind = int | float if name.endswith("_factors") else str
        return isinstance(value, list) and all(isinstance(part, kind) for part in value)
    if isinstance(default, dict):
        return isinstance(value, dict) and not value
    return isinstance(value, str)


@pytest.mark.parametrize("path", list(leaves(BASE)), ids=".".join)
def test_every_field_with_every_kind_of_value(path):
    default = at(BASE, path)
    accepted = 0
    for value in ODD:
        raw = json.loads(json.dumps(BASE))
        at(raw, path[:-1])[path[-1]] = value
        try:
            config_from_dict(RunConfig, raw, "config.json")
        except UserError as error:
            said = str(error)
            assert said.startswith("config.json")
            assert path[-1] in said or isinstance(value, list | str), said
            assert len(said) < 1000
            assert said.isprintable()
        else:
            accepted += 1
            assert of_its_kind(path[-1], default, value), value
    assert accepted < len(ODD) / 2


@pytest.mark.parametrize(("kind", "name"), [(OptimConfig, "lr"), (LoraConfig, "alpha")])
def test_a_whole_number_in_a_field_of_floats_is_held_to_the_range_of_floats(kind, name):
    """10**10 is 1e10, also where JAX computes with it, which takes a larger int than 2**31 - 1 for a mistake."""
    assert kind(**{name: 10**10}) == kind(**{name: 1e10})
    jnp.float32(1) * getattr(kind(**{name: 10**10}), name)
    with pytest.raises(ConfigError, match=rf"{name} is 1000*\.*0* but must lie between"):
        kind(**{name: 10**39})
    check_values("model", ModelConfig, {"rope_base": 10**10})
    with pytest.raises(ConfigError, match=r"d_model is 10000000000 but must lie between"):
        check_values("model", ModelConfig, {"d_model": 10**10})


def test_what_a_run_writes_is_read():
    assert config_from_dict(RunConfig, BASE, "config.json") == get_preset("bb")
    raw = json.loads(json.dumps(BASE))
    raw["optim"]["lr"] = 1  # as an editor writes 1.0
    found = config_from_dict(RunConfig, raw, "config.json").optim.lr
    assert (found, type(found)) == (1.0, float)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[" * 200_000, "not valid JSON (nested too deep)"),
        (b'{"steps": ' + b"[" * 200_000, "not valid JSON (nested too deep)"),
        (b'{"steps": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"steps": ', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe{", "byte 0 is not UTF-8"),
        (b"[1]", "holds a JSON list"),
        (b"null", "holds a JSON NoneType"),
        (b'{"model": null}', "model is None but must be an object"),
        (b'{"steps": "many"}', "steps is 'many' but must be a whole number"),
        (b'{"model": {"rope_scaling": {"factor": NaN}}}', "model.rope_scaling.factor is nan"),
        (b'{"colour": 2, "data": {}}', "fields this version does not know: colour"),
        (b'{"' + b"x" * 100_000 + b'": 2}', "fields this version does not know: xxx"),
    ],
)
def test_the_file(tmp_path, content, says):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_config(tmp_path)
    assert says in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 2100


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(BASE).encode())
    assert read_config(tmp_path) == get_preset("bb")


def test_a_folder_in_its_place(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match="holds no run"):
        read_config(tmp_path)


def test_layers_by_the_million(tmp_path):
    with pytest.raises(UserError, match=r"model.num_layers is 3000000 but must lie between"):
        h.tiny(tmp_path, model={"num_layers": 3_000_000})
