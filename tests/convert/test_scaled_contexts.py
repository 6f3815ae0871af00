"""A scaled rope reaches beyond `max_position_embeddings`, and its tokens there are transformers'."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import jaxattn
from convert.from_hf import convert
from jaxattn.errors import ConfigError
from jaxattn.models import ModelConfig
from jaxattn.rope import RopeScaling
from jaxattn.runs.load import load_params, read_config
from jaxattn.serving.engine import Engine

torch = pytest.importorskip("torch", reason="the oracle")
FIELDS = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": False, "initializer_range": 0.5,
}  # fmt: skip
LONG = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 2.0, 4.0, 8.0]}
# Kind -> rope, prompt's tokens, new tokens. Longrope changes its angles within the answer, dynamic at every token.
CASES = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, 40, 20),
    "yarn": ({"rope_type": "yarn", "factor": 4.0}, 40, 20),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, 26, 20),
    "dynamic, a prompt of several chunks": ({"rope_type": "dynamic", "factor": 32.0}, 600, 8),
    "longrope": ({"rope_type": "longrope", "original_max_position_embeddings": 32, "factor": 4.0, **LONG}, 26, 20),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_tokens_beyond_the_old_context_are_those_of_transformers(name, tmp_path):
    import transformers

    rope, length, count = CASES[name]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**FIELDS, rope_parameters={"rope_theta": 100.0, **rope}, eos_token_id=None)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "hf")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    prompt = np.random.default_rng(0).integers(0, 97, (1, length))
    with torch.no_grad():
        ids = torch.tensor(prompt)
        theirs = oracle.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
    cfg = read_config(convert(str(tmp_path / "hf"), tmp_path / "ours"))
    assert cfg.model.max_positions == 32
    params, _ = load_params(tmp_path / "ours", cfg)
    ours = jaxattn.generate(cfg.model, params, prompt.astype(np.int32), max_new_tokens=count).tokens
    np.testing.assert_array_equal(ours, theirs[:, length:].numpy())


REACH = {
    RopeScaling(): 32,
    RopeScaling("linear", 4.0): 128,
    RopeScaling("dynamic", 4.0, original_length=32): 128,
    RopeScaling("yarn", 4.0, original_length=32): 128,
    RopeScaling("yarn", 4.0, original_length=8): 32,
    RopeScaling("yarn", 2.5, original_length=17): 42,
    RopeScaling("llama3", 8.0, original_length=16): 128,
    RopeScaling("longrope", 4.0, original_length=16, short_factors=(1.0,) * 4, long_factors=(2.0,) * 4): 64,
    RopeScaling("linear", 1e300): 2**31 - 1,
}


@pytest.mark.parametrize("scaling", REACH, ids=lambda s: f"{s.kind}-{s.factor}")
def test_the_limit_is_what_the_scaling_reaches_in_generation_and_in_the_server(scaling):
    model = ModelConfig(
        vocab_size=97, num_layers=1, d_model=32, num_heads=4, max_positions=32, rope_base=100.0, rope_scaling=scaling
    )
    assert model.position_limit == REACH[scaling]
    most = REACH[scaling]
    with pytest.raises(ConfigError, match=f"exceed the {most} positions"):
        jaxattn.generate(model, {}, np.zeros((1, 8), np.int32), max_new_tokens=most - 7)
    with pytest.raises(ConfigError, match=f"knows {most} positions"):
        Engine(model, {}, slots=1, context=most + 1, queue=1)
    assert dataclasses.replace(model, max_positions=0).position_limit == 0


def test_learned_positions_end_where_their_table_ends():
    model = ModelConfig(vocab_size=9, position="learned", max_positions=32, rope_scaling=RopeScaling("linear", 4.0))
    assert model.position_limit == 32


def test_padding_behind_a_text_does_not_make_it_longer():
    """A harness pads on the right: the angles are those of the text."""
    import jax
    import jax.numpy as jnp

    from jaxattn.nn import Decoder

    scaling = RopeScaling("dynamic", 4.0, original_length=8)
    model = ModelConfig(vocab_size=97, num_layers=1, d_model=32, num_heads=4, rope_base=100.0, rope_scaling=scaling)
    ids = jnp.arange(24)[None] % 97
    live = (jnp.arange(24) < 12).astype(jnp.int32)[None]
    params = jax.jit(Decoder(model).init)(jax.random.key(0), ids)
    padded = jax.jit(Decoder(model).apply)(params, ids, None, live)
    alone = jax.jit(Decoder(model).apply)(params, ids[:, :12])
    np.testing.assert_allclose(padded[:, :12], alone, atol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_row_is_scaled_by_its_own_length(kind):
    """Rows of a batch are strangers: each has the tokens it has alone, read whole and decoded."""
    import jax
    import jax.numpy as jnp

    from jaxattn.nn import Decoder
    from jaxattn.reader import hidden_of

    more = {"short_factors": (1.0, 1.5, 2.0, 2.5), "long_factors": (1.0, 2.0, 4.0, 8.0)} if kind == "longrope" else {}
    scaling = RopeScaling(kind, 4.0, original_length=8, **more)
    model = ModelConfig(vocab_size=97, num_layers=1, d_model=32, num_heads=4, rope_base=100.0, rope_scaling=scaling)
    tokens, lengths = np.arange(48, dtype=np.int32).reshape(2, 24), np.array([24, 6])
    params = jax.jit(Decoder(model).init)(jax.random.key(0), jnp.asarray(tokens))["params"]
    together = hidden_of(model, {"params": params}, tokens, lengths)
    made = jaxattn.generate(model, params, tokens, lengths=lengths, max_new_tokens=6).tokens
    for row, n in enumerate(lengths):
        alone = hidden_of(model, {"params": params}, tokens[row : row + 1, :n])
        np.testing.assert_allclose(together[row, :n], alone[0], atol=1e-5)
        one = jaxattn.generate(model, params, tokens[row : row + 1, :n], max_new_tokens=6).tokens
        np.testing.assert_array_equal(made[row], one[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"short_factors": (1.0,), "long_factors": (1.0, 2.0)}, "has 1 numbers and long_factors 2"),
        ({"short_factors": (1.0, 0.0), "long_factors": (1.0, 2.0)}, "must be positive"),
        ({"short_factors": (), "long_factors": ()}, "one for every rotated pair"),
        ({"kind": "linear", "attention_factor": 0.5}, "linear has none"),
        ({"kind": "yarn", "short_factors": (1.0,)}, "are longrope's"),
        ({"attention_factor": -1.0, "short_factors": (1.0,), "long_factors": (1.0,)}, "attention_factor is -1.0"),
        ({"kind": "yarn", "beta_slow": 0.0}, "beta_slow 0.0 but both"),
    ],
)
def test_scalings_that_fit_nothing_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        RopeScaling(**({"kind": "longrope", "factor": 2.0, "original_length": 16} | fields))


def test_factors_for_another_number_of_pairs_are_refused_where_the_model_is_made():
    scaling = RopeScaling("longrope", 2.0, original_length=16, short_factors=(1.0,) * 3, long_factors=(1.0,) * 3)
    with pytest.raises(ConfigError, match="factors for 3 pairs but 4 pairs are rotated"):
        ModelConfig(d_model=32, num_heads=4, rope_scaling=scaling)
    with pytest.raises(ConfigError, match="rope_base is 1 but yarn"):
        ModelConfig(rope_base=1.0, rope_scaling=RopeScaling("yarn", 2.0, original_length=16))
    assert json.dumps(dataclasses.asdict(scaling))


def test_a_run_configuration_speaks_of_new_fields_only_where_they_are_used():
    """So a run that was started before they existed has the same configuration, and resumes."""
    from jaxattn.runs.config import LATER, RunConfig
    from jaxattn.runs.load import config_from_dict

    plain = RunConfig().to_dict()
    assert "mlp_bias" not in plain["model"]
    assert not {"short_factors", "long_factors"} & set(plain["model"]["rope_scaling"])
    assert config_from_dict(RunConfig, json.loads(json.dumps(plain)), "x") == RunConfig()
    scaling = RopeScaling("longrope", 2.0, original_length=16, short_factors=(1.0,) * 4, long_factors=(2.0,) * 4)
    cfg = RunConfig(model=ModelConfig(d_model=32, num_heads=4, mlp_bias=True, rope_scaling=scaling))
    assert all(path.split(".")[-1] in str(cfg.to_dict()["model"]) for path in LATER)
    assert config_from_dict(RunConfig, json.loads(json.dumps(cfg.to_dict())), "x") == cfg
