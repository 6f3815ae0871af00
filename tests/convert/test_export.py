"""What is written for HuggingFace is what transformers reads: every scaling, window and bias, and a run of our own with
its tokenizer."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import from_hf, hf_config, rules
from convert import safetensors_files as st
from convert.from_hf import convert
from convert.to_hf import export
from jaxattn.errors import UserError
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from jaxattn.rope import RopeScaling
from jaxattn.runs.config import RunConfig
from jaxattn.runs.load import load_params, read_config
from tests.convert.families import build
from tests.convert.numpy_decoder import logits as numpy_logits

torch = pytest.importorskip("torch", reason="the oracle")
IDS = np.arange(40) * 7 % 97
SHORT, LONG = (1.0, 1.5, 2.0, 2.5), (1.0, 2.0, 4.0, 8.0)
SCALINGS = {
    "none": RopeScaling(),
    "linear": RopeScaling("linear", 4.0),
    "dynamic": RopeScaling("dynamic", 4.0, original_length=24),
    "yarn": RopeScaling("yarn", 4.0, original_length=16),
    "yarn, all": RopeScaling(
        "yarn", 4.0, original_length=16, beta_fast=8.0, beta_slow=2.0, attention_factor=0.7, truncate=False
    ),
    "llama3": RopeScaling("llama3", 8.0, original_length=16, low_freq_factor=2.0, high_freq_factor=9.0),
    "longrope": RopeScaling("longrope", 4.0, original_length=24, short_factors=SHORT, long_factors=LONG),
    "longrope, all": RopeScaling(
        "longrope", 4.0, original_length=24, short_factors=SHORT, long_factors=LONG, attention_factor=0.7
    ),
}
STRUCTURES = {
    "llama": {},
    "llama, biases": {"use_bias": True},
    "llama, attention biases": {"attention_bias": "qkvo"},
    "llama, mlp biases": {"mlp_bias": True},
    "tied": {"tie_embeddings": True},
    "mistral": {"mixers": ("softmax(window=5)",)},
    "ministral": {"mixers": ("softmax(window=5)", "softmax")},
    "qwen2": {"attention_bias": "qkv"},
    "qwen2, a window": {"attention_bias": "qkv", "mixers": ("softmax", "softmax(window=5)")},
    "qwen3": {"qk_norm": True},
    "qwen3, biases": {"qk_norm": True, "attention_bias": "qkvo"},
}


def model_of(**fields) -> ModelConfig:
    base = {"vocab_size": 97, "num_layers": 2, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "d_ff": 48}
    return ModelConfig(**(base | fields))


def theirs_and_ours(model: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Logits of random weights in the class that the written configuration names, and in a decoder of numpy."""
    import transformers

    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(hf_config.write(model, "float32"))))
    oracle = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    rng, wanted = np.random.default_rng(0), rules.pairs(model)
    weights = {n: (0.3 * rng.standard_normal(p.their_shape)).astype(np.float32) for n, p in wanted.items()}
    state = {name: torch.tensor(value) for name, value in weights.items()}
    if model.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    oracle.load_state_dict(state)
    params = rules.nested({pair.path: pair.ours(weights[name]) for name, pair in wanted.items()})
    with torch.no_grad():
        return oracle(torch.tensor(IDS[None])).logits[0].numpy(), numpy_logits(model, params, IDS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCALINGS)
def test_every_scaling_is_written_as_transformers_computes_it_and_read_again(name):
    scaling = SCALINGS[name]
    model = model_of(rope_scaling=scaling, rope_base=100.0, max_positions=24 if scaling.kind == "dynamic" else 64)
    theirs, ours = theirs_and_ours(model)
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    again = hf_config.parse(json.loads(json.dumps(hf_config.write(model, "float32"))))
    assert (again.rope_scaling.kind, again.rope_base) == (scaling.kind, 100.0)
    assert again.rope_scaling.amplitude == pytest.approx(scaling.amplitude)
    assert hf_config.parse(hf_config.write(again, "float32")) == again


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_is_written_as_transformers_computes_it_and_read_again(name):
    model = model_of(rope_base=100.0, max_positions=64, **STRUCTURES[name])
    theirs, ours = theirs_and_ours(model)
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    raw = hf_config.write(model, "float32")
    assert raw["model_type"] == name.split(",")[0].replace("tied", "llama")
    assert rules.parameter_shapes(hf_config.parse(raw)) == rules.parameter_shapes(model)


@pytest.mark.parametrize(
    ("present", "tied"), [("both, equal", True), ("both, different", False), ("head", True), ("embedding", True)]
)
def test_tied_models_are_those_of_transformers_whatever_is_in_their_files(present, tied, tmp_path):
    """Two different matrices are kept apart, as transformers does; one under either name is both."""
    import transformers
    from safetensors.numpy import load_file, save_file

    build("llama", tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if present == "both, equal":
        weights[head] = weights[embedding]
    if present in ("head", "embedding"):
        weights.pop(embedding if present == "head" else head)
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    convert(str(tmp_path / "hf"), tmp_path / "ours")
    model = read_config(tmp_path / "ours").model
    assert model.tie_embeddings == tied
    params, _ = load_params(tmp_path / "ours", read_config(tmp_path / "ours"))
    with torch.no_grad():
        theirs = oracle(torch.tensor(IDS[None, :20])).logits[0].numpy()
    np.testing.assert_allclose(numpy_logits(model, params, IDS[:20]), theirs, atol=1e-4 * np.abs(theirs).max())
    export(tmp_path / "ours", tmp_path / "back")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    with torch.no_grad():
        np.testing.assert_array_equal(again(torch.tensor(IDS[None, :20])).logits[0].numpy(), theirs)


def test_a_checkpoint_saved_without_its_head_is_read_as_transformers_reads_it(tmp_path):
    """`LlamaModel.save_pretrained` writes names without the prefix; tied, the head is there all the same."""
    from safetensors.numpy import load_file, save_file

    oracle = build("llama-tied", tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    bare = {name.removeprefix("model."): value for name, value in weights.items()}
    save_file(bare, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    convert(str(tmp_path / "hf"), tmp_path / "ours")
    cfg = read_config(tmp_path / "ours")
    with torch.no_grad():
        theirs = oracle(torch.tensor(IDS[None, :20])).logits[0].numpy()
    ours = numpy_logits(cfg.model, load_params(tmp_path / "ours", cfg)[0], IDS[:20])
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize(("kind", "said"), [("llama-bytes", 0), ("llama", 1)])
def test_only_a_tokenizer_that_is_needed_is_missed(kind, said, tmp_path, monkeypatch, capsys):
    """A model of bytes has no files for them."""
    build(kind, tmp_path / "hf")
    monkeypatch.setattr("sys.argv", ["convert.from_hf", str(tmp_path / "hf"), str(tmp_path / "ours")])
    assert from_hf.main() == 0
    assert capsys.readouterr().err.count("its tokenizer cannot be used yet") == said


def _sharded(folder, extra, rename=lambda name: name):
    """The tiny model in shards whose tensors, and those of `extra`, go by `rename`; its index names them all."""
    from safetensors.numpy import load_file, save_file

    oracle = build("llama-sharded", folder)
    shards, layout = sorted(folder.glob("model-*.safetensors")), {}
    for i, path in enumerate(shards):
        found = {rename(name): value for name, value in load_file(path).items()} | (extra if i == 0 else {})
        save_file(found, path, metadata={"format": "pt"})
        layout |= dict.fromkeys(found, path.name)
    index = {"metadata": {"total_size": 1}, "weight_map": layout}
    (folder / st.INDEX).write_text(json.dumps(index))
    return oracle


@pytest.mark.parametrize("source", ["computed tensors", "no prefix"])
def test_the_index_of_an_export_names_what_is_in_its_files(source, tmp_path):
    """Tensors that were dropped or renamed on the way in are not in the index on the way out."""
    import transformers

    if source == "no prefix":
        oracle = _sharded(tmp_path / "hf", {}, lambda name: name.removeprefix("model."))
    else:
        names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(3)]
        oracle = _sharded(tmp_path / "hf", {name: np.ones(4, np.float32) for name in names})
    convert(str(tmp_path / "hf"), tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    index = json.loads((tmp_path / "back" / st.INDEX).read_text())
    found = st.entries(tmp_path / "back")
    assert index["weight_map"] == {name: entry.file.name for name, entry in found.items()}
    assert index["metadata"]["total_size"] == sum(entry.bytes for entry in found.values())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    with torch.no_grad():
        ids = torch.tensor(IDS[None])
        assert torch.equal(again(ids).logits, oracle(ids).logits)
    convert(str(tmp_path / "back"), tmp_path / "twice")


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    import resource

    save_run(tmp_path / "run", RunConfig(model=model_of()))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    try:
        with pytest.raises(UserError, match=r"hf cannot be written \(File too large, .* bytes free\): free some space"):
            export(tmp_path / "run", tmp_path / "hf", tokenizer=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def save_run(folder, cfg, scale=None):
    """A run folder with random weights; `scale` is one of the last norm."""
    from jaxattn.runs.checkpoint import Checkpoints
    from jaxattn.runs.rundir import write_json_atomic

    params = jax.jit(Decoder(cfg.model).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    if scale is not None:
        params["final_norm"]["scale"] = params["final_norm"]["scale"].at[0].set(scale)
    folder.mkdir()
    write_json_atomic(folder / "config.json", cfg.to_dict())
    with Checkpoints(folder / "checkpoints", config=cfg.to_dict()) as checkpoints:
        checkpoints.save(0, {"params": params})
    return params


@pytest.mark.filterwarnings("ignore")
def test_a_run_of_text_is_opened_by_transformers_as_it_is(tmp_path):
    """AutoTokenizer, AutoModelForCausalLM and a pipeline: ids, logits and text are ours, with the end of text."""
    import transformers

    import jaxattn
    from jaxattn.text import load
    from train.data import DataConfig

    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 200)
    data = DataConfig(source=str(tmp_path / "text.txt"), tokenizer="bytes", context=48, cache_dir=str(tmp_path / "c"))
    save_run(tmp_path / "run", RunConfig(model=model_of(vocab_size=257), data=data))
    export(tmp_path / "run", tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    loaded = load(tmp_path / "run")
    for text in ("It was", "ünïcödé 数学 🙂", " leading", "a\n\nb", ""):
        assert tokenizer(text)["input_ids"] == list(loaded.tokenizer.encode(text)), text
    ids = tokenizer("It was the best", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        theirs = oracle(ids).logits.numpy()
    np.testing.assert_allclose(
        jax.jit(Decoder(loaded.model).apply)({"params": loaded.params}, jnp.asarray(ids.numpy(), jnp.int32)),
        theirs,
        atol=1e-4,
    )
    assert tokenizer.eos_token_id == oracle.generation_config.eos_token_id == 256
    assert (tokenizer.bos_token_id, oracle.generation_config.bos_token_id, oracle.config.bos_token_id) == (None,) * 3
    assert oracle.config.max_position_embeddings == tokenizer.model_max_length == 48
    pipe = transformers.pipeline("text-generation", str(tmp_path / "hf"))
    made = pipe("It was", max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
    prompt = np.asarray([loaded.tokenizer.encode("It was")], np.int32)
    ours = jaxattn.generate(loaded.model, loaded.params, prompt, max_new_tokens=8, stop_tokens=loaded.stop_tokens)
    assert made == loaded.tokenizer.decode(ours.tokens[0][: ours.lengths[0]].tolist())
    again = read_config(convert(str(tmp_path / "hf"), tmp_path / "again"))
    assert again.model.max_positions == 48


@pytest.mark.filterwarnings("ignore")
def test_a_run_of_text_keeps_the_named_tokens_of_its_tokenizer(tmp_path):
    """Start, end, padding and a model's own tokens, in transformers and in the checkpoint that is made of it again."""
    import transformers
    from tokenizers import Tokenizer, processors

    from jaxattn.open_tokenizer import byte_tokenizer
    from jaxattn.text import load
    from train.data import DataConfig

    inner = Tokenizer.from_str(byte_tokenizer().to_json())
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "image_token": "<image>"}
    inner.add_special_tokens(list(names.values()))
    inner.post_processor = processors.TemplateProcessing(
        single=["<s>:0", "$A:0"], pair=["<s>:0", "$A:0", "$B:1"], special_tokens=[("<s>", 257)]
    )
    (tmp_path / "own").mkdir()
    inner.save(str(tmp_path / "own" / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps(described))
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 200)
    text, cache = str(tmp_path / "text.txt"), str(tmp_path / "c")
    data = DataConfig(source=text, tokenizer=str(tmp_path / "own"), context=48, cache_dir=cache)
    save_run(tmp_path / "run", RunConfig(model=model_of(vocab_size=261), data=data))
    export(tmp_path / "run", tmp_path / "hf")
    before = transformers.AutoTokenizer.from_pretrained(tmp_path / "own")
    after = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert after.special_tokens_map == before.special_tokens_map == names
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(config, key) == getattr(generation, key) == getattr(after, key) == getattr(before, key), key
    loaded = load(tmp_path / "run")
    again = load(convert(str(tmp_path / "hf"), tmp_path / "again"))
    for prompt in ("", "It was"):
        assert (
            loaded.encode(prompt) == again.encode(prompt) == before(prompt)["input_ids"] == after(prompt)["input_ids"]
        )


def test_numbers_that_a_dtype_does_not_hold_are_not_exported_as_infinite(tmp_path):
    params = save_run(tmp_path / "run", RunConfig(model=model_of()), 65520.0)  # half a step beyond the largest
    assert params["final_norm"]["scale"][0] == 65520.0
    with pytest.raises(
        UserError, match=r"'model\.norm\.weight' has numbers up to 65520, .*--dtype bfloat16 or float32"
    ):
        export(tmp_path / "run", tmp_path / "hf", dtype="float16", tokenizer=False)
    assert not (tmp_path / "hf").exists()
    export(tmp_path / "run", tmp_path / "hf", dtype="bfloat16", tokenizer=False)
    save_run(tmp_path / "fits", RunConfig(model=model_of()), 65504.0)
    export(tmp_path / "fits", tmp_path / "half", dtype="float16", tokenizer=False)


def test_a_run_without_its_tokenizer_says_what_to_do_and_one_without_text_has_no_end(tmp_path):
    import transformers

    from train.data import DataConfig

    data = DataConfig(source=str(tmp_path / "gone.txt"), context=48)
    save_run(tmp_path / "run", RunConfig(model=model_of(vocab_size=257), data=data))
    with pytest.raises(UserError, match="--no-tokenizer exports without"):
        export(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    export(tmp_path / "run", tmp_path / "hf", tokenizer=False)
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == ["config.json", "model.safetensors"]
    bare = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert bare.config.eos_token_id is None, "a Llama's default is 2, an ordinary token here"
    save_run(tmp_path / "bb", RunConfig(model=model_of(vocab_size=67), data=DataConfig(source="bb")))
    export(tmp_path / "bb", tmp_path / "hf-bb")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf-bb")
    assert model.generation_config.eos_token_id is None
