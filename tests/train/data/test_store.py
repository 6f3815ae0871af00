"""The cache of tokens: made-up records and files, a full disk."""

import hashlib
import json

import numpy as np
import pytest

from jaxattn.errors import DataError
from train.data import cache_files as cache_module
from train.data import store as store_module


@pytest.fixture
def record(source_of, cache):
    """The record of a tokenised corpus of bytes (vocabulary 257), as a dict to change, and how to put it back."""
    source_of(["hello world " * 9] * 20)
    (path,) = cache.glob("tokens-*.json")
    meta = json.loads(path.read_text())

    def put(*, ids=None, offsets=None, raw=None, **changes):
        """Write it with changes; its checksums are those of what lies beside it."""
        for suffix, array in ((".ids", ids), (".offsets", offsets)):
            if array is not None:
                path.with_suffix(suffix).write_bytes(array.tobytes())
                meta[f"{suffix[1:]}_sha256"] = hashlib.sha256(array.tobytes()).hexdigest()
        path.write_text(json.dumps(meta | changes) if raw is None else raw)
        return source_of(["hello world " * 9] * 20)

    put.path = path
    put.ids = np.fromfile(path.with_suffix(".ids"), np.uint16)
    put.offsets = np.fromfile(path.with_suffix(".offsets"), "<i8")
    return put


def test_as_it_was_it_is_read(record):
    assert record(ids=record.ids, offsets=record.offsets).meta["documents"] == 20


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float64"},
        {"dtype": "O"},
        {"dtype": None},
        {"dtype": ["uint16"]},
        {"dtype": "uint32"},  # half as many tokens as the borders say
        {"documents": 19},
        {"documents": "many"},
        {"bad_records": 3},
        {"bad_records": [3]},
        {"ids_sha256": None},
        {"raw": "[" * 200_000},
        {"raw": "null"},
        {"raw": "{}"},
    ],
)
def test_a_made_up_record(record, changes):
    with pytest.raises(DataError, match=r"the cache file '.*' .*delete it") as caught:
        record(**changes)
    assert record.path.with_suffix("").name in str(caught.value)


@pytest.mark.parametrize("token", [257, 65_535])
def test_a_token_that_the_vocabulary_does_not_have(record, token):
    ids = record.ids.copy()
    ids[100] = token
    with pytest.raises(DataError, match=f"speaks of token {token}, of a vocabulary of 257: delete it"):
        record(ids=ids)


@pytest.mark.parametrize("how", ["decreasing", "negative", "beyond", "late"])
def test_borders_that_are_none(record, how):
    offsets = record.offsets.copy()
    if how == "decreasing":
        offsets[3], offsets[4] = offsets[4], offsets[3]
    else:
        at, value = {"negative": (0, -5), "beyond": (-1, offsets[-1] + 1), "late": (0, 1)}[how]
        offsets[at] = value
    with pytest.raises(DataError, match="does not fit its partners: delete it"):
        record(offsets=offsets)


@pytest.mark.parametrize("fails", [".ids", ".offsets", ".json"])
def test_a_full_disk_leaves_nothing_behind(source_of, cache, monkeypatch, fails):
    real = cache_module.os.fsync

    def full(handle):
        name = cache_module.os.readlink(f"/proc/self/fd/{handle}")
        if fails in name:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(cache_module.os, "fsync", full)
    with pytest.raises(DataError, match=rf"{fails}' cannot be written \(No space left on device, [0-9,]+ bytes free\)"):
        source_of(["hello world " * 9] * 20)
    assert list(cache.iterdir()) == []
    monkeypatch.undo()
    assert source_of(["hello world " * 9] * 20).meta["documents"] == 20


def test_a_stop_in_the_middle_leaves_nothing_behind(source_of, cache, monkeypatch):
    monkeypatch.setattr(store_module.Tally, "bad", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    bad = cache.parent / "bad.jsonl"
    bad.write_text('{"text": "x"}\nbroken\n')
    with pytest.raises(KeyboardInterrupt):
        source_of(source=str(bad))
    assert list(cache.iterdir()) == []
