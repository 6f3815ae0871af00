"""Numbers that go wrong in a run, and folders and checkpoints that are not what they should be."""

import dataclasses
import json
import logging
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from evals import sinks
from jaxattn.errors import ConfigError, Corrupt, Incomplete, Mismatch, TrainingStopped, UserError
from jaxattn.runs.config import OptimConfig
from jaxattn.runs.rundir import open_run
from tests.train import helpers as h
from train import loop
from train import step as step_module
from train.data.open import open_source
from train.pretrain import run
from train.step import SPIKE_WARMUP, init_state, make_train_step


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Configuration with its vocabulary, and three batches."""
    cfg = h.tiny(tmp_path_factory.mktemp("small")).resolved()
    source, model = open_source(cfg)
    iterator = source.train_iterator()
    batches = [next(iterator) for _ in range(3)]
    iterator.close()
    return dataclasses.replace(cfg, model=model), batches


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run of 12 steps with evaluations at 6 and 12; tests copy it or leave it alone."""
    folder = tmp_path_factory.mktemp("done") / "run"
    assert run(h.tiny(folder, eval={"every": 6})) == 0
    return folder


@pytest.fixture
def copy(done, tmp_path):
    import shutil

    return shutil.copytree(done, tmp_path / "run")


def resumed(folder, **changes):
    cfg = dataclasses.replace(h.read_config(folder), resume=True, run_dir=str(folder))
    for name, value in changes.items():
        part = getattr(cfg, name)
        cfg = dataclasses.replace(
            cfg, **{name: dataclasses.replace(part, **value) if isinstance(value, dict) else value}
        )
    return run(cfg)


def all_finite(folder):
    for step in h.steps_of(folder):
        _, state, _ = h.restore(folder, step)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state)), step


def poison(monkeypatch, bad, value=np.nan):
    """The loss of the given (1-based) steps becomes `value`, inside the real step."""
    calls = iter(range(1, 10_000))
    original = loop.shard_batch

    def shard(batch, mesh):
        scale = np.full(batch["tokens"].shape[:1], value if next(calls) in bad else 0.0, np.float32)
        return original({**batch, "poison": scale}, mesh)

    real = step_module.batch_loss

    def poisoned(model, params, batch):
        total, count = real(model, params, batch)
        return (total + jnp.sum(batch["poison"]) if "poison" in batch else total), count

    monkeypatch.setattr(loop, "shard_batch", shard)
    monkeypatch.setattr(step_module, "batch_loss", poisoned)


# ------------------------------------------------------------------------------------- row 17: non-finite


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("at", [7, 8])  # within an interval, and where a checkpoint is due
def test_row_17_stop(tmp_path, monkeypatch, value, at):
    poison(monkeypatch, {at}, value)
    folder = tmp_path / "run"
    with pytest.raises(TrainingStopped, match=f"loss of step {at} is {value}") as caught:
        run(h.tiny(folder))
    dump = folder / f"nonfinite_step_{at:08d}.npz"
    assert str(dump) in str(caught.value)
    assert caught.value.exit_code == 1
    assert h.steps_of(folder) == [4]
    all_finite(folder)
    with np.load(dump) as batch:
        found = dict(batch)
    source, _ = open_source(h.read_config(folder))
    iterator = source.train_iterator()
    for _ in range(at):
        expected = next(iterator)
    iterator.close()
    h.assert_same(found, expected)
    assert [row["step"] for row in h.rows(folder)] == list(range(1, at))


def test_row_17_the_advised_way_on_works(tmp_path, monkeypatch):
    """The message says `--optim.nonfinite=skip --resume`: it must be possible, and count the step."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        poison(patch, {7})
        with pytest.raises(TrainingStopped, match=r"--optim\.nonfinite=skip --resume"):
            run(h.tiny(folder))
    poison(monkeypatch, {3})  # the third step after step 4 is step 7 again
    assert resumed(folder, optim={"nonfinite": "skip"}) == 0
    assert [row["skipped"] for row in h.rows(folder)] == [0] * 6 + [1] * 6


def test_row_17_a_diverging_run_as_a_process(tmp_path):
    """No injection: SGD with an absurd learning rate."""
    folder = tmp_path / "run"
    cfg = h.tiny(folder, optim={"name": "sgd", "lr": 1e30}, checkpoint={"every": 1})
    code, out, err = h.command(h.flags(cfg), tmp_path)
    assert code == 1, (out, err)
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    at = int(line.split("loss of step ")[1].split()[0])
    assert (folder / f"nonfinite_step_{at:08d}.npz").is_file()
    assert h.steps_of(folder)[-1] == at - 1
    all_finite(folder)


@pytest.mark.smoke
def test_row_17_skip(tmp_path, monkeypatch, caplog):
    """The steps are left out and counted; nothing non-finite is saved; the JSON has null."""
    poison(monkeypatch, {3, 8})
    folder = tmp_path / "run"
    assert run(h.tiny(folder, optim={"nonfinite": "skip"})) == 0
    found = h.rows(folder)
    assert [row["skipped"] for row in found] == [0, 0] + [1] * 5 + [2] * 5
    assert [row["step"] for row in found if row["loss"] is None] == [3, 8]
    assert "step 3 skipped (loss: loss nan" in caplog.text
    assert h.steps_of(folder) == [4, 8, 12]
    all_finite(folder)
    assert int(h.restore(folder)[1]["skipped"]) == 2


def test_row_17_too_many_in_a_row(tmp_path, monkeypatch):
    """Two, a good one, then three: only the third in a row stops."""
    poison(monkeypatch, {2, 3, 5, 6, 7})
    folder = tmp_path / "run"
    with pytest.raises(TrainingStopped, match="3 steps in a row were skipped up to step 7"):
        run(h.tiny(folder, optim={"nonfinite": "skip", "max_skips": 3}))
    assert h.steps_of(folder) == [4]
    all_finite(folder)


# ----------------------------------------------------------------------- rows 18, 19: one step, by itself


def after(small, optim, batch, **state):
    cfg, _ = small
    before = init_state(cfg.model, optim, 12, 0) | {k: jnp.asarray(v) for k, v in state.items()}
    kept = jax.tree.map(np.array, before)
    new, numbers = make_train_step(cfg.model, optim, 12)(before, batch)
    return kept, jax.tree.map(np.array, new), jax.device_get(numbers)


def assert_untouched(kept, new):
    h.assert_same(new["params"], kept["params"])
    h.assert_same(new["opt_state"], kept["opt_state"])
    h.assert_same(new["loss_mean"], kept["loss_mean"])
    assert new["skipped"] == kept["skipped"] + 1
    assert new["step"] == kept["step"] + 1


@jax.custom_vjp
def steep(x):
    """x, with an infinite gradient."""
    return x


steep.defvjp(lambda x: (x, None), lambda _, g: (jnp.full_like(g, jnp.inf),))


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_row_18_finite_loss_infinite_gradient(small, monkeypatch, nonfinite):
    real = step_module.batch_loss
    monkeypatch.setattr(step_module, "_step", step_module._step.__wrapped__)  # not the one that is compiled already
    monkeypatch.setattr(step_module, "batch_loss", lambda m, p, b: (lambda s, n: (steep(s), n))(*real(m, p, b)))
    kept, new, numbers = after(small, OptimConfig(nonfinite=nonfinite), small[1][0])
    assert np.isfinite(numbers["loss"])
    assert not np.isfinite(numbers["grad_norm"])
    assert not numbers["applied"]
    assert_untouched(kept, new)


def test_a_good_step_changes_all_of_it(small):
    """The control of the tests around it."""
    kept, new, numbers = after(small, OptimConfig(), small[1][0])
    assert numbers["applied"]
    assert new["skipped"] == 0
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), kept["params"], new["params"])
    assert all(jax.tree.leaves(changed))
    assert new["loss_mean"] == numbers["loss"]


@pytest.mark.parametrize(
    ("step", "mean", "factor", "applied"),
    [
        (SPIKE_WARMUP, 1.0, 2.0, False),
        (SPIKE_WARMUP, 4.0, 2.0, True),  # no spike: the loss is about 4.4
        (SPIKE_WARMUP - 1, 1.0, 2.0, True),  # the mean is not trusted yet
        (SPIKE_WARMUP, 1.0, 0.0, True),  # off
    ],
)
def test_row_19_loss_spike(small, step, mean, factor, applied):
    kept, new, numbers = after(
        small,
        OptimConfig(spike_factor=factor),
        small[1][0],
        step=jnp.int32(step),
        loss_mean=jnp.float32(mean),
    )
    assert numbers["applied"] == applied
    if applied:
        np.testing.assert_allclose(new["loss_mean"], 0.95 * mean + 0.05 * numbers["loss"], rtol=1e-6)
    else:
        assert_untouched(kept, new)


def test_the_mean_begins_at_the_first_step_that_is_applied(small):
    """All before were skipped: nothing is a spike yet, and zero is no loss to take a mean with."""
    _, new, numbers = after(small, OptimConfig(spike_factor=2.0), small[1][0], step=jnp.int32(SPIKE_WARMUP))
    assert numbers["applied"]
    assert new["loss_mean"] == numbers["loss"]


def test_row_19_a_spike_in_a_run_is_said(tmp_path, monkeypatch, caplog):
    poison(monkeypatch, {SPIKE_WARMUP + 2}, 1e4)
    assert run(h.tiny(tmp_path / "run", 24, optim={"spike_factor": 2.0})) == 0
    assert [row["skipped"] for row in h.rows(tmp_path / "run")] == [0] * 21 + [1] * 3
    assert "step 22 skipped (loss spike" in caplog.text


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_one_large_batch(small, uneven, parts):
    """Also where the micro-batches have different numbers of tokens, one of them none."""
    batch = dict(small[1][0])
    if uneven:
        mask = batch["loss_mask"].copy()
        mask[0] = False
        mask[1, 3:] = False
        mask[2, ::2] = False
        batch["loss_mask"] = mask
    one = after(small, OptimConfig(name="sgd", lr=1.0), batch)
    more = after(small, OptimConfig(name="sgd", lr=1.0, accumulate=parts), batch)
    assert one[2]["tokens"] == more[2]["tokens"] == batch["loss_mask"].sum()
    np.testing.assert_allclose(one[2]["loss"], more[2]["loss"], rtol=1e-6)
    np.testing.assert_allclose(one[2]["grad_norm"], more[2]["grad_norm"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one[1]["params"]), jax.tree.leaves(more[1]["params"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, one[1]["params"], one[0]["params"]))
    np.testing.assert_allclose(moved, one[2]["grad_norm"], rtol=1e-4)  # lr 1: the gradient itself


# ---------------------------------------------------------------- rows 8, 10, 12, 13, 41: folders and files


def damage(folder, step, rng):
    files = [p for p in (folder / "checkpoints" / f"step_{step:08d}" / "state").rglob("*") if p.is_file()]
    path = max(files, key=lambda p: (p.stat().st_size, str(p)))
    path.write_bytes(path.read_bytes()[: rng.randrange(1, path.stat().st_size)])


def test_row_10_a_truncated_checkpoint_is_passed_over(copy, done, caplog):
    """The run goes on from the one before, says both, and ends as if nothing had been."""
    damage(copy, 12, random.Random(10))
    caplog.set_level(logging.WARNING)
    assert resumed(copy) == 0
    assert "skipped step 12 and restored step 8 instead" in caplog.text
    h.assert_same_run(copy, done)


def test_row_12_all_corrupt_is_never_a_fresh_start(copy):
    for step in (4, 8, 12):
        damage(copy, step, random.Random(step))
    before = h.snapshot(copy)
    with pytest.raises(Corrupt, match=r"no checkpoint in .* can be used") as caught:
        resumed(copy)
    assert all(f"step {step}:" in str(caught.value) for step in (4, 8, 12))
    assert h.snapshot(copy) == before


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"optim": {"lr": 0.5}}, "optim.lr: saved 0.001, now 0.5"),
        ({"model": {"d_model": 32}}, "model.d_model: saved 16, now 32"),
        ({"attn": "sigmoid"}, "attn: saved 'softmax', now 'sigmoid'"),
        ({"seed": 5}, "seed: saved 0, now 5"),
        ({"data": {"batch_size": 8}}, "data.batch_size: saved 4, now 8"),
    ],
)
def test_row_13_another_configuration_leaves_the_run_alone(done, changes, field):
    before = h.snapshot(done)
    with pytest.raises(Mismatch) as caught:
        resumed(done, **changes)
    assert field in str(caught.value)
    assert h.snapshot(done) == before


def test_fewer_steps_than_were_taken_leave_the_run_alone(done):
    before = h.snapshot(done)
    with pytest.raises(ConfigError, match=r"steps is 5 but the run in .*run is at step 12: give --steps=12 or more"):
        resumed(done, steps=5)
    assert h.snapshot(done) == before


def test_a_moved_cache_is_no_other_run(copy, done, tmp_path):
    assert resumed(copy, data={"cache_dir": str(tmp_path / "cache")}, steps=12) == 0
    assert h.read_config(copy).data.cache_dir == str(tmp_path / "cache")
    h.assert_same_run(copy, done)


def test_row_13_before_the_first_checkpoint_too(tmp_path):
    """A run that was killed before it saved anything is still a run of its configuration."""
    folder = tmp_path / "run"
    run(h.tiny(folder, 4, eval={"every": 2}))
    import shutil

    shutil.rmtree(folder / "checkpoints")
    before = h.snapshot(folder)
    with pytest.raises(Mismatch, match=r"optim.lr: saved 0.001, now 0.5"):
        resumed(folder, optim={"lr": 0.5})
    assert h.snapshot(folder) == before


def test_a_run_is_never_overwritten_unasked(done):
    before = h.snapshot(done)
    with pytest.raises(UserError, match="already holds a run"):
        run(h.tiny(done))
    assert h.snapshot(done) == before


def test_overwrite_sets_the_old_run_aside(copy, done):
    assert run(h.tiny(copy, 4, overwrite=True, seed=3)) == 0
    assert h.snapshot(copy.with_name("run.old-1")) == h.snapshot(done)
    assert h.steps_of(copy) == [4]
    assert [row["step"] for row in h.rows(copy)] == [1, 2, 3, 4]


def test_row_8_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="cannot be used as the run folder"):
        run(h.tiny(tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "mine"


def test_row_41_two_runs_on_one_folder(copy):
    before = h.snapshot(copy)
    with open_run(copy, resume=True):
        for changes in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match="is in use by process"):
                run(h.tiny(copy, eval={"every": 6}, **changes))
    assert h.snapshot(copy) == before


def test_a_longer_run_goes_on(copy):
    """`steps` may change: more steps are taken, the rows before stay."""
    rows = h.rows(copy)
    assert resumed(copy, steps=14) == 0
    assert h.rows(copy)[:12] == rows
    assert [row["step"] for row in h.rows(copy)] == list(range(1, 15))
    assert h.steps_of(copy)[-1] == 14


# --------------------------------------------------------------------------- what a run leaves, evals.sinks


TABLES = ("first_token_weight", "first_token_weight_nontrigger", "first_token_weight_trigger", "value_drain")
SCALARS = ("sink_rate", "risk_backcopy", "risk_bigram_excess")


def test_metrics_rows(done):
    for row in h.rows(done):
        assert {"step", "loss", "grad_norm", "lr", "skipped", "tokens_per_s", "time_s"} <= row.keys()
        assert row["tokens_per_s"] > 0
        evaluated = row["step"] in (6, 12)
        assert {*SCALARS, *TABLES, "val_loss"} <= row.keys() if evaluated else "val_loss" not in row
        assert all(np.shape(row[name]) == (1, 1) for name in TABLES if evaluated)


def test_files_of_a_run(tmp_path):
    """config, environment (git, versions, device), metrics, TensorBoard, checkpoints, sinks, plots, one report."""
    folder = tmp_path / "run"
    assert run(h.tiny(folder, 4, log={"tensorboard": True}, report=True, seed=9)) == 0
    names = {p.name for p in folder.iterdir()}
    assert {"config.json", "environment.json", "data.json", "metrics.jsonl", "checkpoints"} <= names
    assert {"tensorboard", "sinks.json", "maps.npz", "report.html"} <= names
    assert list((folder / "tensorboard").glob("events.out.tfevents*"))
    assert list(folder.rglob("*.png"))
    facts = json.loads((folder / "environment.json").read_text())
    assert {"git", "versions", "devices", "date"} <= facts.keys()
    cfg = h.read_config(folder)
    assert (cfg.seed, cfg.steps, cfg.resume) == (9, 4, False)
    text = (folder / "report.html").read_text("utf-8")
    assert "<script src=" not in text
    assert 'href="http' not in text.split("<body")[0]


def sinks_main(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["sinks", *map(str, words)])
    return sinks.main()


def test_sinks_json(done, tmp_path, monkeypatch, capsys):
    """The same numbers as the run itself wrote at its end, in the layout [layer][head]."""
    at_end = json.loads((done / "sinks.json").read_text())
    assert sinks_main(monkeypatch, done, "--json", tmp_path / "out.json") == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found == at_end == json.loads((done / "sinks.json").read_text())
    assert {*SCALARS, *TABLES} <= found.keys()
    assert all(np.shape(found[name]) == (1, 1) for name in TABLES)
    assert found["step"] == 12
    last = h.rows(done)[-1]
    assert {k: last[k] for k in (*SCALARS, *TABLES)} == {k: found[k] for k in (*SCALARS, *TABLES)}
    assert "Sink_1 (0.3)" in capsys.readouterr().out


def test_sinks_refuses(done, tmp_path, monkeypatch):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="holds no run"):
        sinks_main(monkeypatch, tmp_path / "nothing")
    young = tmp_path / "young"
    young.mkdir()
    (young / "config.json").write_bytes((done / "config.json").read_bytes())
    with pytest.raises(Incomplete, match="has no checkpoint yet"):
        sinks_main(monkeypatch, young)
    (young / "config.json").write_text('{"steps": 1, "colour": 2}')
    with pytest.raises(UserError, match="fields this version does not know: colour"):
        sinks_main(monkeypatch, young)
    (young / "config.json").write_text('{"steps": ')
    with pytest.raises(UserError, match="is not valid JSON"):
        sinks_main(monkeypatch, young)
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(UserError, match="no tokenizer"):
        sinks_main(monkeypatch, done, "--text", tmp_path / "text.txt")
    with pytest.raises(UserError, match="cannot be written"):
        sinks_main(monkeypatch, done, "--json", tmp_path / "text.txt" / "out.json")
    with pytest.raises(UserError, match="finished steps are 4, 8, 12"):
        sinks_main(monkeypatch, done, "--step", 5)
    with pytest.raises(ConfigError, match=r"--length is 8 but all sequences of 'bb' have .* context of 16 tokens"):
        sinks_main(monkeypatch, done, "--length", 8)


def test_the_last_numbers_of_a_run_are_said_where_they_cannot_be_written(copy, capsys):
    (copy / "sinks.json").unlink()
    (copy / "maps.npz").unlink()
    (copy / "maps.npz").mkdir()
    with pytest.raises(UserError, match=r"maps\.npz.* cannot be written"):
        resumed(copy)
    assert "Sink_1 (0.3)" in capsys.readouterr().out
    assert not (copy / "sinks.json").exists()


def test_what_sinks_measured_is_said_where_it_cannot_be_written(copy, tmp_path, monkeypatch, capsys):
    (copy / "maps.npz").unlink()
    (copy / "maps.npz").mkdir()
    for words, says in ((["--json", tmp_path], "another --json"), ([], "maps.npz.* or give --step=12 to leave it")):
        with pytest.raises(UserError, match=says):
            sinks_main(monkeypatch, copy, *words)
        assert "Sink_1 (0.3)" in capsys.readouterr().out
    assert sinks_main(monkeypatch, copy, "--step", 12, "--json", tmp_path / "out.json") == 0
    assert json.loads((tmp_path / "out.json").read_text())["step"] == 12
