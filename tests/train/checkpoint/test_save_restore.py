"""Saving and restoring: equal to the bit, or a sentence that says why not."""

import json
import logging

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import Corrupt, Incomplete, Mismatch, UserError
from jaxattn.runs.checkpoint import Checkpoints
from jaxattn.runs.manifest import diff_config


def open_ck(kit, folder, **options):
    return Checkpoints(folder, config=kit.CONFIG, **options)


def test_restores_every_leaf_and_the_data_position(kit, two_steps):
    data, unbroken = kit.make_data(), kit.make_data()
    next(unbroken), next(unbroken)
    with open_ck(kit, two_steps) as checkpoints:
        restored = checkpoints.restore(kit.abstract(kit.make_state()), data)
    assert (restored.step, restored.skipped) == (2, ())
    kit.assert_same(restored.state, kit.make_state(2))
    for _ in range(40):  # across the end of an epoch
        np.testing.assert_array_equal(next(data), next(unbroken))


def test_data_position_is_that_of_the_save_not_of_the_write(kit, tmp_path):
    data, unbroken = kit.make_data(), kit.make_data()
    with open_ck(kit, tmp_path) as checkpoints:
        checkpoints.save(1, kit.make_state(1), data)
        next(data)  # while the save is being written
    with open_ck(kit, tmp_path) as checkpoints:
        checkpoints.restore(kit.abstract(kit.make_state()), data)
    np.testing.assert_array_equal(next(data), next(unbroken))


def test_donated_and_overwritten_state_is_saved_as_it_was(kit, tmp_path):
    update = jax.jit(lambda x: x * 0 + 7, donate_argnums=0)
    x, host = jnp.arange(1 << 20, dtype=jnp.float32), np.ones(1 << 25, np.int8)
    with open_ck(kit, tmp_path) as checkpoints:
        checkpoints.save(1, {"x": x, "host": host})
        host[:] = -1  # at once, while the save is being written
        update(x).block_until_ready()
        state = checkpoints.restore({"x": jax.ShapeDtypeStruct((1 << 20,), jnp.float32), "host": host}).state
    np.testing.assert_array_equal(state["x"], np.arange(1 << 20))
    assert state["host"].min() == 1


@pytest.mark.parametrize("async_save", [True, False])
def test_keep(kit, tmp_path, async_save):
    with open_ck(kit, tmp_path, keep=2, async_save=async_save) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, {"w": np.ones(3)})
        checkpoints.wait()
        assert checkpoints.steps() == [4, 5]
        assert checkpoints.latest() == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000004", "step_00000005"]


def test_saving_a_step_twice_is_harmless(kit, tmp_path):
    with open_ck(kit, tmp_path) as checkpoints:
        checkpoints.save(1, {"w": np.ones(3)})
        checkpoints.save(1, {"w": np.zeros(3)})
        assert checkpoints.restore({"w": np.empty(3)}).state["w"].tolist() == [1, 1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_going_back_sets_the_left_branch_aside(kit, tmp_path, caplog):
    with open_ck(kit, tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"w": np.full(3, step)})
    with open_ck(kit, tmp_path) as checkpoints:
        checkpoints.restore({"w": np.empty(3, int)}, step=1)
        checkpoints.save(2, {"w": np.full(3, 20)})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.restore({"w": np.empty(3, int)}).state["w"].tolist() == [20] * 3
    assert (tmp_path / "aside-00000003-1").is_dir()
    assert (tmp_path / "aside-00000002-1").is_dir()
    assert "step 3" in caplog.text
    assert "aside-00000003-1" in caplog.text


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_non_finite_values_are_never_committed(kit, tmp_path, value, dtype):
    state = {"fine": jnp.ones(3), "blocks": [{"w": jnp.ones((4, 4), dtype).at[1, 2].set(value)}]}
    with open_ck(kit, tmp_path) as checkpoints:
        checkpoints.save(1, {"w": np.ones(3)})
        with pytest.raises(Corrupt, match="blocks/0/w"):
            checkpoints.save(2, state)
        assert checkpoints.steps() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_sum_that_overflows_is_still_finite(kit, tmp_path):
    with open_ck(kit, tmp_path, allow_nonfinite=["opt/*/best"]) as checkpoints:
        checkpoints.save(1, {"w": np.full(8, 3e38, np.float32), "opt": [{"best": jnp.asarray(jnp.inf)}]})
    assert checkpoints.steps() == [1]


@pytest.mark.parametrize(
    ("leaf", "says"),
    [
        ("a string", "str"),
        (np.zeros((0, 3)), r"shape \[0, 3\]"),
        (jax.random.key(0), "key_data"),
        (2**70, "int"),
    ],
)
def test_leaves_that_cannot_be_saved_are_named(kit, tmp_path, leaf, says):
    with open_ck(kit, tmp_path) as checkpoints, pytest.raises(UserError, match=f"'odd'.*{says}"):
        checkpoints.save(1, {"odd": leaf, "w": np.ones(3)})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- what does not fit (rows 13, 14)


def changed(kit, how):
    target = kit.abstract(kit.make_state())
    embed = target["params"]["embed"]
    if how == "shape":
        target["params"]["embed"] = jax.ShapeDtypeStruct((9, 8), embed.dtype)
    if how == "missing":
        target["params"]["new"] = embed
    if how == "extra":
        del target["params"]["embed"]
    if how == "dtype":
        target["params"]["embed"] = jax.ShapeDtypeStruct((7, 8), jnp.bfloat16)
    if how == "int":
        target["params"]["embed"] = jax.ShapeDtypeStruct((7, 8), jnp.int32)
    return target


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("shape", r"'params/embed'.*\[7, 8\].*\[9, 8\]"),
        ("missing", "'params/new'.*nothing"),
        ("extra", "'params/embed'.*none"),
        ("dtype", "'params/embed'.*float32.*bfloat16.*allow_cast"),
        ("int", "'params/embed'.*float32.*int32"),
    ],
)
def test_a_leaf_that_does_not_fit_is_named(kit, two_steps, how, says):
    data = kit.make_data()
    with open_ck(kit, two_steps) as checkpoints, pytest.raises(Mismatch, match=says):
        checkpoints.restore(changed(kit, how), data)
    np.testing.assert_array_equal(next(data), next(kit.make_data()))  # the iterator was not moved


def test_cast_only_on_request_and_only_between_floats(kit, two_steps):
    with open_ck(kit, two_steps) as checkpoints:
        state = checkpoints.restore(changed(kit, "dtype"), allow_cast=True).state
        with pytest.raises(Mismatch, match="int32"):
            checkpoints.restore(changed(kit, "int"), allow_cast=True)
    wanted = kit.make_state(2)["params"]["embed"].astype(jnp.bfloat16)
    kit.assert_same(state["params"]["embed"], wanted)


def test_a_data_position_that_does_not_fit(kit, two_steps, tmp_path):
    part = grain.MapDataset.range(5).to_iter_dataset()
    other = iter(grain.IterDataset.mix([part, part], weights=[1, 1]))
    with open_ck(kit, two_steps) as checkpoints, pytest.raises(Mismatch, match="data position"):
        checkpoints.restore(kit.abstract(kit.make_state()), other)
    with open_ck(kit, tmp_path / "none") as checkpoints:
        checkpoints.save(1, {"w": np.ones(3)})
        with pytest.raises(Mismatch, match="no data position"):
            checkpoints.restore({"w": np.ones(3)}, kit.make_data())


FIELDS = {"d": 16, "heads": 8, "layers": 3, "mechanism": "softmax", "vocab": 300, "tie": False, "window": 4}
SAVED = {"d": 8, "heads": 4, "layers": 2, "mechanism": "sigmoid", "vocab": 257, "tie": True, "window": None}


@pytest.mark.parametrize("field", FIELDS)
def test_each_changed_field_is_named_with_both_values(tmp_path, field):
    current = {"model": {**SAVED, field: FIELDS[field]}, "betas": (0.9, 0.95)}
    saved = {"model": SAVED, "betas": (0.9, 0.95)}
    line = f"model.{field}: saved {SAVED[field]!r}, now {FIELDS[field]!r}"
    assert diff_config(saved, current) == [line]
    with Checkpoints(tmp_path, config=saved) as checkpoints:
        checkpoints.check_config(current)  # nothing saved, nothing to say
        checkpoints.save(1, {"w": np.ones(3)})
        checkpoints.wait()
        checkpoints.check_config(saved)
        checkpoints.check_config(current, ignore=(f"model.{field}",))
        with pytest.raises(Mismatch) as caught:
            checkpoints.check_config(current, ignore=("mod", "betas"))
    assert line in str(caught.value)


def test_diff_config_sees_added_and_removed_fields():
    assert diff_config({"a": 1, "b": {"c": 1}}, {"b": {"c": 1, "d": True}}) == [
        "a: saved 1, now (absent)",
        "b.d: saved (absent), now True",
    ]
    assert diff_config({"a": 1}, {"a": True}) == ["a: saved 1, now True"]


def test_every_differing_field_is_listed(kit, two_steps):
    with open_ck(kit, two_steps) as checkpoints, pytest.raises(Mismatch) as caught:
        checkpoints.check_config({"model": {"d": 9, "layers": 3, "tie": True}, "attn": "softmax"})
    for field in ("model.d: saved 8, now 9", "model.layers", "attn: saved 'sigmoid'"):
        assert field in str(caught.value)


# ---------------------------------------------------------------------------------- what is not there


def test_nothing_to_restore_is_an_error(kit, tmp_path):
    with open_ck(kit, tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        with pytest.raises(Incomplete, match="no finished checkpoint"):
            checkpoints.restore({"w": np.ones(3)})
        checkpoints.save(1, {"w": np.ones(3)})
        with pytest.raises(Incomplete, match="finished steps are 1"):
            checkpoints.restore({"w": np.ones(3)}, step=7)


def test_a_file_in_place_of_the_folder_is_said_at_the_start(kit, tmp_path):
    (tmp_path / "ck").write_text("a file")
    with pytest.raises(UserError, match="ck cannot hold checkpoints"):
        open_ck(kit, tmp_path / "ck")
    with pytest.raises(UserError, match="cannot hold checkpoints"):
        open_ck(kit, tmp_path / "ck" / "below")
    with pytest.raises(UserError, match="gs://bucket"):
        open_ck(kit, "gs://bucket/ck")
    with pytest.raises(UserError, match="PYTHONUTF8"):
        open_ck(kit, f"{tmp_path}/Zo\udcc3\udcab")


def test_a_folder_that_vanishes_fails_the_save_in_one_sentence(kit, tmp_path):
    folder = tmp_path / "ck"
    with open_ck(kit, folder) as checkpoints:
        folder.rmdir()
        folder.write_text("a file in its place")
        with pytest.raises(UserError, match=r"step 1 in .*ck could not be written"):
            checkpoints.save(1, {"w": np.ones(3)})


def test_read_only_leaves_everything_alone(kit, two_steps):
    (two_steps / "step_00000003.partial").mkdir()
    with open_ck(kit, two_steps, read_only=True) as reader:
        assert reader.restore(kit.abstract(kit.make_state())).step == 2
        with pytest.raises(UserError, match="read-only"):
            reader.save(3, {"w": np.ones(3)})
    assert (two_steps / "step_00000003.partial").is_dir()
    with open_ck(kit, two_steps.parent / "absent", read_only=True) as reader:
        assert reader.steps() == []
    assert not (two_steps.parent / "absent").exists()


def test_leftovers_are_removed_and_others_are_not(kit, two_steps, caplog):
    for name in ("step_00000003.partial", "step_00000003.partial.orbax-checkpoint-tmp", "step_00000004"):
        (two_steps / name).mkdir()
    for name in ("100", "100.orbax-checkpoint-tmp", "notes", "step_1"):  # not ours: other tools, other people
        (two_steps / name).mkdir()
    with caplog.at_level(logging.WARNING, "jaxattn"), open_ck(kit, two_steps) as checkpoints:
        assert checkpoints.steps() == [1, 2]
    names = sorted(path.name for path in two_steps.iterdir())
    assert names == ["100", "100.orbax-checkpoint-tmp", "notes", "step_00000001", "step_00000002", "step_1"]
    assert caplog.text.count("removing") == 3


def test_the_manifest_says_what_made_it(two_steps):
    manifest = json.loads((two_steps / "step_00000002" / "manifest.json").read_text())["manifest"]
    assert manifest["leaves"]["params/embed"]["bytes"] == 7 * 8 * 4
    assert manifest["leaves"]["params/blocks/0/w"]["dtype"] == "bfloat16"
    assert manifest["versions"]["jax"] == jax.__version__
    assert {"format", "step", "config", "config_sha256", "time", "files"} <= set(manifest)
