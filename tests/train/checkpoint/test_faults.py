"""Damage on purpose: flipped bits, cut and deleted files, kill -9, a full disk, other devices."""

import json
import logging
import random
import re
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from jaxattn.errors import CheckpointError, Corrupt, Incomplete, Unsupported, UserError
from jaxattn.runs import checkpoint
from jaxattn.runs import manifest as mf
from jaxattn.runs.checkpoint import Checkpoints


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def damage_each_file(two_steps, tmp_path, damage):
    """A fresh copy of the directory for each file of step 2, with that file damaged."""
    names = [path.relative_to(two_steps) for path in files_of(two_steps / "step_00000002")]
    assert len(names) > 8
    for number, name in enumerate(names):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(two_steps, copy)
        if damage(copy / name):
            yield copy, copy / name


def assert_caught(kit, copy, path, caplog, kinds=CheckpointError):
    """The explicit step is refused by name; the automatic one falls back to step 1 and says both."""
    target = kit.abstract(kit.make_state())
    with Checkpoints(copy, config=kit.CONFIG, read_only=True) as checkpoints:
        with pytest.raises(kinds) as caught:
            checkpoints.restore(target, kit.make_data(), step=2)
        assert str(path) in str(caught.value)
        data, expected = kit.make_data(), kit.make_data()
        caplog.clear()
        restored = checkpoints.restore(target, data)
        steps = checkpoints.steps()
    assert restored.step == 1
    kit.assert_same(restored.state, kit.make_state(1))
    next(expected)
    np.testing.assert_array_equal(next(data), next(expected))
    if path.name == mf.NAME and not path.exists():  # a step without a manifest is not there at all
        assert (steps, restored.skipped) == ([1], ())
    else:
        assert [step for step, _ in restored.skipped] == [2]
        assert str(path) in restored.skipped[0][1]
        assert "skipped step 2 and restored step 1" in caplog.text
        assert str(path) in caplog.text


def test_row_9_one_flipped_bit_in_each_file(kit, two_steps, tmp_path, caplog):
    rng = random.Random(9)
    found = 0

    def damage(path):
        if path.stat().st_size:
            flip(path, rng)
            return True
        return False

    for copy, path in damage_each_file(two_steps, tmp_path, damage):
        assert_caught(kit, copy, path, caplog, Corrupt)
        found += 1
    assert found > 8


def test_row_9_every_bit_of_a_manifest(two_steps):
    """No flip of the manifest goes unseen: it is refused, or it means the very same."""
    folder = two_steps / "step_00000001"
    content = (folder / mf.NAME).read_bytes()
    sound = mf.read(folder)
    rng = random.Random(10)
    for position in rng.sample(range(len(content)), 600):
        changed = bytearray(content)
        changed[position] ^= 1 << rng.randrange(8)
        (folder / mf.NAME).write_bytes(changed)
        try:
            assert mf.read(folder) == sound
        except Corrupt:
            continue


@pytest.mark.parametrize("part", [0.5, 0.0])
def test_row_10_each_file_cut(kit, two_steps, tmp_path, caplog, part):
    def damage(path):
        size = path.stat().st_size
        path.write_bytes(path.read_bytes()[: int(size * part)])
        return size > 0

    for copy, path in damage_each_file(two_steps, tmp_path, damage):
        assert_caught(kit, copy, path, caplog, (Incomplete, Corrupt))


def test_row_11_each_file_deleted(kit, two_steps, tmp_path, caplog):
    def damage(path):
        path.unlink()
        return True

    for copy, path in damage_each_file(two_steps, tmp_path, damage):
        assert_caught(kit, copy, path, caplog, Incomplete)


def test_junk_beside_the_files_is_harmless(kit, two_steps):
    for place in ("junk", "state/junk", "state/d/junk", "data/junk.json"):
        (two_steps / "step_00000002" / place).write_bytes(b"junk")
    with Checkpoints(two_steps, config=kit.CONFIG) as checkpoints:
        restored = checkpoints.restore(kit.abstract(kit.make_state()), kit.make_data())
    assert restored.step == 2
    kit.assert_same(restored.state, kit.make_state(2))


def test_arrays_are_checked_besides_the_files(kit, tmp_path, monkeypatch):
    """A wrong array behind right files (a fault of the writer) is found and named."""
    state, data = {"w": np.arange(6.0), "v": np.ones(2)}, kit.make_data()
    with Checkpoints(tmp_path, config=kit.CONFIG) as checkpoints:
        checkpoints.save(1, state, data)
        checkpoints.wait()
        next(data)
        real = mf.describe_all
        monkeypatch.setattr(mf, "describe_all", lambda leaves: real({**leaves, "w": leaves["w"] + 1}))
        checkpoints.save(2, state, data)
        checkpoints.wait()
        monkeypatch.undo()
        fresh = kit.make_data()
        with pytest.raises(Corrupt, match="tensor 'w'"):
            checkpoints.restore(state, fresh, step=2)
        np.testing.assert_array_equal(next(fresh), next(kit.make_data()))  # the iterator was not moved
        assert checkpoints.restore(state, data).step == 1
    np.testing.assert_array_equal(next(data), next(kit.make_data()))


def test_row_12_all_steps_corrupt(kit, two_steps):
    rng = random.Random(12)
    for step in (1, 2):
        largest = max(files_of(two_steps / f"step_0000000{step}"), key=lambda path: path.stat().st_size)
        flip(largest, rng)
    data = kit.make_data()
    with Checkpoints(two_steps, config=kit.CONFIG) as checkpoints:
        with pytest.raises(Corrupt) as caught:
            checkpoints.restore(kit.abstract(kit.make_state()), data)
        assert "step 2: " in str(caught.value)
        assert "step 1: " in str(caught.value)
        assert checkpoints.steps() == [1, 2]  # the evidence stays
    np.testing.assert_array_equal(next(data), next(kit.make_data()))


def test_a_skipped_step_is_replaced_when_training_comes_to_it_again(kit, two_steps, caplog):
    flip(two_steps / "step_00000002" / "state" / "_METADATA", random.Random(1))
    target = kit.abstract(kit.make_state())
    with Checkpoints(two_steps, config=kit.CONFIG) as checkpoints:
        assert checkpoints.restore(target).step == 1
        checkpoints.save(2, kit.make_state(2))
        checkpoints.wait()
        restored = checkpoints.restore(target)
    assert (restored.step, restored.skipped) == (2, ())


def test_a_step_damaged_after_its_save_can_be_saved_again(kit, tmp_path):
    with Checkpoints(tmp_path, config=kit.CONFIG) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"w": np.full(3, step)})
        checkpoints.wait()
        flip(tmp_path / "step_00000002" / "state" / "_METADATA", random.Random(1))
        assert checkpoints.restore({"w": np.empty(3, int)}).step == 1
        checkpoints.save(2, {"w": np.full(3, 20)})
        assert checkpoints.restore({"w": np.empty(3, int)}).state["w"].tolist() == [20] * 3


def test_a_newer_format_is_not_taken_for_damage(kit, two_steps, monkeypatch):
    monkeypatch.setattr(mf, "FORMAT", 2)
    with Checkpoints(two_steps, config=kit.CONFIG) as checkpoints:
        checkpoints.save(3, kit.make_state(3))
        checkpoints.wait()
        monkeypatch.undo()
        with pytest.raises(Unsupported, match="has format 2"):
            checkpoints.restore(kit.abstract(kit.make_state()))


# ------------------------------------------------------------------------------- kill -9 (rows 2 and 3)


def assert_step_1_only(kit, folder, caplog):
    with caplog.at_level(logging.WARNING, "jaxattn"), Checkpoints(folder, config={}) as checkpoints:
        assert checkpoints.steps() == [1]
        state = checkpoints.restore({"w": np.empty((64, 64), np.float32)}).state
    np.testing.assert_array_equal(state["w"], np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32))
    assert [path.name for path in folder.iterdir()] == ["step_00000001"]


def test_row_2_kill_at_any_moment_of_a_save(kit, tmp_path, caplog):
    """Killed a while after the temporary directory appears."""
    delays = (0.0, 0.03, 0.1)
    interrupted = 0
    for number, delay in enumerate(delays):
        folder = tmp_path / str(number)
        worker = kit.start("killed", folder)
        assert worker.stdout.readline() == "saving\n"
        deadline = time.monotonic() + 60
        while not list(folder.glob("step_00000002*")) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(delay)
        worker.kill()
        out, _ = worker.communicate(timeout=60)
        if (folder / "step_00000002" / mf.NAME).exists():  # the machine was faster than the delay
            with Checkpoints(folder, config={}) as checkpoints:
                checkpoints.restore({f"w{i}": np.empty(1 << 23, np.uint8) for i in range(8)}, step=2)
        else:
            interrupted += any(path.name != "step_00000001" for path in folder.iterdir())
            assert "saved" not in out
            assert_step_1_only(kit, folder, caplog)
        shutil.rmtree(folder)
    assert interrupted >= 2, "too few kills landed inside a save: make the arrays larger"


@pytest.mark.parametrize(("point", "left"), [("data", "tmp"), ("manifest", "partial")])
def test_row_3_kill_before_the_manifest(kit, tmp_path, caplog, point, left):
    with Checkpoints(tmp_path, config={}) as checkpoints:
        checkpoints.save(1, {"w": np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)})
    code, out = kit.run("crash", tmp_path, env={"JAXATTN_CRASH_AT": point})
    assert code == -signal.SIGKILL
    assert out == "saving\n"
    assert any(left in path.name for path in tmp_path.iterdir())
    assert_step_1_only(kit, tmp_path, caplog)
    assert "removing" in caplog.text


def test_row_7_no_room(kit, tmp_path):
    """No file may grow over 1 MB. The sentence stands alone: no traceback of the library that writes."""
    worker = kit.start("full", tmp_path, stderr=subprocess.PIPE)
    out, err = worker.communicate(timeout=120)
    assert (worker.returncode, err) == (0, "")
    result = json.loads(out)
    assert result["message"].startswith("no room for the checkpoint of step 2 in")
    assert str(tmp_path) in result["message"]
    assert f"({4 << 20:,} of them arrays)" in result["message"]
    assert "a limit of the file size" in result["message"]
    assert result["left"] == ["step_00000001"]
    assert result["steps"] == [1, 3]


@pytest.mark.parametrize("shape", [(1,), (1000,), (1 << 20,)])
@pytest.mark.parametrize("count", [1, 30])
def test_row_7_what_a_step_needs_is_known_before(kit, tmp_path, monkeypatch, shape, count):
    """The numbers are true: with that many bytes free there is room, with one fewer it says so and begins nothing."""
    state = {f"w{i}": np.ones(shape, np.uint8) for i in range(count)}
    with Checkpoints(tmp_path, config=kit.CONFIG) as checkpoints:
        monkeypatch.setattr(checkpoint, "free_bytes", lambda path: 0)
        with pytest.raises(UserError) as caught:
            checkpoints.save(1, state)
        assert list(tmp_path.iterdir()) == []
        needed = int(re.search(r"needs about ([0-9,]+) bytes", str(caught.value))[1].replace(",", ""))
        assert f"({count * shape[0]:,} of them arrays) and 0 were free" in str(caught.value)
        monkeypatch.setattr(checkpoint, "free_bytes", lambda path: needed - 1)
        with pytest.raises(UserError, match=f"and {needed - 1:,} were free; free some space"):
            checkpoints.save(1, state)
        monkeypatch.setattr(checkpoint, "free_bytes", lambda path: needed)
        checkpoints.save(1, state)
        checkpoints.wait()
    taken = sum(path.stat().st_blocks * 512 for path in (tmp_path / "step_00000001").rglob("*"))
    assert 0.3 * needed < taken <= needed


def test_a_failed_save_is_known_at_the_next_step(kit, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    with Checkpoints(tmp_path, config=kit.CONFIG) as checkpoints:
        monkeypatch.setattr(mf, "write", fail)
        checkpoints.poll()
        checkpoints.save(1, {"w": np.ones(3)})
        while checkpoints._thread.is_alive():
            time.sleep(0.01)
        with pytest.raises(UserError, match="no room for the checkpoint of step 1"):
            checkpoints.poll()
        checkpoints.poll()  # said once
        assert checkpoints.steps() == []


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.pop("leaves"),
        lambda body: body.update(leaves=[1]),
        lambda body: body.update(files={"a": 3}),
        lambda body: body.update(files={"../../outside": {"bytes": 1, "sha256": ""}}),
        lambda body: body.update(files={"state": {"bytes": -1, "sha256": ""}}),
        lambda body: body.update(step="2"),
        lambda body: body.update(step=True),
        lambda body: body.update(config=None),
        lambda body: body["leaves"].update(w={"dtype": "object", "shape": [1], "bytes": 8, "sha256": ""}),
        lambda body: body["leaves"].update(w={"dtype": "float32", "shape": ["many"], "bytes": 8, "sha256": ""}),
        lambda body: body.pop("versions") and body.update(format=7),
    ],
)
def test_a_manifest_that_was_made_up_is_damage(two_steps, change):
    """Its digest is right; what it says is not."""
    path = two_steps / "step_00000002" / mf.NAME
    body = json.loads(path.read_text())["manifest"]
    change(body)
    path.write_text(json.dumps({"sha256": mf._canonical(body), "manifest": body}))
    with pytest.raises(Corrupt, match="no manifest"):
        mf.read(path.parent)


def test_a_manifest_of_brackets(two_steps):
    (two_steps / "step_00000002" / mf.NAME).write_text("[" * 200_000)
    with pytest.raises(Corrupt, match="nested too deep"):
        mf.read(two_steps / "step_00000002")


def test_row_15_other_device_counts(kit, tmp_path):
    one, two = (np.random.default_rng(i).standard_normal((64, 64)).astype(np.float32) for i in (1, 2))
    with Checkpoints(tmp_path, config={}) as checkpoints:
        checkpoints.save(1, {"w": jax.device_put(one), "b": jax.device_put(two)})
    code, out = kit.run("devices", tmp_path, env={"XLA_FLAGS": "--xla_force_host_platform_device_count=2"})
    assert code == 0
    assert json.loads(out) == {"equal": True, "shards": ["(32, 64)", "(32, 64)"], "kept": True}
    with Checkpoints(tmp_path, config={}) as checkpoints:
        target = {"w": jax.ShapeDtypeStruct((64, 64), np.float32), "b": two}
        restored = checkpoints.restore(target)
    assert restored.step == 2
    np.testing.assert_array_equal(restored.state["w"], one)
    np.testing.assert_array_equal(restored.state["b"], two)
