"""A run that is killed or stopped and resumed equals an unbroken one: losses, parameters, data, to the bit."""

import dataclasses
import json
import random
import signal
import time

import pytest

from evals import measure
from tests.train import helpers as h
from train import loop, step
from train.pretrain import main, run

STEPS = 160
EVERY = 20  # steps between checkpoints


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "füße und mehr.txt"
    rng = random.Random(7)
    words = ["attention", "sinks", "on", "the", "first", "token", "när", "värdet", "är", "litet"]
    path.write_text("\n".join(" ".join(rng.choices(words, k=40)) for _ in range(40)), "utf-8")
    return path


def text_changes(path):
    data = h.TINY["data"] | {
        "source": str(path),
        "tokenizer": "bytes",
        "cache_dir": str(path.parent / "cache"),
        "val_fraction": 0.1,
    }
    return {"data": data, "checkpoint": {"every": EVERY}, "optim": {"accumulate": 2}}


@pytest.fixture(scope="module")
def bb_unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bb") / "unbroken"
    assert run(h.tiny(folder, STEPS, checkpoint={"every": EVERY})) == 0
    return folder


def finish_in_process(folder):
    """--resume with no other flags: everything else comes from the run itself."""
    assert run(dataclasses.replace(h.read_config(folder), resume=True, run_dir=str(folder))) == 0


@pytest.mark.smoke
def test_rows_are_whole_and_the_numbers_move(bb_unbroken):
    """What the comparisons below stand on: all steps, distinct losses, a falling loss."""
    losses = [row["loss"] for row in h.rows(bb_unbroken)]
    assert [row["step"] for row in h.rows(bb_unbroken)] == list(range(1, STEPS + 1))
    assert len(set(losses)) == STEPS
    assert losses[-1] < losses[0]


def test_other_seeds_are_told_apart(bb_unbroken, tmp_path):
    """The comparison can fail: another seed gives other rows and another state, by the same program."""
    before = step._step.cache_info().misses, measure._one._cache_size()
    run(h.tiny(tmp_path / "other", EVERY, seed=1))
    assert (step._step.cache_info().misses, measure._one._cache_size()) == before
    assert h.untimed(tmp_path / "other")[:5] != h.untimed(bb_unbroken)[:5]


def test_row_1_and_3_bb_killed_again_and_again(bb_unbroken, tmp_path):
    """Three kill -9 at seeded steps, one inside the writing of the data, one before the manifest."""
    folder = tmp_path / "killed"
    rng = random.Random(1)
    first = rng.randrange(2, EVERY)  # before any checkpoint
    second = rng.randrange(2 * EVERY + 2, 3 * EVERY)  # a later save waits for the one before it
    words = h.flags(h.tiny(folder, STEPS, checkpoint={"every": EVERY}))
    resume = ["--resume", f"--run-dir={folder}"]
    h.kill_at(words, folder, first)
    assert [row["step"] for row in h.rows(folder, torn=True)][:first] == list(range(1, first + 1))
    h.kill_at(resume, folder, second)
    committed = h.steps_of(folder)
    assert committed
    for where in ("data", "manifest"):
        code, out, err = h.command(resume, tmp_path, JAXATTN_CRASH_AT=where)
        assert code == -signal.SIGKILL, (out, err)
        assert h.steps_of(folder) == committed, where
        assert f"resumed {folder}/checkpoints/step_{committed[-1]:08d}" in out
        assert any(".partial" in p.name for p in (folder / "checkpoints").iterdir())
        assert max(row["step"] for row in h.rows(folder, torn=True)) >= committed[-1] + EVERY - 1
    finish_in_process(folder)
    h.assert_same_run(folder, bb_unbroken)
    assert not any("partial" in p.name for p in (folder / "checkpoints").iterdir())


def test_row_1_text_with_accumulated_gradients(text_file, tmp_path):
    """A text file whose epoch is shorter than the run, the kill in the middle of an epoch."""
    changes = text_changes(text_file)
    unbroken, folder = tmp_path / "unbroken", tmp_path / "killed"
    assert run(h.tiny(unbroken, STEPS, **changes)) == 0
    tokens = json.loads((unbroken / "data.json").read_text())["meta"]
    assert text_file.stat().st_size < STEPS * 4 * 16, tokens  # more than one epoch
    h.kill_at(h.flags(h.tiny(folder, STEPS, **changes)), folder, 2 * EVERY + random.Random(2).randrange(3, EVERY))
    assert h.steps_of(folder)
    finish_in_process(folder)
    h.assert_same_run(folder, unbroken)


def test_row_4_sigterm_saves_the_step_and_exits_0(bb_unbroken, tmp_path):
    folder = tmp_path / "stopped"
    words = h.flags(h.tiny(folder, STEPS, checkpoint={"every": 1000}))  # no checkpoint of its own before the end
    code, out, err, seconds = h.stop_at(words, folder, 23, signal.SIGTERM)
    assert code == 0, err
    assert seconds < 10
    assert "Traceback" not in err
    (saved,) = h.steps_of(folder)
    assert 23 <= saved < STEPS
    assert f"SIGTERM: saved step {saved}" in out
    assert [row["step"] for row in h.rows(folder)] == list(range(1, saved + 1))
    assert h.untimed(folder) == h.untimed(bb_unbroken)[:saved]
    assert not (folder / "sinks.json").exists()  # the run has not ended
    assert main(["--resume", f"--run-dir={folder}"]) == 0
    h.assert_same_run(folder, bb_unbroken)


@pytest.mark.smoke
def test_row_6_ctrl_c(bb_unbroken, tmp_path):
    folder = tmp_path / "stopped"
    words = h.flags(h.tiny(folder, STEPS, checkpoint={"every": 1000}))
    process = h.start(words, tmp_path)
    h.wait_for_step(folder, 5, process)
    for _ in range(3):  # a key held down, or a shell and its parent both passing it on
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    code, out, err = h.finish(process, 30)
    assert code == 130, (out, err)
    assert "Traceback" not in out + err
    (step,) = h.steps_of(folder)
    assert f"SIGINT: saved step {step}; go on with --resume" in out
    assert h.untimed(folder) == h.untimed(bb_unbroken)[:step]


@pytest.mark.parametrize("look", [1, 2, 3, 6, 7])
def test_a_stop_at_any_moment_loses_no_row(tmp_path, monkeypatch, look):
    """The request comes at each place where the loop looks: before a step, at its end, and in between."""

    class Stop(loop.StopSignal):
        looks = 0

        @property
        def requested(self):
            Stop.looks += 1
            return "SIGTERM" if Stop.looks >= look else None

    monkeypatch.setattr(loop, "StopSignal", Stop)
    folder = tmp_path / "run"
    assert run(h.tiny(folder, checkpoint={"every": 100})) == 0
    (step,) = h.steps_of(folder)
    assert step == look // 2
    assert [row["step"] for row in h.rows(folder)] == list(range(1, step + 1))
