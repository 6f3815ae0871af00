"""Readers: what is read, and the one sentence for each thing that can be wrong (fault rows 23 and 42)."""

import contextlib
import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxattn.errors import DataError
from train.data import files, waiting
from train.data.cache_files import digest, file_digest
from train.data.corpus import Tally
from train.data.open_corpus import open_corpus


def read(source, limit=0, **options):
    tally = Tally(limit)
    return list(open_corpus(str(source), **options).read(tally)), tally.records


def write_parquet(path, columns, **options):
    pq.write_table(pa.table(columns), path, write_page_checksum=True, **options)
    return path


def test_text_files_are_documents(tmp_path):
    for name, text in (("b.txt", "two"), ("a.md", "one — ü"), ("c.py", "three"), ("skipped.csv", "no")):
        (tmp_path / name).write_text(text, "utf-8")
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbffour")
    assert read(tmp_path / "[ab].*")[0] == ["one — ü", "two"]
    assert read(f"{tmp_path}/c.py, {tmp_path}/b.txt")[0] == ["three", "two"]
    assert read(tmp_path / "bom.txt")[0] == ["four"]
    assert read(f"{tmp_path}/b.txt,{tmp_path}/*.txt")[0] == ["two", "four"]


def test_names_with_commas_brackets_spaces_and_accents(tmp_path):
    path = tmp_path / "a, [b] größe.txt"
    path.write_text("x", "utf-8")
    assert read(path)[0] == ["x"]


def test_jsonl_and_parquet(tmp_path, write_jsonl):
    assert read(write_jsonl(["one", "", "zwölf\n"]))[0] == ["one", "", "zwölf\n"]
    path = write_parquet(tmp_path / "x.parquet", {"body": ["a", "b", "c"], "n": [1, 2, 3]}, row_group_size=2)
    assert read(path, text_field="body")[0] == ["a", "b", "c"]


DEEP = b"[" * 200_000
RECORDS = '{"text": "größe"}\n{"text": "two"}\n'


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "x", "\n\n", "  \t\n"])
def test_lines_of_all_kinds(tmp_path, mark, ends, last):
    """A byte order mark, Windows' ends of line, no end of the last line, blank lines in between and behind."""
    path = tmp_path / "a.jsonl"
    text = RECORDS.replace("\n", "\n\n")
    text = text.rstrip("\n") if last == "x" else text + last
    path.write_bytes(mark + text.replace("\n", ends).encode())
    assert read(path)[0] == ["größe", "two"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be", "utf-8-sig"])
def test_what_windows_writes(tmp_path, encoding):
    mark = "" if encoding in ("utf-16", "utf-32", "utf-8-sig") else "\ufeff"
    (tmp_path / "a.txt").write_bytes((mark + "größe 😀").encode(encoding))
    (tmp_path / "a.jsonl").write_bytes((mark + RECORDS.replace("\n", "\r\n")).encode(encoding))
    assert read(tmp_path / "a.txt")[0] == ["größe 😀"]
    assert read(tmp_path / "a.jsonl")[0] == ["größe", "two"]


def test_marks_where_files_were_joined(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n' * 2)
    assert read(path)[0] == ["a", "a"]


def test_the_fingerprint_follows_the_way_of_reading(tmp_path):
    """What was read before keeps its own, for runs go on from it; what was not gets another."""
    path = tmp_path / "a.jsonl"
    path.write_text(RECORDS, "utf-8")
    plain = digest("files", "text", ".jsonl", file_digest(path))
    assert open_corpus(str(path)).fingerprint == plain
    path.write_text(RECORDS, "utf-8-sig")
    assert open_corpus(str(path)).fingerprint != digest("files", "text", ".jsonl", file_digest(path))
    path = tmp_path / "a.txt"
    path.write_text("text", "utf-8-sig")
    assert open_corpus(str(path)).fingerprint == digest("files", "text", ".txt", file_digest(path))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": "x"}\n' + DEEP + b"\n", r"line 2 of file .* it is not JSON \(nested too deep\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ' + DEEP, r"line 2 of file .* it is not JSON \(nested too deep\)"),
        ("a.jsonl", b'{"a":' * 100_000 + b"\n", r"line 1 of file .* it is not JSON \(nested too deep\)"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", r"line 1 of file .* it is not JSON \(Exceeds the limit"),
        ("a.jsonl", b'{"text": "a\0b"}\n', r"line 1 of file .* it is not JSON \(Invalid control character"),
        ("a.jsonl", b'{"text": "x"}\n' + b"\0" * 4096, r"line 2 of file .* it is not JSON"),
        ("a.jsonl", b'{"text": {"a": 1}}\n', r"field 'text' is a dict and not a string"),
        ("a.jsonl", b'"' + b"x" * 100_000 + b'"\n', r"line 1 of file .* it is a JSON str"),
        ("a.jsonl", b'{"' + b"x" * 100_000 + b'": 1}\n', r"it has no field 'text' \(it has 'xxx"),
        ("a.jsonl", b"\xff\xfe{\0}", r"file '.*a.jsonl' is corrupt: byte 4 is not UTF-16"),
        ("a.txt", b"\xff\xfea\0b", r"file '.*a.txt' is corrupt: byte 4 is not UTF-16"),
        ("a.txt", "hello".encode("utf-16-le"), r"NUL byte at 1, .*nor UTF-16 with a byte order mark"),
        ("a.txt", b"ab\0c", r"file '.*a.txt' is corrupt: it holds a NUL byte at 2"),
        ("a.txt", b"ab\xff", r"file '.*a.txt' is corrupt: byte 2 is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"line 2 of file '.*a.jsonl' is corrupt: it is not JSON"),
        ("a.jsonl", b'\n{"body": "x"}\n', r"line 2 of file .* it has no field 'text' \(it has 'body'\)"),
        (
            "a.jsonl",
            b'{"text": "a\\ud83d"}\n',
            r"line 1 of file .* character 1 of field 'text' is half a surr",
        ),
        ("a.jsonl", b"[1]\n", r"line 1 of file .* it is a JSON list and not an object"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1 of file .* field 'text' is a int and not a string"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"line 1 of file .* byte 10 is not UTF-8"),
        ("a.parquet", b"PAR1 nothing", r"file '.*a.parquet' is corrupt: it is not a whole parquet file"),
        ("a.parquet", b"", r"file '.*a.parquet' is corrupt: it is not a whole parquet file"),
    ],
)
def test_corrupt_records_are_named_or_counted(tmp_path, name, content, sentence):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=sentence) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert "--data.max-bad-records" in str(caught.value)
    assert len(str(caught.value)) < 2100
    texts, records = read(path, limit=1)
    assert texts == (["x"] if name == "a.jsonl" and content.startswith(b'{"text": "x"}') else [])
    assert len(records) == 1
    assert str(path) in records[0]


def test_the_record_after_the_limit_stops(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\nbad\nbad\n{"text": "y"}\nbad\n')
    with pytest.raises(DataError, match=r"line 5 of file .* \(number 3\).* at least 3 "):
        read(path, limit=2)
    texts, records = read(path, limit=3)
    assert texts == ["x", "y"]
    assert [r.split(" of ")[0] for r in records] == ["line 2", "line 3", "line 5"]


@contextlib.contextmanager
def traced(most):
    """No more than `most` bytes of Python objects at any moment."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def test_a_long_document_is_one_bad_record(tmp_path, monkeypatch):
    """Whether it is a line, a file or a cell; the line is never held in memory as a whole."""
    monkeypatch.setattr(files, "MOST_BYTES", 100_000)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text": "' + "y" * 5_000_000 + '"}\n{"text": "z"}')
    with pytest.raises(DataError, match=r"line 2 of file .* it has 5,000,013 bytes, at most 100,000 are read: cut it"):
        read(path)
    with traced(2_000_000):
        texts, records = read(path, limit=1)
    assert (texts, len(records)) == (["x", "z"], 1)
    (tmp_path / "a.txt").write_text("y" * 200_000)
    with pytest.raises(DataError, match=r"a.txt' is corrupt: it is one document and has 200,000 bytes, at most"):
        read(tmp_path / "a.txt")
    cells = write_parquet(tmp_path / "a.parquet", {"text": ["x", "y" * 200_000, "z"]})
    assert read(cells, limit=1)[0] == ["x", "z"]
    with pytest.raises(DataError, match=r"row 1 of row group 0 .* a text that has 200,000 bytes"):
        read(cells)


def test_a_large_row_group_is_read_a_few_rows_at_a_time(tmp_path):
    texts = [f"{i} " + "x" * 20_000 for i in range(500)]
    path = write_parquet(tmp_path / "a.parquet", {"text": texts}, row_group_size=500)
    assert read(path)[0] == texts
    with traced(4_000_000):  # of 10 MB
        for _ in open_corpus(str(path)).read(Tally()):
            pass


def test_a_file_that_is_gone_when_its_turn_comes(tmp_path):
    for name in ("a.txt", "b.jsonl", "c.txt"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    corpus = open_corpus(f"{tmp_path}/*.*")
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.jsonl").unlink()
    tally = Tally(2)
    assert list(corpus.read(tally)) == ['{"text": "x"}\n']
    assert all("it cannot be read (No such file or directory)" in record for record in tally.records)
    assert len(tally.records) == 2


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match="is no regular file"):
        read(tmp_path / "a.txt")


def test_long_names_come_back_cut(tmp_path):
    for source in ("x" * 300_000, "/tmp/" + "y" * 300_000 + ".txt", ", " * 100_000, "a\0b.txt", "*\0.txt"):
        with pytest.raises(DataError) as caught:
            read(source)
        assert len(str(caught.value)) < 2100


def test_slow_steps_say_so(capfd, monkeypatch):
    """Also while one item is long in coming; nothing where all goes well."""
    monkeypatch.setattr(waiting, "EVERY", 0.1)

    def items():
        yield from range(3)
        time.sleep(0.35)
        yield 3

    assert list(waiting.progress(items(), "tokenising x")) == [0, 1, 2, 3]
    lines = capfd.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4
    assert lines[0].startswith("tokenising x: 3 so far, 0:00")
    assert list(waiting.progress(range(3), "quick")) == [0, 1, 2]
    with waiting.waiting("quick"):
        pass
    assert capfd.readouterr().err == ""


def test_damaged_parquet(tmp_path):
    path = write_parquet(
        tmp_path / "x.parquet",
        {"text": ["aaaa" * 50, "bbbb" * 50, None]},
        row_group_size=1,
        compression="none",
    )
    with pytest.raises(DataError, match=r"row 0 of row group 2 of file '.*x.parquet' is corrupt: column 'text' is"):
        read(path)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"bbbb") + 20] ^= 1  # one flipped bit, found by the page checksum
    path.write_bytes(raw)
    texts, records = read(path, limit=2)
    assert texts == ["aaaa" * 50]
    assert "row group 1 of file" in records[0]
    path.write_bytes(raw[:-30])
    with pytest.raises(DataError, match=r"file '.*x.parquet' is corrupt: it is not a whole parquet file"):
        read(path)


def test_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"data.source='.*no.txt': the file does not exist"):
        read(tmp_path / "no.txt")
    with pytest.raises(DataError, match="the glob matches no file"):
        read(tmp_path / "*.txt")
    with pytest.raises(DataError, match=r"is a folder: name files, for example"):
        read(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(DataError, match=r"ends in '.bin': only txt, md, py, jsonl or parquet"):
        read(tmp_path / "x.bin")
    path = write_parquet(tmp_path / "x.parquet", {"body": ["a"]})
    with pytest.raises(DataError, match=r"has no column 'text': set --data.text-field to one of body"):
        read(path)
    with pytest.raises(DataError, match="names no file"):
        read(" , ")


def test_empty_corpora(tmp_path, source_of, write_jsonl):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"a.txt' is empty: it has 1 documents and no text"):
        source_of(source=str(tmp_path / "a.txt"))
    with pytest.raises(DataError, match="is empty: it has 0 documents"):
        source_of([])


def test_bad_records_are_in_the_record_of_the_run_and_stay_refused(tmp_path, source_of):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * 30}) + "\n" for _ in range(9)) + "broken\n")
    source = source_of(source=str(path), max_bad_records=1)
    assert len(source.meta["bad_records"]) == 1
    assert source.meta["documents"] == 9
    with pytest.raises(DataError, match="line 10 of file"):  # from the cache as well
        source_of(source=str(path), max_bad_records=0)
    json.dumps(source.meta)


def test_stdlib():
    corpus = open_corpus("stdlib:json,tabnanny")
    texts = list(corpus.read(Tally()))
    assert any("class JSONDecoder" in text for text in texts)
    assert any("tabnanny" in text for text in texts)
    assert len(texts) < 12
    assert not any("site-packages" in str(path) for path in [corpus.name])
    with pytest.raises(DataError, match=r"no Python files for \['nonsense'\]"):
        open_corpus("stdlib:json,nonsense")


def test_hugging_face_folders(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"text": ["one", "two", None]})
    rows.save_to_disk(str(tmp_path / "saved"))
    assert read(f"hf:{tmp_path}/saved", limit=1)[0] == ["one", "two"]
    with pytest.raises(DataError, match=r"row 2 of 'hf:.*saved' is corrupt"):
        read(f"hf:{tmp_path}/saved")
    datasets.DatasetDict({"val": rows}).save_to_disk(str(tmp_path / "dict"))
    assert read(f"hf:{tmp_path}/dict:val", limit=1)[0] == ["one", "two"]
    for missing in (f"hf:{tmp_path}/dict:test", f"hf:{tmp_path}/saved:test", f"hf:{tmp_path}/nothing"):
        with pytest.raises(DataError, match="cannot be loaded"):
            read(missing)
    with pytest.raises(DataError, match=r"no column 'body': set --data.text-field to one of text"):
        read(f"hf:{tmp_path}/saved", text_field="body")


def test_hugging_face_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"run pip install 'jaxattn\[hf\]'"):
        read("hf:anything")


def test_plain_locale_and_odd_paths(tmp_path):
    """LANG=C, umask 077, a path with spaces and accents: the same tokens as always."""
    folder = tmp_path / "mit Leerzeichen — é"
    folder.mkdir()
    (folder / "ü.txt").write_text("größe — " * 40, "utf-8")
    code = (
        "import os, sys; os.umask(0o077); from train.data import DataConfig, make_source\n"
        "s = make_source(DataConfig(source=sys.argv[1], tokenizer='bpe', vocab_size=270, context=8,"
        " batch_size=1, val_fraction=0.5, cache_dir=sys.argv[2]), seed=0)\n"
        "print(s.meta['corpus_hash'], s.held_out(1, 8, perturbed=False).tolist())"
    )
    root = Path(__file__).parents[3]
    results = []
    for language in (
        {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LANG": "C.UTF-8"},
    ):
        env = {k: v for k, v in os.environ.items() if k not in ("LANG", "LC_ALL", "JAXATTN_CACHE")}
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder / "ü.txt"), str(folder / f"cache{len(results)}")],
            env=env | language | {"PYTHONPATH": str(root)},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        results.append(done.stdout)
    assert results[0] == results[1]
