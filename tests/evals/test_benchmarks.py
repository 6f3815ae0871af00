"""Benchmark documents from a wheel: both formats, limits, and what is broken."""

from __future__ import annotations

import gzip
import json
import zipfile

import pyarrow as pa
import pytest

from evals.benchmarks import read_documents
from jaxattn.errors import Corrupt, UserError

ROWS = [{"q": "日本", "choices": ["a", "b"], "gold": 1}, {"q": "two\nlines", "choices": [], "gold": None}]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    table, path = pa.Table.from_pylist(ROWS), folder / "some-1.0-py3-none-any.whl"
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)
    arrow, lines = (
        (folder / "rows.arrow").read_bytes(),
        gzip.compress("".join(f"{json.dumps(r)}\n" for r in ROWS).encode()),
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/rows.arrow", arrow)
        archive.writestr("a/rows.jsonl.gz", lines)
        archive.writestr("a/half.arrow", arrow[: len(arrow) // 2])
        archive.writestr("a/half.jsonl.gz", lines[:-12])
        archive.writestr("a/text.jsonl.gz", b"no gzip")
        archive.writestr("a/words.jsonl.gz", gzip.compress(b"words\n"))
        archive.writestr("a/flipped.jsonl.gz", lines[:10] + bytes([lines[10] ^ 255]) + lines[11:])
        archive.writestr("a/rows.csv", b"a,b")
    return path


@pytest.mark.parametrize("kind", ["arrow", "jsonl.gz"])
def test_documents_are_read(wheel, kind):
    assert read_documents(wheel, f"a/rows.{kind}") == ROWS
    assert read_documents(wheel, f"a/rows.{kind}", 1) == ROWS[:1]


@pytest.mark.parametrize("name", [
    "half.arrow", "half.jsonl.gz", "text.jsonl.gz", "words.jsonl.gz", "flipped.jsonl.gz", "rows.csv",
])  # fmt: skip
def test_what_is_broken_is_named(wheel, name):
    with pytest.raises(Corrupt, match=f"a/{name}"):
        read_documents(wheel, f"a/{name}")


def test_what_is_not_there_is_named(wheel):
    with pytest.raises(UserError, match=r"has no member 'a/none\.arrow'"):
        read_documents(wheel, "a/none.arrow")
    with pytest.raises(UserError, match=r"nowhere.whl is not there; python -m scripts.get --list"):
        read_documents(wheel.parent / "nowhere.whl", "a/rows.arrow")
