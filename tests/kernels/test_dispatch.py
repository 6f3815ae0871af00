"""Choosing a backend, what is recorded of it, the support table and tuned block sizes."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from jaxattn.errors import ConfigError
from jaxattn.masks import self_visibility
from pallas_kernels import (
    Score,
    _blocks,
    _support,
    _versions,
    compiling_for,
    flash,
    interpreted,
    may_be_kernel,
    recording,
)
from pallas_kernels._dispatch import resolve
from pallas_kernels.typical_calls import CALLS

HAVE = {"reference": lambda: "reference", "xla": lambda: "xla", "tpu": lambda: "tpu"}


def choose(backend="auto", **unfit):
    with recording() as choices:
        name = resolve("op", backend, HAVE, "xla", unfit)()
    return name, choices["op"][name]


def test_automatic_choice_and_its_reason():
    assert choose() == ("xla", "no kernel for cpu")
    assert choose(tpu="too small.") == ("xla", "no kernel for cpu")
    with compiling_for("tpu"):
        assert choose() == ("tpu", "this is a tpu")
        assert choose(tpu="too small.") == ("xla", "too small.")
    with compiling_for("gpu"):
        assert choose() == ("xla", "no kernel for gpu")


def test_a_named_backend_is_taken_or_refused():
    assert choose("reference") == ("reference", "named")
    assert choose("tpu") == ("tpu", "named")
    with pytest.raises(NotImplementedError, match=r"^op: too small\.$"):
        choose("tpu", tpu="too small.")
    with pytest.raises(NotImplementedError, match="op has no 'gpu' backend; it has reference, xla, tpu"):
        choose("gpu")
    with pytest.raises(ConfigError, match="backend 'cuda' is not known: choose one of auto, reference, xla, gpu, tpu"):
        choose("cuda")


def test_what_is_recorded_ends_with_its_block():
    q = jnp.zeros((1, 4, 1, 8))
    call = lambda: flash(q, q, q, self_visibility(1, 4), Score(), scale=1.0)
    with recording() as outer:
        call()
        with recording() as inner:
            pass
        assert not inner
    call()
    assert outer == {"flash": {"xla": "no kernel for cpu"}}


def test_kernels_are_possible_on_their_platform_and_in_a_simulator():
    assert not may_be_kernel()
    with interpreted():
        assert may_be_kernel()
    with compiling_for("tpu"):
        assert may_be_kernel()


@functools.cache
def supported():
    return pallas_kernels.support()


@pytest.fixture
def entries():
    return supported()


def test_the_support_table_has_every_op_and_every_backend_that_is_there(entries):
    assert {e.op for e in entries} == {name.partition(",")[0] for name in CALLS}
    served = {(e.op, e.backend) for e in entries if e.served}
    for op in {e.op for e in entries}:
        assert {(op, "reference"), (op, "xla")} <= served, "these serve all ops on all machines"
    assert ("flash", "tpu") in served


def test_every_refusal_is_one_sentence_that_names_what_was_asked_for(entries):
    for entry in entries:
        if not entry.served:
            assert entry.reason.startswith(entry.op.split("_")[0]), entry
            assert entry.reason.endswith("."), entry
            assert entry.backend in entry.reason, entry


def test_the_printed_table_numbers_its_reasons(entries, monkeypatch):
    monkeypatch.setattr(_support, "support", lambda: entries)
    text = _support.markdown()
    count = len({e.reason for e in entries if not e.served})
    assert f"\n{count}. " in text or not count
    assert text.count("\n|") == len(entries) // len(_support.BACKENDS) + 1
    assert "tpu: JAX 0.10.2, a TPU; gpu: JAX 0.11.2, a GPU" in text


def test_the_oldest_jax_of_every_backend_is_the_one_that_is_declared_and_tested():
    """By `pyproject.toml` for the package, by `.ci/run` for each backend; README says both."""
    root = Path(__file__).parents[2]
    declared, ci, readme = ((root / name).read_text("utf-8") for name in ("pyproject.toml", ".ci/run", "README.md"))
    oldest = min(_versions.SINCE, key=lambda backend: _versions.SINCE[backend])
    assert f'"jax>={_versions.oldest(oldest)},<' in declared
    assert f"JAX {_versions.oldest(oldest)} to " in readme
    assert f'"jax=={_versions.oldest("gpu")}"' in ci
    assert f"need {_versions.oldest('gpu')} " in readme


@pytest.mark.parametrize(("version", "refused"), [((0, 10, 2), True), ((0, 11, 1), True), ((0, 11, 2), False)])
def test_kernels_for_gpus_are_refused_by_a_jax_that_they_were_not_proved_on(version, refused, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", version)
    reason = _versions.too_old_for_gpus()
    assert (reason is not None) == refused
    if reason:
        assert reason.startswith("backend 'gpu' needs JAX 0.11.2 or newer but this is ")


def test_tuned_blocks_are_those_of_the_next_larger_head_dim(tmp_path, monkeypatch):
    kind = jax.devices()[0].device_kind
    table = {"blocks": {"flash/xla": {"64": {"block_q": 7}, "128": {"block_q": 9, "other": 1}}}}
    (tmp_path / _blocks.table_name(kind)).write_text(json.dumps(table))
    monkeypatch.setattr(_blocks, "FOLDER", tmp_path)
    _blocks._table.cache_clear()
    sizes = lambda dim, op="flash": _blocks.blocks(op, "xla", dim, block_q=1, chunk_k=2)
    assert sizes(60) == {"block_q": 7, "chunk_k": 2}
    assert sizes(96) == {"block_q": 9, "chunk_k": 2}
    assert sizes(129) == sizes(64, "other") == {"block_q": 1, "chunk_k": 2}
    with compiling_for("tpu"):
        assert sizes(60) == {"block_q": 1, "chunk_k": 2}, "no device is asked ahead of time"
    _blocks._table.cache_clear()


def test_names_of_tables():
    assert _blocks.table_name("TPU v5 lite") == "tpu-v5-lite.json"
    assert _blocks.table_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"


def test_committed_tables_hold_sizes_versions_and_timings():
    for path in _blocks.FOLDER.glob("*.json"):
        table = json.loads(path.read_text("utf-8"))
        assert {"blocks", "measured", "seed", "environment"} <= set(table), path.name
        for name, by_dim in table["blocks"].items():
            for dim, sizes in by_dim.items():
                seconds = table["measured"][name][dim]["seconds"]
                assert all(json.dumps(sizes) in found for found in seconds.values()), "chosen among what was measured"
