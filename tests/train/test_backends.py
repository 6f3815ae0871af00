"""`--backend`: one line says which backend each op gets and why; a named one never falls back."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxattn.backends import of_decoding
from jaxattn.errors import ConfigError
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from pallas_kernels import compiling_for
from tests.train import helpers as h
from train import pretrain
from train.command_line import parse_args
from train.data.open import open_source
from train.describe_backends import describe_backends
from train.presets import get_preset


def ready(folder, attn="softmax", **changes):
    cfg = dataclasses.replace(h.tiny(folder, steps=2, **changes), attn=attn).resolved()
    return dataclasses.replace(cfg, model=open_source(cfg)[1])


def test_the_flag_is_short_for_the_models():
    assert parse_args(["--backend=reference"], get_preset("bb")).model.backend == "reference"
    with pytest.raises(ConfigError, match=r"'cuda'.*--model\.backend"):
        parse_args(["--backend=cuda"], get_preset("bb"))


def test_every_op_of_a_pattern_is_named_with_a_reason(tmp_path):
    line = describe_backends(ready(tmp_path, "softmax, lightning", model={"num_layers": 2}))
    assert line == "backends: flash xla (no kernel for cpu); linear_scan xla (no kernel for cpu)"
    named = ready(tmp_path, model={"backend": "reference"})
    assert describe_backends(named) == "backends: flash reference (named)"


def test_a_program_for_a_tpu_gets_its_kernels_and_says_where_not(tmp_path):
    with compiling_for("tpu"):
        assert describe_backends(ready(tmp_path)) == "backends: flash tpu (this is a tpu)"


@pytest.mark.parametrize(("attn", "why"), [("softmax", "on 'cpu'"), ("aaren", "prefix_softmax: backend 'tpu'")])
def test_a_backend_that_cannot_serve_is_refused_before_a_folder_is_made(tmp_path, attn, why):
    place = {"position": "nope", "backend": "tpu"}
    cfg = dataclasses.replace(h.tiny(tmp_path / "run", steps=2, model=place), attn=attn)
    with pytest.raises(ConfigError, match=rf"model\.backend is 'tpu': .*{why}"):
        pretrain.run(cfg)
    assert not (tmp_path / "run").exists()


def test_a_run_prints_its_backends_once_at_the_start(tmp_path, capsys):
    assert pretrain.run(h.tiny(tmp_path / "run", steps=2)) == 0
    assert capsys.readouterr().out.splitlines()[0] == "backends: flash xla (no kernel for cpu)"


def test_decoding_says_who_multiplies_single_rows():
    model = ModelConfig(vocab_size=8, num_layers=1, d_model=8)
    params = jax.jit(Decoder(model).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    line = of_decoding(dataclasses.replace(model, backend="xla"), params)
    assert line == "backends: flash xla (named); products of single rows xla (the backend xla was named)"
    assert of_decoding(model, params).startswith("backends: flash ")
    with pytest.raises(ConfigError, match=r"model\.backend is 'tpu'"):
        of_decoding(dataclasses.replace(model, backend="tpu"), params)
