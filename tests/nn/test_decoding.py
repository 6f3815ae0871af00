"""Variables made for decoding: the same model, kernels turned and in the compute dtype."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import jaxattn
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from jaxattn.nn.decoding import decoding_variables, why_plain
from jaxattn.nn.layers import ROWS
from pallas_kernels import _cpu
from tests.conformance.model import params_of

needs_numba = pytest.mark.skipif(bool(_cpu.missing()), reason=f"numba's kernels: {_cpu.missing()}")
TOKENS = np.random.default_rng(0).integers(0, 17, (2, 9)).astype(np.int32)
MODELS = {
    "tied": {"tie_embeddings": True},
    "untied": {"tie_embeddings": False},
    "biases": {"use_bias": True},
    "scanned": {"scan_layers": True},
    "convolutions": {"mixers": ("conv", "based(feature_dim=6)", "titans(depth=1)", "softmax(window=5)")},
    "bf16": {"dtype": "bfloat16"},
}


def build(**fields):
    cfg = ModelConfig(**({"vocab_size": 17, "num_layers": 2, "d_model": 16, "num_heads": 2} | fields))
    cfg = dataclasses.replace(cfg, num_layers=max(2, len(cfg.mixers)))
    return cfg, jax.tree.map(jnp.asarray, params_of(cfg))


@needs_numba
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_the_model_is_the_same(fields):
    cfg, params = build(**fields)
    variables = decoding_variables(cfg, params)
    apply = jax.jit(lambda variables, tokens: Decoder(cfg).apply(variables, tokens))
    expected = apply({"params": params}, TOKENS)
    few = apply(variables, TOKENS[:1, :3])  # few rows: through the numba kernel
    tolerance = 1e-5 if cfg.dtype == "float32" else 5e-2
    np.testing.assert_allclose(apply(variables, TOKENS), expected, atol=tolerance)
    np.testing.assert_allclose(few, apply({"params": params}, TOKENS[:1, :3]), atol=tolerance)


@needs_numba
def test_every_kernel_is_there_once():
    cfg, params = build(**MODELS["convolutions"])
    variables = decoding_variables(cfg, params)
    kept, turned = (traverse_util.flatten_dict(variables[name]) for name in ("params", ROWS))
    kernels = {path for path in traverse_util.flatten_dict(params) if path[-1] == "kernel"}
    assert kernels == ({path for path in kept if path[-1] == "kernel"} | set(turned)) - {("unembed",)}
    assert not set(kept) & set(turned)
    assert {path[-2] for path in kept if path[-1] == "kernel"} <= {"depthwise", "q_conv", "k_conv", "v_conv"}
    assert decoding_variables(cfg, variables) == variables


@pytest.mark.parametrize("fields", [{}, {"dtype": "bfloat16"}, {"backend": "xla"}, {"tie_embeddings": False}])
def test_consumed_parameters_are_gone_and_the_variables_are_the_same(fields):
    cfg, params = build(**fields)
    kept = decoding_variables(cfg, params)
    variables = decoding_variables(cfg, params, consume=True)
    jax.tree.map(np.testing.assert_array_equal, variables, kept)
    mlp = params["layer_0"]["mlp"]["up"]["kernel"]
    anew = variables["params"].get("layer_0", {}).get("mlp", {}).get("up", {}).get("kernel") is not mlp
    assert mlp.is_deleted() == anew


def test_an_array_under_two_names_is_not_consumed():
    cfg, params = build(dtype="bfloat16")
    params["layer_1"] = params["layer_0"]
    kept = decoding_variables(cfg, params)
    jax.tree.map(np.testing.assert_array_equal, decoding_variables(cfg, params, consume=True), kept)


def test_a_named_backend_reads_them_as_they_are():
    cfg, params = build(backend="xla")
    assert list(decoding_variables(cfg, params)) == ["params"]
    assert why_plain(cfg) == "the backend xla was named"


@needs_numba
def test_generation_takes_either_and_a_named_backend_agrees():
    cfg, params = build()
    call = {"tokens": TOKENS, "max_new_tokens": 6}
    made = jaxattn.generate(cfg, params, **call).tokens
    prepared = jaxattn.decoding_variables(cfg, params)
    np.testing.assert_array_equal(jaxattn.generate(cfg, prepared, **call).tokens, made)
    plain = dataclasses.replace(cfg, backend="xla")
    np.testing.assert_array_equal(jaxattn.generate(plain, params, **call).tokens, made)
