"""HuggingFace -> ours -> HuggingFace gives the same bytes, and what we write loads in transformers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from convert import hf_config
from convert.from_hf import convert
from convert.to_hf import export
from jaxattn.errors import UserError
from jaxattn.models import ModelConfig
from jaxattn.rope import RopeScaling
from tests.convert.families import FAMILIES, build
from tests.in_process import called

torch = pytest.importorskip("torch", reason="the oracle")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_way_back_gives_the_same_bytes_and_logits(name, tmp_path):
    import transformers

    oracle = build(name, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"kept": "as it is"}')
    convert(str(tmp_path / "hf"), tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    files = sorted(p.name for p in (tmp_path / "hf").iterdir())
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == files
    assert len(files) > 4 or "sharded" not in name
    for file in files:
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes(), file
    ids = torch.arange(20)[None] * 3 % 97
    (tmp_path / "back" / "tokenizer_config.json").unlink()
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, oracle(ids).logits)


def test_another_dtype_is_written_where_it_is_named(tmp_path):
    """bf16 shards kept as f32: the configuration and the index say f32, and every number is the same."""
    import transformers

    oracle = build("llama-bf16-sharded", tmp_path / "hf")
    convert(str(tmp_path / "hf"), tmp_path / "ours", dtype="float32")
    export(tmp_path / "ours", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float32"
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in again.parameters())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, oracle(ids).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_configuration_written_by_us_is_read_as_the_same_model(name, tmp_path):
    build(name, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    model = hf_config.parse(raw)
    written = json.loads(json.dumps(hf_config.write(model, "float32")))
    assert hf_config.parse(written) == model
    # The oracle reads it as what it wrote itself.
    import transformers

    theirs = transformers.AutoConfig.for_model(**written)
    for field in ("hidden_size", "intermediate_size", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(theirs, field) == raw[field], field


def test_the_sink_study_of_a_converted_checkpoint_leaves_a_report(tmp_path):
    """Also after the folder was moved: its tokenizer is found inside it."""
    from jaxattn.open_tokenizer import byte_tokenizer
    from jaxattn.runs.load import read_config

    build("llama-bytes", tmp_path / "hf")
    byte_tokenizer().save(tmp_path / "hf" / "tokenizer.json")
    convert(str(tmp_path / "hf"), tmp_path / "made")
    (tmp_path / "made").rename(tmp_path / "moved")
    assert read_config(tmp_path / "moved").data.tokenizer == str(tmp_path / "moved" / "hf" / "tokenizer.json")
    done = called("evals.sinks", tmp_path / "moved")
    assert done.returncode == 0, done.stderr
    assert "Sink_1" in done.stdout
    report = (tmp_path / "moved" / "report.html").read_text()
    assert report.count("<img") >= 4
    (tmp_path / "moved" / "report.html").unlink()
    for words in (["--step=0"], ["--sequences=4"]):  # other numbers than those of the folder
        assert called("evals.sinks", tmp_path / "moved", *words).returncode == 0
    assert not (tmp_path / "moved" / "report.html").exists()


def test_the_old_name_of_the_scaling_type_is_read():
    raw = hf_config.write(_model(rope_scaling=RopeScaling("linear", 2.0)), "float32")
    del raw["rope_parameters"]
    raw["rope_scaling"] = {"type": "linear", "factor": 2.0}
    assert hf_config.parse(raw).rope_scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": "layernorm"}, "norm is 'layernorm'"),
        ({"mlps": ("gelu",)}, "mlps"),
        ({"position": "alibi"}, "position is 'alibi'"),
        ({"mixers": ("sigmoid",)}, "attention 'sigmoid'"),
        ({"mixers": ("softmax(row_sum=0.5)",)}, "row_sum"),
        ({"mixers": ("softmax(window=4)", "softmax(window=5)")}, "one window size"),
        ({"mixers": ("softmax(window=4)",), "mlp_bias": True}, "mlp_bias with a window has no HuggingFace"),
        ({"rope_fraction": 0.5}, "rope_fraction is 0.5"),
        ({"qk_norm": True, "attention_bias": "qkv"}, "qk_norm with attention_bias"),
        ({"attention_bias": "qkv", "use_bias": True, "qk_norm": True}, "mlp_bias"),
        (
            {"max_positions": 64, "rope_scaling": RopeScaling("dynamic", 2.0, original_length=32)},
            "max_positions is 64 but rope_scaling.original_length is 32",
        ),
        ({"value_dim": 4}, "value_dim"),
    ],
)
def test_models_that_huggingface_does_not_have_are_not_exported(fields, message):
    with pytest.raises(UserError, match=message):
        hf_config.write(_model(**fields), "float32")


def _model(**fields) -> ModelConfig:
    base = {"vocab_size": 97, "num_layers": 2, "d_model": 32, "num_heads": 4, "d_ff": 48, "max_positions": 64}
    return ModelConfig(**(base | fields))


@pytest.mark.smoke
def test_a_run_of_our_own_is_exported_and_computes_the_same(tmp_path):
    import jax
    import jax.numpy as jnp
    import transformers

    from jaxattn.nn import Decoder
    from jaxattn.runs.checkpoint import Checkpoints
    from jaxattn.runs.config import RunConfig
    from jaxattn.runs.rundir import write_json_atomic

    model = _model(num_kv_heads=2)
    cfg = RunConfig(model=model)
    params = jax.jit(Decoder(model).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    (tmp_path / "run").mkdir()
    write_json_atomic(tmp_path / "run" / "config.json", cfg.to_dict())
    with Checkpoints(tmp_path / "run" / "checkpoints", config=cfg.to_dict()) as checkpoints:
        checkpoints.save(0, {"params": params})
    export(tmp_path / "run", tmp_path / "hf")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    ids = np.arange(20, dtype=np.int32)[None]
    with torch.no_grad():
        theirs = oracle(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(jax.jit(Decoder(model).apply)({"params": params}, jnp.asarray(ids)), theirs, atol=1e-5)
