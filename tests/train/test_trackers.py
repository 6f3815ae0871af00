"""wandb and trackio get the same scalars as metrics.jsonl and are closed at the end."""

from __future__ import annotations

import json
import resource
import struct
import sys
from types import ModuleType, SimpleNamespace

import pytest

from jaxattn.errors import ConfigError, UserError
from tests.train.helpers import tiny
from train.metrics import MetricsWriter
from train.pretrain import run


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_every_row(name, tmp_path, monkeypatch):
    calls = []
    tracker = ModuleType(name)
    tracker.init = lambda **call: (
        calls.append(("init", call))
        or SimpleNamespace(
            log=lambda row, step: calls.append(("log", step, row)), finish=lambda: calls.append(("finish",))
        )
    )
    monkeypatch.setitem(sys.modules, name, tracker)
    run(tiny(tmp_path / "run", steps=3, log={"tensorboard": False, name: "study"}))

    (_, init), *rows, last = calls
    assert init["project"] == "study"
    assert init["name"] == "run"
    assert init["config"]["steps"] == 3
    assert last == ("finish",)
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [step for _, step, _ in rows] == [row["step"] for row in written]
    for (_, _, sent), row in zip(rows, written, strict=True):
        assert sent["loss"] == row["loss"]
        assert all(isinstance(value, int | float) for value in sent.values())


class Broken:
    """A tracker whose server is gone, from the n-th call on."""

    def __init__(self, at):
        self.at = at

    def log(self, row, step):
        if step >= self.at:
            raise ConnectionError("server\nis gone" * 1000)

    def finish(self):
        if self.at == 0:
            raise RuntimeError("cannot finish")


@pytest.mark.parametrize(("at", "says"), [(2, "wandb gets no more numbers from step 2 on: ConnectionError"), (0, "")])
def test_a_tracker_that_fails_does_not_fail_the_run(at, says, tmp_path, monkeypatch, caplog):
    tracker = ModuleType("wandb")
    tracker.init = lambda **call: Broken(at)
    if at == 0:  # only its end goes wrong
        monkeypatch.setattr(Broken, "log", lambda *_, **__: None)
        says = "wandb could not be closed in good order: RuntimeError: cannot finish"
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    assert run(tiny(tmp_path / "run", steps=3, log={"tensorboard": False, "wandb": "study"})) == 0
    said = [record.getMessage() for record in caplog.records]
    assert len([text for text in said if says in text]) == 1, said
    assert all(len(text) < 500 and "\n" not in text for text in said)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()) == 3


def test_a_tracker_that_cannot_be_opened_is_one_sentence(tmp_path, monkeypatch):
    tracker = ModuleType("trackio")
    tracker.init = lambda **call: (_ for _ in ()).throw(RuntimeError("no account\nat all"))
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    with pytest.raises(ConfigError, match=r"log.trackio is 'study' but trackio cannot be opened \(no account at all\)"):
        run(tiny(tmp_path / "run", steps=3, log={"tensorboard": False, "trackio": "study"}))


def events(folder):
    """(step, {name: value}) of every event, read by the format's own rules: length, crc, message, crc."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.out.tfevents*")):
        raw, at = path.read_bytes(), 0
        while at < len(raw):
            (size,) = struct.unpack_from("<Q", raw, at)
            event = Event.FromString(raw[at + 12 : at + 12 + size])
            found += [(event.step, {v.tag: v.simple_value for v in event.summary.value})] if event.step else []
            at += size + 16
    return found


def test_tensorboard_has_every_scalar(tmp_path):
    run(tiny(tmp_path / "run", steps=3, log={"tensorboard": True}))
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    found = events(tmp_path / "run" / "tensorboard")
    assert [step for step, _ in found] == [1, 2, 3]
    for (_, values), row in zip(found, written, strict=True):
        assert values["loss"] == pytest.approx(row["loss"])
        assert values.keys() == {k for k, v in row.items() if isinstance(v, int | float) and k != "step"}


def test_tensorboard_on_a_full_disk_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    """tensorboardX's own writer waited for ever there."""
    from tensorboardX.event_file_writer import EventsWriter

    def full(self, event):
        if event.step >= 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(EventsWriter, "write_event", full)
    assert run(tiny(tmp_path / "run", steps=30, log={"tensorboard": True})) == 0
    assert caplog.text.count("TensorBoard gets no more numbers from step 2 on: OSError") == 1


def test_metrics_on_a_full_disk_are_one_sentence(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = MetricsWriter(tmp_path, tiny(tmp_path))
    with pytest.raises(UserError) as caught:
        writer.write({"step": 1, "loss": 1.0})
    said = str(caught.value)
    assert f"{tmp_path / 'metrics.jsonl'} cannot be written (No space left on device, " in said
    assert said.endswith("bytes free): free some space and go on with --resume.")
    writer.close()


def test_a_row_is_written_whole_or_not_at_all(tmp_path):
    """The disk has room for half of the second row."""
    writer = MetricsWriter(tmp_path, tiny(tmp_path))
    writer.write({"step": 1, "loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
    try:
        with pytest.raises(UserError, match="File too large"):
            writer.write({"step": 2, "loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    writer.close()
