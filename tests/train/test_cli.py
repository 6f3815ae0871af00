"""`python -m train.pretrain`: flags, help, lists, presets, and one sentence for each kind of bad input."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import UserError
from jaxattn.mechanisms import names
from jaxattn.runs import config
from tests.train import helpers as h
from train import pretrain
from train.presets import PRESETS, get_preset
from train.start_from import abstract_state
from train.step import make_train_step


@pytest.fixture(autouse=True)
def keep_settings():
    """`main` sets up the compilation cache for a process of its own; here it is one test of many."""
    name = "jax_persistent_cache_min_compile_time_secs"
    value = getattr(jax.config, name)
    yield
    jax.config.update(name, value)


@pytest.fixture
def caught(monkeypatch):
    """main(words) up to the run: its configuration."""

    def parse(*words):
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(pretrain, "run", lambda cfg: seen.append(cfg) or 0)
            assert pretrain.main(list(words)) == 0
        return seen[0]

    return parse


# ------------------------------------------------------------------------------------------ help and lists


def test_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        pretrain.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: python -m train.pretrain")
    for flag in ("--attn", "--preset", "--steps", "--run-dir", "--resume", "--overwrite", "--data.source"):
        assert f"{flag} " in text or f"{flag}," in text, flag
    for flag in ("--model.d-model", "--optim.lr", "--eval.every", "--checkpoint.keep", "--log.wandb"):
        assert f"{flag} " in text, flag
    assert "--list-attn" in text
    assert "--list-presets" in text


def test_list_attn(capsys):
    assert pretrain.main(["--list-attn"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert listed == list(names())
    assert all("arXiv" in line for line in lines if not line.startswith(" "))


def test_list_presets(capsys):
    assert pretrain.main(["--list-presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert all(len(line.split()) > 5 for line in lines)  # each is explained


# --------------------------------------------------------------------------------------------------- flags


def test_nested_flags(caught):
    cfg = caught(
        *["--attn=softmax(window=8), sigmoid", "--model.d-model", "32", "--model.mlps", "gelu", "none"],
        *["--optim.lr=0.25", "--eval.every", "7", "--checkpoint.keep=2", "--log.no-tensorboard"],
        *["--data.context=32", "--no-report", "--seed=4"],
    )
    assert cfg.attn == "softmax(window=8), sigmoid"
    assert (cfg.model.d_model, cfg.model.mlps, cfg.model.num_layers) == (32, ("gelu", "none"), 3)
    assert (cfg.optim.lr, cfg.eval.every, cfg.checkpoint.keep) == (0.25, 7, 2)
    assert (cfg.log.tensorboard, cfg.report, cfg.seed, cfg.data.context) == (False, False, 4, 32)
    assert cfg.resolved().model.mixers == ("softmax(window=8)", "sigmoid")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("form", [["--preset={}"], ["--preset", "{}"]])
def test_presets_are_the_defaults(caught, name, form):
    assert caught(*[word.format(name) for word in form]) == get_preset(name)


@pytest.mark.parametrize("words", [["--data=x.txt"], ["--data", "x.txt"], ["--data.source", "x.txt"]])
def test_data_is_short_for_data_source(caught, words):
    assert caught(*words).data.source == "x.txt"


def test_the_configuration_survives_its_file(tmp_path):
    cfg = h.tiny(tmp_path / "run", attn="softmax(window=8), sigmoid", optim={"accumulate": 2}).resolved()
    tmp_path.joinpath("config.json").write_text(json.dumps(cfg.to_dict()))
    assert h.read_config(tmp_path) == cfg


def test_resume_takes_the_configuration_of_the_run(caught, tmp_path):
    cfg = h.tiny(tmp_path / "elsewhere", 240, attn="sigmoid", optim={"lr": 0.5})
    tmp_path.joinpath("config.json").write_text(json.dumps(cfg.to_dict()))
    here = dataclasses.replace(cfg, resume=True, run_dir=str(tmp_path))
    assert caught("--resume", f"--run-dir={tmp_path}") == here
    longer = dataclasses.replace(here, steps=260, eval=dataclasses.replace(cfg.eval, every=3))
    assert caught("--resume", "--run-dir", str(tmp_path), "--steps=260", "--eval.every=3") == longer


# ----------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def bad_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXATTN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1") * 100)
    (tmp_path / "broken.json").write_text('{"model": ')
    (tmp_path / "good.txt").write_text("all is well here\n" * 200)
    return tmp_path


BAD = {
    "unknown attention": (["--attn=sigmoit"], ["'sigmoit'", "did you mean 'sigmoid'", "softmax"]),
    "unknown option": (["--attn=sigmoid(colour=1)"], ["colour"]),
    "unknown preset": (["--preset=bbb"], ["'bbb'", "did you mean 'bb'", "sink-60m"]),
    "negative steps": (["--steps=-5"], ["steps is -5", "at least 1"]),
    "no steps": (["--steps=0"], ["steps is 0"]),
    "negative seed": (["--seed=-1"], ["seed is -1"]),
    "window": (["--attn=softmax(window=64)", "--data.context=16"], ["64", "data.context 16"]),
    "no window": (["--attn=lightning(window=4)"], ["lightning(window=4)", "no sliding window"]),
    "no prefix": (["--attn=softmax, linear", "--data.prefix-len=4"], ["data.prefix_len is 4", "linear"]),
    "no bias": (["--attn=aaren", "--model.position=alibi"], ["aaren", "model.position 'alibi'"]),
    "sink token": (["--attn=sink_token, linear"], ["linear", "sink_token"]),
    "temperature form": (["--attn=selective_temperature(form='x')"], ["selective_temperature.form", "linear"]),
    "heads": (["--model.num-heads=3"], ["model.d_model 64", "model.num_heads 3"]),
    "kv heads": (["--model.num-heads=4", "--model.num-kv-heads=3"], ["num_kv_heads 3", "num_heads 4"]),
    "no attention": (["--attn=none"], ["'none'", "without attention"]),
    "no attention twice": (["--attn=none, none"], ["without attention"]),
    "learning rate": (["--optim.lr=0"], ["optim.lr is 0"]),
    "nan learning rate": (["--optim.lr=nan"], ["optim.lr is nan"]),
    "infinite learning rate": (["--optim.lr=inf"], ["optim.lr is inf"]),
    "nan weight decay": (["--optim.weight-decay=nan"], ["optim.weight_decay is nan"]),
    "accumulate": (["--optim.accumulate=3"], ["optim.accumulate 3", "32"]),
    "context": (["--data.context=1"], ["context", "1"]),
    "mixers": (["--model.mixers", "softmax"], ["--model.mixers", "--attn"]),
    "mixers with =": (["--model.mixers=softmax"], ["--model.mixers", "--attn"]),
    "policy": (["--model.policy=h2o"], ["--model.policy", "--policy"]),
    "vocabulary": (["--model.vocab-size=5"], ["model.vocab_size is 5", "raise it"]),
    "no file": (["--data=missing.txt"], ["missing.txt"]),
    "empty file": (["--data=empty.txt"], ["empty.txt"]),
    "binary file": (["--data=binary.txt"], ["binary.txt"]),
    "undecodable file": (["--data=latin.txt"], ["latin.txt", "UTF-8"]),
    "tokenizer": (["--data=good.txt", "--data.tokenizer=broken.json"], ["broken.json"]),
    "no tokenizer": (["--data=good.txt", "--data.tokenizer=nowhere"], ["nowhere"]),
    "nothing to resume": (["--resume"], ["holds no run to resume"]),
    "resume and overwrite": (["--resume", "--overwrite"], ["exclude each other"]),
    "tracker": (["--log.wandb=project"], ["wandb", "not installed"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(bad_files, name, monkeypatch):
    words, says = BAD[name]
    if name == "tracker":
        words = [*words, "--data.batch-size=4", "--model.num-layers=1", "--steps=1", "--optim.warmup-steps=0"]
        monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    extra = [] if "--preset=bbb" in words else ["--run-dir=out/run"]
    if name in ("negative steps", "no steps"):
        extra.append("--optim.warmup-steps=0")
    with pytest.raises(UserError) as error:
        pretrain.main([*words, *extra])
    text = str(error.value)
    assert error.value.exit_code == 2
    assert "\n" not in text
    assert text.endswith(".")
    assert all(part in text for part in says), text
    assert not (bad_files / "out/run/checkpoints").is_dir() or not any((bad_files / "out/run/checkpoints").iterdir())


@pytest.mark.parametrize("name", ["window", "no file", "vocabulary"])
def test_bad_input_with_overwrite_leaves_the_old_run_where_it_is(bad_files, name):
    """What can be known without the folder is looked at before the old run is moved."""
    folder = bad_files / "out/run"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "run.lock").write_text("")
    with pytest.raises(UserError):
        pretrain.main([*BAD[name][0], "--run-dir=out/run", "--overwrite"])
    assert (folder / "config.json").read_text() == "{}"
    assert not (bad_files / "out/run.old-1").exists()


def test_a_corrupt_tokenizer_cache(bad_files):
    words = ["--data=good.txt", "--data.vocab-size=300", "--data.context=16", "--attn=softmax"]
    cfg = dataclasses.replace(
        h.tiny(bad_files / "one"),
        data=dataclasses.replace(h.tiny(bad_files).data, source="good.txt", vocab_size=300),
    )
    from train.data.open import open_source

    open_source(cfg)
    (cached,) = (bad_files / "cache").rglob("bpe-300-*.json")
    cached.write_bytes(cached.read_bytes()[:-40])
    with pytest.raises(UserError) as error:
        pretrain.main([*words, "--run-dir=out/run"])
    assert str(cached) in str(error.value)
    assert "delete" in str(error.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--attn=sigmoit"], "did you mean 'sigmoid'"),
        (["--data=latin.txt", "--run-dir=run"], "latin.txt"),
        (["--model.mixers=softmax"], "--attn"),
    ],
)
def test_as_a_process_exit_code_2_and_one_line(bad_files, words, says):
    code, out, err = h.command(words, bad_files)
    assert code == 2
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert says in line


def test_sinks_as_a_process(bad_files):
    code, out, err = h.command(["."], bad_files, module="evals.sinks")
    (line,) = err.splitlines()
    assert (code, out) == (2, "")
    assert line == "error: . holds no run (config.json is missing); check the path."


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--colour=red"], ["'--colour' is no flag"]),
        (["--steps=many"], ["--steps", "'many'"]),
        (["--steps"], ["--steps"]),
        (["--optim.name=lion"], ["optim.name", "'lion'", "adamw", "sgd"]),
        (["--optim.lrr=3", "--stepss=4"], ["--optim.lrr", "did you mean", "'--optim.lr'"]),
        (["--data.batch-size=1e3"], ["--data.batch-size", "'1e3'"]),
        (["extra"], ["extra"]),
        (["x" * 100_000], ["xxx"]),
        (["--steps=" + "9" * 5000], ["--steps"]),
        (["--steps=99999999999"], ["steps is 99999999999", "2,147,483,647"]),
    ],
)
def test_flags_that_do_not_parse(words, says):
    with pytest.raises(UserError) as ended:
        pretrain.main(words)
    text = str(ended.value)
    assert all(part in text for part in says), text
    assert len(text) < 2100
    assert text.isprintable()
    assert text.endswith(".")
    assert not set("╭│─╰") & set(text)


# ------------------------------------------------------------------------------------- the study's presets


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads", "ff", "steps"),
    [("sink-60m", 10, 768, 8, 1536, 20_000), ("sink-1b", 22, 2048, 16, 5632, 40_000)],
)
def test_the_sink_study(name, layers, width, heads, ff, steps):
    """Every number of the study's default and large runs (arXiv 2410.10781, section 3 and appendix)."""
    cfg = get_preset(name).resolved()
    m, o, d = cfg.model, cfg.optim, cfg.data
    assert (m.num_layers, m.d_model, m.num_heads, m.kv_heads, m.head_dim) == (
        layers,
        width,
        heads,
        heads,
        width // heads,
    )
    assert (m.mlps, m.ff_width("swiglu"), m.mixers) == (("swiglu",), ff, ("softmax",))
    assert (m.norm, m.norm_eps, m.norm_position, m.qk_norm) == ("rmsnorm", 1e-5, "pre", False)
    assert (m.position, m.rope_base, m.rope_fraction) == ("rope", 10_000.0, 1.0)
    assert (m.use_bias, m.tie_embeddings, m.vocab_size, m.init) == (False, False, 50_432, "sink")
    assert m.dtype == "bfloat16"
    assert (o.name, o.b1, o.b2, o.eps, o.weight_decay, o.clip_norm) == ("adamw", 0.9, 0.95, 1e-8, 0.1, 1.0)
    assert (o.lr, o.schedule, o.warmup_steps) == (4e-4, "constant", 100)
    assert (d.context, d.batch_size, cfg.steps) == (2048, 512, steps)
    assert d.batch_size * d.context == 2**20  # 1M tokens a step
    assert (cfg.eval.sequences, cfg.eval.length, cfg.eval.epsilon) == (100, 64, 0.3)


@pytest.mark.parametrize(
    ("name", "blocks", "everything"),
    # blocks: L (4 E² + 3 E F + 2 E) + E; everything: and 2 · 50432 · E
    [("sink-60m", 58_998_528, 136_462_080), ("sink-1b", 1_130_457_088, 1_337_026_560)],
)
def test_parameter_counts(name, blocks, everything):
    cfg = get_preset(name).resolved()
    m = cfg.model
    e, f = m.d_model, m.ff_width("swiglu")
    assert m.num_layers * (4 * e * e + 3 * e * f + 2 * e) + e == blocks
    assert blocks + 2 * m.vocab_size * e == everything
    params = abstract_state(cfg)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == everything
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


@pytest.mark.parametrize("name", ["sink-60m", "sink-1b"])
def test_the_full_step_compiles(name):
    """The real shapes, 512 x 2048 tokens in micro-batches, without a byte of memory for them.

    sink-1b is lowered only: its compile takes minutes.
    """
    cfg = get_preset(name).resolved()
    state = abstract_state(cfg)
    shape = (cfg.data.batch_size, cfg.data.context)
    batch = {k: jax.ShapeDtypeStruct(shape, jnp.int32) for k in ("tokens", "targets", "positions", "segment_ids")}
    batch["loss_mask"] = jax.ShapeDtypeStruct(shape, jnp.bool_)
    step = make_train_step(cfg.model, cfg.optim, cfg.steps)
    new, numbers = jax.eval_shape(step, state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert {k: v.shape for k, v in numbers.items()} == dict.fromkeys(numbers, ())
    lowered = step.lower(state, batch)
    text = lowered.as_text()
    assert f"{cfg.data.batch_size // cfg.optim.accumulate}x2048x{cfg.model.d_model}xbf16" in text
    assert "512x2048x50432x" not in text  # the logits of a whole batch never exist
    if name == "sink-60m":
        memory = lowered.compile().memory_analysis()
        state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        assert memory.alias_size_in_bytes >= 0.99 * state_bytes, "the state is updated in place"
        assert memory.temp_size_in_bytes < 24 * 2**30, "one 80 GB device holds a micro-batch with room to spare"


def test_config_fields_have_help():
    """--help is made of the fields' docstrings: none may be missing."""
    import inspect

    for kind in (
        config.OptimConfig,
        config.EvalConfig,
        config.CheckpointConfig,
        config.LogConfig,
        config.RunConfig,
    ):
        source = inspect.getsource(kind)
        for field in dataclasses.fields(kind):
            if not dataclasses.is_dataclass(field.type) and f"{field.name}: " in source:
                after = source.split(f"    {field.name}: ", 1)[1].splitlines()
                group = "Config" in after[0]
                assert group or after[1].strip().startswith('"""'), (kind.__name__, field.name)


def test_help_into_a_reader_that_has_left_is_quiet(tmp_path):
    """`--help | head -1`: no traceback, and the exit code that a broken pipe has elsewhere."""
    process = h.start(["--help"], tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 141
