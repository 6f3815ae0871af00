"""Runs that lose their terminal, their workers or their trainer, and stops at inconvenient moments."""

import dataclasses
import os
import signal
import time
from pathlib import Path

import pytest

from evals import sinks
from jaxattn.errors import DataError
from jaxattn.signals import SIGNALS
from scripts.reproduce import _study
from tests.train import helpers as h
from train import loop
from train.data.bb_source import BigramBackcopySource
from train.pretrain import run


def children_of(process):
    """(pid, whether it prepares batches) of the Python processes that a trainer has started."""
    found = []
    for place in Path("/proc").iterdir():
        try:
            parent = int((place / "stat").read_text().rsplit(") ", 1)[1].split()[1])
            words = (place / "cmdline").read_bytes()
        except (OSError, ValueError, IndexError):
            continue
        if parent == process.pid and b"multiprocessing" in words:
            found.append((int(place.name), b"spawn_main" in words))
    return found


def workers_of(process):
    """Pids of everybody a trainer has started, and of one that prepares batches."""
    found = children_of(process)
    return [pid for pid, _ in found], next(pid for pid, worker in found if worker)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False


WORKERS = {"data": h.TINY["data"] | {"workers": 1}, "checkpoint": {"every": 1000}}


def interrupted(process, folder, step):
    """Ctrl-C as a terminal gives it, to every process of the group; the step that was saved."""
    h.wait_for_step(folder, step, process)
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = h.finish(process, 60)
    assert code == 130, (out, err)
    assert "Traceback" not in out + err
    (saved,) = h.steps_of(folder)
    assert saved >= step
    assert f"SIGINT: saved step {saved}; go on with --resume" in out
    return saved


def test_workers_hear_no_ctrl_c_and_do_not_outlive_their_trainer(tmp_path):
    steps, unbroken, folder = 200, tmp_path / "unbroken", tmp_path / "run"
    step = interrupted(h.start(h.flags(h.tiny(folder, steps, **WORKERS)), tmp_path), folder, 10)
    process = h.start(["--resume", f"--run-dir={folder}"], tmp_path)
    h.wait_for_step(folder, step + 10, process)
    everybody, _ = workers_of(process)
    assert len(everybody) >= 2  # a worker and Python's tracker
    process.kill()
    deadline = time.monotonic() + 10
    while any(map(is_running, everybody)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, everybody)), "orphans"
    process.communicate(timeout=10)  # nobody holds its outputs
    assert h.steps_of(folder) == [step]

    assert run(h.tiny(unbroken, steps)) == 0
    assert run(dataclasses.replace(h.read_config(folder), resume=True, run_dir=str(folder))) == 0
    assert h.untimed(folder) == h.untimed(unbroken)
    h.assert_same(h.restore(folder)[1], h.restore(unbroken)[1])


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_workers_that_are_only_starting_hear_no_signal_either(tmp_path, number, delay):
    folder = tmp_path / "run"
    process = h.start(h.flags(h.tiny(folder, 100_000, **WORKERS)), tmp_path)
    while process.poll() is None and not any(worker for _, worker in children_of(process)):
        time.sleep(0.01)
    time.sleep(delay)
    os.killpg(process.pid, number)
    code, out, err = h.finish(process, 60)
    assert code in (loop.STOPPED[number.name], SIGNALS[number]), (out, err)
    assert "Traceback" not in out + err


@pytest.mark.slow
def test_a_killed_worker_costs_no_step(tmp_path):
    folder = tmp_path / "run"
    process = h.start(h.flags(h.tiny(folder, 100_000, **WORKERS)), tmp_path)
    h.wait_for_step(folder, 20, process)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    code, out, err = h.finish(process, 60)
    assert code == 2
    assert "error: a data worker died" in err
    assert "Traceback" not in out + err
    assert h.steps_of(folder)[-1] >= 20


class Gone:
    """An output whose reader leaves after some lines."""

    encoding = "utf-8"

    def __init__(self, lines):
        self.lines = lines

    def write(self, text):
        self.lines -= 1
        if self.lines < 0:
            raise BrokenPipeError(32, "Broken pipe")

    def flush(self):
        pass


def test_a_reader_that_leaves_costs_no_step(tmp_path, monkeypatch, caplog):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", Gone(6))  # print writes a line and its end
        with pytest.raises(BrokenPipeError):
            run(h.tiny(folder, 12, log={"print_every": 1}, checkpoint={"every": 100}))
    (step,) = h.steps_of(folder)
    assert 0 < step < 12
    assert f"saved step {step}; go on with --resume" in caplog.text
    assert [row["step"] for row in h.rows(folder)] == list(range(1, step + 1))


def test_a_stop_where_nothing_was_trained_leaves_the_checkpoint_alone(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    assert run(h.tiny(folder, 4)) == 0
    before = h.snapshot(folder / "checkpoints")
    monkeypatch.setattr(loop.StopSignal, "requested", "SIGINT")
    assert run(h.tiny(folder, 8, resume=True)) == 130
    assert h.snapshot(folder / "checkpoints") == before
    assert h.steps_of(folder) == [4]


def test_a_stop_at_the_last_step_leaves_the_report_to_the_resume(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:

        class Stop(loop.StopSignal):
            @property
            def requested(self):
                return "SIGHUP" if h.steps_of(folder)[-1:] == [4] else None

        patch.setattr(loop, "StopSignal", Stop)
        assert run(h.tiny(folder, 4)) == 129
    assert not (folder / "sinks.json").exists()
    assert run(h.tiny(folder, 4, resume=True)) == 0
    assert (folder / "sinks.json").exists()


def test_a_stop_in_the_middle_of_the_last_measurements(tmp_path, monkeypatch, caplog):
    folder = tmp_path / "run"

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sinks, "write_maps", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(h.tiny(folder, 4))
    assert "step 4 is saved" in caplog.text
    assert h.steps_of(folder) == [4]
    assert run(h.tiny(folder, 4, resume=True)) == 0
    assert (folder / "maps.npz").exists()


def test_a_study_stops_with_the_run_that_was_stopped(tmp_path, monkeypatch):
    """SIGTERM ends a run with 0, but the study must not go on to the next."""
    monkeypatch.setattr(loop.StopSignal, "requested", "SIGTERM")
    with pytest.raises(KeyboardInterrupt):
        _study.train(h.tiny(tmp_path / "run", 4))


def test_data_that_fail_in_the_middle_lose_no_step(tmp_path, monkeypatch):
    class Failing:
        def __init__(self, inner, count):
            self.inner, self.count = inner, count

        def __next__(self):
            if not self.count:
                raise DataError("a data worker died.")
            self.count -= 1
            return next(self.inner)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    folder, unbroken = tmp_path / "run", tmp_path / "unbroken"
    original = BigramBackcopySource.train_iterator
    with monkeypatch.context() as patch:
        patch.setattr(BigramBackcopySource, "train_iterator", lambda self: Failing(original(self), 7))
        patch.setattr(loop.Checkpoints, "save", _with_real_iterator(loop.Checkpoints.save))
        with pytest.raises(DataError, match="a data worker died"):
            run(h.tiny(folder, 12))
    assert h.steps_of(folder) == [4, 7]
    assert run(h.tiny(folder, 12, resume=True)) == 0
    assert run(h.tiny(unbroken, 12)) == 0
    h.assert_same_run(folder, unbroken)


def _with_real_iterator(save):
    return lambda self, step, state, iterator: save(self, step, state, iterator.inner)
