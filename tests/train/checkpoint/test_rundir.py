"""The run folder and its lock, the small writers, and stop signals."""

import json
import os
import signal
import socket
import time

import pytest

from jaxattn.errors import UserError
from jaxattn.runs.rundir import LOCK, environment, open_run, tidy_jsonl, write_json_atomic
from jaxattn.signals import StopSignal


def make_run(folder):
    with open_run(folder) as run:
        run.config.write_text('{"d": 1}')
        run.metrics.write_text('{"step": 1}\n')
    return folder


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_new_run_then_resume(tmp_path):
    with open_run(tmp_path / "deep" / "run") as run:
        assert not run.resumed
        assert json.loads((run.path / LOCK).read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}
        run.checkpoints.mkdir()
    assert (tmp_path / "deep" / "run" / LOCK).read_text() == ""
    with open_run(str(run.path), resume=True) as run:
        assert run.resumed


@pytest.mark.parametrize("what", ["config.json", "checkpoints"])
def test_a_run_already_there_is_not_touched(tmp_path, what):
    folder = make_run(tmp_path / "run")
    (folder / "config.json").unlink()
    (folder / what).mkdir() if what == "checkpoints" else (folder / what).write_text("{}")
    before = snapshot(folder)
    with (
        pytest.raises(UserError, match=r"run already holds a run.*--resume.*--overwrite.*--run-dir"),
        open_run(folder),
    ):
        pass
    assert snapshot(folder) == before


def test_resume_without_a_run(tmp_path):
    with (
        pytest.raises(UserError, match=r"new holds no run to resume.*--run-dir"),
        open_run(tmp_path / "new", resume=True),
    ):
        pass
    assert not (tmp_path / "new").exists()
    with (
        pytest.raises(UserError, match="exclude each other"),
        open_run(tmp_path / "new", resume=True, overwrite=True),
    ):
        pass


def test_overwrite_moves_the_old_run_aside(tmp_path, caplog):
    folder = make_run(tmp_path / "run")
    before = snapshot(folder)
    for number in (1, 2):
        with open_run(folder, overwrite=True) as run:
            assert not run.resumed
            assert sorted(path.name for path in folder.iterdir()) == [LOCK]
            run.config.write_text("{}")
        assert f"run.old-{number}" in caplog.text
    assert snapshot(tmp_path / "run.old-1") == before
    with open_run(tmp_path / "fresh", overwrite=True):  # nothing to overwrite is no error
        pass


def test_overwrite_leaves_a_folder_alone_that_is_not_ours(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    with (
        pytest.raises(UserError, match="not made by this library"),
        open_run(tmp_path / "model", overwrite=True),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_row_8_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("a file")
    for place in ("run", "run/below"):
        with pytest.raises(UserError, match="cannot be used as the run folder"), open_run(tmp_path / place):
            pass
    assert (tmp_path / "run").read_text() == "a file"


def test_row_8_no_space_at_the_start(tmp_path, monkeypatch):
    def full(fd):  # the few bytes of the lock still fit, the probe does not
        if os.fstat(fd).st_size >= 1 << 16:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"), open_run(tmp_path / "run"):
        pass


# ------------------------------------------------------------------------------------ the lock (row 41)


def test_row_41_second_process_is_refused_and_a_dead_one_is_taken_over(kit, tmp_path, caplog):
    folder = tmp_path / "run"
    first = kit.start("hold", folder)
    assert first.stdout.readline() == "open\n"
    for flags in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError) as caught, open_run(folder, **flags):
            pass
        assert f"in use by process {first.pid} on host {socket.gethostname()}" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    first.kill()
    first.communicate(timeout=60)
    with open_run(folder, resume=True):
        assert f"left by process {first.pid}" in caplog.text
    caplog.clear()
    with open_run(folder, resume=True):
        assert not caplog.text  # the last one left in good order


def test_row_41_two_processes_at_once(kit, tmp_path):
    both = [kit.start("hold", tmp_path / "run") for _ in range(2)]
    lines = sorted(process.stdout.readline() for process in both)
    for process in both:
        process.communicate(timeout=60)
    assert lines[0] == "open\n"
    assert lines[1].startswith("refused: ")


def test_same_process_twice(tmp_path):
    make_run(tmp_path)
    refused = pytest.raises(UserError, match=f"in use by process {os.getpid()}")
    with open_run(tmp_path, resume=True), refused, open_run(tmp_path, resume=True):
        pass


def test_a_lock_of_another_host_is_not_judged(tmp_path):
    make_run(tmp_path)
    (tmp_path / LOCK).write_text('{"pid": 7, "host": "elsewhere"}')
    with (
        pytest.raises(UserError, match=r"process 7 on host elsewhere.*delete .*run.lock"),
        open_run(tmp_path, resume=True),
    ):
        pass


def test_row_42_odd_places(kit, tmp_path):
    folder = tmp_path / "a run of Zoë, 実験 №1"
    process = kit.start("odd_place", folder, env={"LANG": "C", "LC_ALL": "C"}, umask=0o077)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert json.loads(out) == {"equal": True}
    assert (folder / "config.json").stat().st_mode & 0o077 == 0


# ----------------------------------------------------------------------------------------- the helpers


def test_json_is_whole_or_untouched(tmp_path):
    path = tmp_path / "é.json"
    write_json_atomic(path, {"é": [1, 2]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": [1, 2]}
    with pytest.raises(TypeError):
        write_json_atomic(path, {"bad": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": [1, 2]}
    assert [p.name for p in tmp_path.iterdir()] == ["é.json"]


@pytest.mark.parametrize("path", [".", "..", "/"])
def test_json_in_place_of_a_folder_is_an_os_error(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"Errno"):
        write_json_atomic(path, {})
    assert list(tmp_path.iterdir()) == []


def test_metrics_are_cut_back_to_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"note": "start"}, *({"step": step, "loss": 1.0} for step in range(1, 6))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "lo')
    assert tidy_jsonl(path, 3) == 3
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows[:4]
    assert path.read_text().endswith("\n")
    assert tidy_jsonl(path, 3) == 0
    assert tidy_jsonl(tmp_path / "absent.jsonl", 3) == 0


def test_a_last_line_torn_at_its_end_can_be_appended_to(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')  # whole, but without its newline
    assert tidy_jsonl(path, 2) == 0
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_environment_is_json_and_names_the_versions():
    found = json.loads(json.dumps(environment()))
    assert found["versions"]["jax"] != "none"
    assert found["devices"]["count"] >= 1
    assert {"git", "python", "cpus", "platform", "host", "argv", "date"} <= set(found)


# ----------------------------------------------------------------------------------------- stop signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_noted_and_handlers_come_back(number):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with StopSignal() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        assert stop.requested == number.name
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize(
    ("first", "second", "code", "busy"),
    [(signal.SIGTERM, signal.SIGTERM, 143, "idle"), (signal.SIGTERM, signal.SIGINT, 130, "busy")],
)
def test_row_5_second_signal_leaves_at_once(kit, first, second, code, busy):
    process = kit.start("signals", busy)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(first)
    if busy == "idle":
        assert process.stdout.readline() == f"{first.name}\n"
    time.sleep(0.3)
    process.send_signal(second)  # within a second: the same request
    time.sleep(0.9)
    assert process.poll() is None
    process.send_signal(second)
    start = time.monotonic()
    assert process.wait(timeout=30) == code
    assert time.monotonic() - start < 1.0
    process.communicate()
