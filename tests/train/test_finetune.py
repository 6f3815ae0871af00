"""Fine-tuning: it starts from the checkpoint's own function, trains what it says, swaps attention, and exports."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from convert.from_hf import convert
from convert.to_hf import export
from jaxattn.errors import ConfigError, Incomplete, Mismatch, UserError
from jaxattn.nn import Decoder
from jaxattn.runs import lora
from jaxattn.runs.checkpoint import Checkpoints
from jaxattn.runs.config import LoraConfig, RunConfig
from jaxattn.runs.load import load_params, read_config
from tests.convert.families import build
from tests.generate.helpers import byte_run
from tests.train.helpers import assert_same, restore, rows, steps_of, untimed
from train.data.open import open_source
from train.finetune import defaults, main
from train.step import batch_loss

QUICK = [
    "--steps=6", "--data.context=12", "--data.batch-size=4", "--eval.every=3", "--eval.batches=1", "--eval.length=8",
    "--eval.sequences=2", "--checkpoint.every=3", "--log.no-tensorboard", "--no-report", "--optim.lr=0.01",
    "--optim.warmup-steps=0",
]  # fmt: skip
LORA = [*QUICK, "--lora.rank=2"]


def documents(folder):
    """Forty short documents, some of them to be held out."""
    path = folder / "documents.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"{n} some words to train on, over and over. " * 4}) + "\n" for n in range(40))
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    documents(folder)
    return byte_run(folder)


@pytest.fixture(scope="module")
def full(base, tmp_path_factory):
    """A run that trained every parameter, whose folder tests read or copy."""
    folder = tmp_path_factory.mktemp("full") / "run"
    tuned(base, folder, *QUICK)
    return folder


def data_of(base):
    """Documents beside the checkpoint."""
    return [f"--data={base.parent / 'documents.jsonl'}", "--data.val-fraction=0.2"]


def tuned(base, folder, *flags):
    assert main([str(base), f"--run-dir={folder}", *data_of(base), *flags]) == 0
    return read_config(folder), load_params(folder, read_config(folder))[0]


def start_loss(folder):
    first, *others = rows(folder)
    assert first["step"] == 0
    assert "loss" not in first
    return first["val_loss"], [row["val_loss"] for row in others if "val_loss" in row]


# ----------------------------------------------------------------------------------------------- LoRA itself


def test_the_update_is_alpha_over_rank_times_a_b():
    rng = np.random.default_rng(0)
    kernel, other = rng.normal(size=(2, 6, 5)).astype(np.float32), rng.normal(size=(6, 5)).astype(np.float32)
    params = {"attn": {"q": {"kernel": jnp.asarray(kernel)}, "o": {"kernel": jnp.asarray(other)}}}
    cfg = LoraConfig(rank=3, alpha=6.0, targets=("attn/q",))
    trained = lora.init(jax.random.key(1), params, cfg)
    assert {"/".join(p): x.shape for p, x in flatten_dict(trained).items()} == {
        "lora/attn/q/kernel/a": (2, 6, 3),
        "lora/attn/q/kernel/b": (2, 3, 5),
    }
    assert_same(lora.merge(params, trained, cfg), params)
    a, b = np.asarray(trained["lora"]["attn"]["q"]["kernel"]["a"]), rng.normal(size=(2, 3, 5)).astype(np.float32)
    assert 0.2 < np.std(a) * 6**0.5 < 2
    trained["lora"]["attn"]["q"]["kernel"]["b"] = jnp.asarray(b)
    merged = lora.merge(params, trained, cfg)
    expected = kernel.astype(np.float64) + 2.0 * np.einsum("rei,rif->ref", a.astype(np.float64), b)
    np.testing.assert_allclose(merged["attn"]["q"]["kernel"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(merged["attn"]["o"]["kernel"], other)


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        (LoraConfig(rank=2, targets=("attn/z",)), ["'attn/z'", "attn/q"]),
        (LoraConfig(rank=17), ["lora.rank is 17", "at most 16"]),
    ],
)
def test_what_cannot_be_adapted_is_refused(base, cfg, words):
    params, _ = load_params(base, read_config(base))
    with pytest.raises(ConfigError) as found:
        lora.init(jax.random.key(0), params, cfg)
    assert all(word in str(found.value) for word in words)


# ---------------------------------------------------------------------------------------------------- training


@pytest.mark.smoke
def test_every_parameter_is_trained_from_the_checkpoint_s_own(base, full):
    cfg, params = read_config(full), load_params(full, read_config(full))[0]
    before, _ = load_params(base, read_config(base))
    first, later = start_loss(full)
    assert later[-1] < first - 0.05
    for path, x in flatten_dict(params).items():
        assert not np.array_equal(x, flatten_dict(before)[path]), path
    assert (cfg.start.step, cfg.start.attn, cfg.preset) == (3, "softmax", "finetune")
    source, model = open_source(cfg)
    (batch,) = source.val_batches(1)
    total, count = jax.jit(batch_loss, static_argnums=0)(model, before, jax.tree.map(jnp.asarray, batch))
    assert first == pytest.approx(float(total / count), rel=1e-6)


def test_lora_trains_the_updates_alone_and_keeps_nothing_else(base, tmp_path):
    run = tmp_path / "run"
    _, params = tuned(base, run, *LORA, "--lora.targets", "attn/[qv]")
    first, later = start_loss(run)
    assert later[-1] < first
    saved = Checkpoints(run / "checkpoints", config={}, read_only=True).leaves()
    names = {name for name in saved if name.startswith("params/")}
    assert names == {f"params/lora/layer_0/attn/{x}/kernel/{y}" for x in "qv" for y in "ab"}
    assert sum(int(np.prod(leaf.shape)) for name, leaf in saved.items() if "opt_state" in name) < 300
    before = flatten_dict(load_params(base, read_config(base))[0])
    changed = {path for path, x in flatten_dict(params).items() if not np.array_equal(x, before[path])}
    assert {path[-2] for path in changed} == {"q", "v"}
    # The last row was measured with exactly what a reader of the run gets.
    trained = restore(run)[1]["params"]
    whole = lora.merge(load_params(base, read_config(base))[0], trained, read_config(run).lora)
    for path, x in flatten_dict(whole).items():
        np.testing.assert_allclose(x, flatten_dict(params)[path], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("how", [None, [*LORA, "--attn=selective_temperature"]], ids=["full", "lora"])
def test_a_run_that_was_cut_goes_on_to_the_same_bits(base, full, tmp_path, how):
    straight, cut = tmp_path / "straight" if how else full, tmp_path / "cut"
    if how:
        tuned(base, straight, *how)
    shutil.copytree(straight, cut)
    for name in steps_of(cut)[1:]:
        shutil.rmtree(cut / "checkpoints" / f"step_{name:08d}")
    assert steps_of(cut) == [3]
    (cut / "sinks.json").unlink()
    assert main([str(base), f"--run-dir={cut}", "--resume"]) == 0
    assert untimed(cut) == untimed(straight)
    assert_same(restore(cut)[1], restore(straight)[1])


# ------------------------------------------------------------------------------------------------ another attention


def test_an_attention_added_at_its_identity_starts_at_the_same_loss(base, full, tmp_path, capsys):
    cfg, params = tuned(base, tmp_path / "new", *LORA, "--attn=selective_temperature(form='linear')")
    assert start_loss(tmp_path / "new")[0] == pytest.approx(start_loss(full)[0], abs=1e-6)
    assert "attention softmax -> selective_temperature(form='linear')" in capsys.readouterr().out
    # What is new is trained whole, beside the updates of what was there.
    trained = flatten_dict(restore(tmp_path / "new")[1]["params"])
    assert {path[0] for path in trained} == {"lora", "new"}
    fresh = jax.eval_shape(Decoder(cfg.model).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    assert flatten_dict(params).keys() == flatten_dict(fresh).keys()
    assert any(np.any(np.asarray(x) != 0) for path, x in trained.items() if path[0] == "new")


def test_an_attention_without_parameters_of_its_own_takes_all_of_them(base, tmp_path):
    cfg, _ = tuned(base, tmp_path / "run", *QUICK, "--attn=sigmoid")
    first, later = start_loss(tmp_path / "run")
    assert cfg.model.mixers == ("sigmoid",)
    assert later[-1] < first


def test_other_projections_are_refused_before_anything_is_written(base, tmp_path):
    with pytest.raises(
        ConfigError, match=r"attn 'based' needs layer_0/attn/. */kernel as .* has .*same projections".replace(" *", "")
    ):
        main([str(base), f"--run-dir={tmp_path / 'run'}", *data_of(base), *QUICK, "--attn=based"])
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------- converted checkpoints


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    pytest.importorskip("torch", reason="the source is made by transformers")
    folder = tmp_path_factory.mktemp("llama")
    build("llama-bytes", folder / "hf")
    documents(folder)
    return convert(str(folder / "hf"), folder / "ours")


@pytest.mark.smoke
@pytest.mark.parametrize("how", [QUICK, LORA], ids=["full", "lora"])
def test_a_tuned_model_goes_back_to_huggingface(llama, tmp_path, how):
    import torch
    import transformers

    cfg, params = tuned(llama, tmp_path / "run", *how)
    assert (tmp_path / "run" / "hf" / "config.json").read_bytes() == (llama / "hf" / "config.json").read_bytes()
    export(tmp_path / "run", tmp_path / "back")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    ids = np.arange(20)[None] * 3 % 97
    with torch.no_grad():
        logits = theirs(torch.asarray(ids)).logits.numpy()
    apply = jax.jit(lambda params: Decoder(cfg.model).apply({"params": params}, jnp.asarray(ids, jnp.int32)))
    np.testing.assert_allclose(apply(params), logits, atol=2e-4)
    untuned = apply(load_params(llama, read_config(llama))[0])
    assert np.abs(np.asarray(untuned) - logits).max() > 0.01


def test_a_swapped_attention_is_no_huggingface_model(llama, tmp_path):
    tuned(llama, tmp_path / "run", *LORA, "--attn=sigmoid")
    with pytest.raises(UserError, match="sigmoid"):
        export(tmp_path / "run", tmp_path / "back")
    assert not (tmp_path / "back").exists()


# ------------------------------------------------------------------------------------------------------ bad input


def test_a_start_that_is_gone_or_changed_is_named(base, tmp_path):
    copy, run = shutil.copytree(base, tmp_path / "copy"), tmp_path / "run"
    documents(tmp_path)
    tuned(copy, run, *LORA)
    away = copy.rename(tmp_path / "away")
    with pytest.raises(Incomplete, match=r"copy, the checkpoint that this run started from, is not there"):
        load_params(run, read_config(run))
    away.rename(copy)
    assert load_params(run, read_config(run))
    manifest = copy / "checkpoints" / "step_00000003" / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(Mismatch, match="not the checkpoint that this run started from"):
        load_params(run, read_config(run))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.num-layers=2"], ["model is that of", "model.num_layers"]),
        (["--start-step=9"], ["no checkpoint of step 9", "has 3"]),
        (["--lora.rank=-1"], ["lora.rank is -1"]),
        (["--lora.rank=2", "--lora.alpha=0"], ["lora.alpha is 0.0"]),
        (["--lora.rank=2", "--lora.targets", "nothing"], ["'nothing'", "matches no kernel"]),
        (["--attn=sigmiod"], ["sigmiod", "sigmoid"]),
    ],
)
def test_impossible_flags_are_refused(base, tmp_path, flags, words):
    with pytest.raises(UserError) as found:
        main([str(base), f"--run-dir={tmp_path / 'run'}", *data_of(base), *QUICK, *flags])
    assert all(word in str(found.value) for word in words), str(found.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_folders_that_cannot_be_started_from(base, tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="first argument"):
        main(["--lora.rank=2"])
    with pytest.raises(ConfigError, match=r"use python -m train\.finetune"):
        RunConfig(lora=LoraConfig(rank=2))
    shutil.copytree(base, tmp_path / "empty", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(Incomplete, match="has no checkpoint"):
        main([str(tmp_path / "empty")])


def test_resuming_from_another_start_is_refused(base, full, tmp_path):
    run = shutil.copytree(full, tmp_path / "run")
    other = shutil.copytree(base, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"did not start from .*other"):
        main([str(other), f"--run-dir={run}", "--resume"])


def test_defaults_are_the_checkpoint_s_own(base):
    cfg = defaults(base)
    assert cfg.model == read_config(base).model
    assert dataclasses.replace(cfg, start=RunConfig().start).to_dict().keys() == RunConfig().to_dict().keys()
    assert json.loads(json.dumps(cfg.to_dict()))["start"]["step"] == 3
    assert (cfg.optim.lr, defaults(base, lora=True).optim.lr) == (2e-5, 2e-4)
