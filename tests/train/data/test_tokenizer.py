"""Tokenizers and the two caches."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import processors

from jaxattn.errors import DataError
from jaxattn.open_tokenizer import byte_tokenizer, load_tokenizer
from jaxattn.tokenizer import END, Tokenizer
from train.data.bpe import sample, train_bpe

TEXT = "größe, naïve — 東京\n\ttab  two spaces 🙂 \0 end"


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([TEXT, "the cat sat on the mat " * 50], 300)


def test_bytes():
    tokenizer = byte_tokenizer()
    assert tokenizer.encode(TEXT) == list(TEXT.encode("utf-8"))
    assert tokenizer.decode(range(256))  # broken UTF-8 decodes to something
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert (tokenizer.vocab_size, tokenizer.eos) == (257, 256)
    assert tokenizer.encode_batch([TEXT, ""]) == [list(TEXT.encode("utf-8")), []]


def test_bpe(bpe):
    assert bpe.vocab_size <= 300
    assert bpe.eos == 0
    for text in (TEXT, "unseen ‡ text", " leading", ""):
        assert bpe.decode(bpe.encode(text)) == text
        assert 0 not in bpe.encode(text)
    assert len(bpe.encode("the cat sat")) < 8
    assert bpe.decode([0, *bpe.encode("x"), 0]) == "x"


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_save_and_load(kind, bpe, tmp_path):
    tokenizer = byte_tokenizer() if kind == "bytes" else bpe
    tokenizer.save(tmp_path / "tokenizer.json")
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        again = load_tokenizer(str(place))
        assert (again.vocab_size, again.eos) == (tokenizer.vocab_size, tokenizer.eos)
        assert again.encode(TEXT) == tokenizer.encode(TEXT)


def test_a_tokenizer_without_an_end_token_adds_none(tmp_path, source_of):
    body = json.loads(byte_tokenizer().to_json())
    body["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    source = source_of(["abc"] * 3, tokenizer=str(tmp_path), val_fraction=0)
    assert source.tokenizer.eos is None
    assert source.meta["train_tokens"] == 9
    batch = next(source.train_iterator())
    assert sorted(set(batch["tokens"][batch["segment_ids"] > 0])) == list(b"abc")


def test_what_is_not_a_tokenizer(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer='/no/such': .* does not exist"):
        load_tokenizer("/no/such")
    for body in ("not json", "{}", '{"model": 3}'):
        (tmp_path / "tokenizer.json").write_text(body)
        with pytest.raises(DataError, match=r"is not a tokenizer.json"):
            load_tokenizer(str(tmp_path))


def test_the_sample_is_spread_over_all_documents():
    parts = list(sample(["a" * 1000, "b" * 3000], corpus_bytes=4000, limit=400))
    assert [(p[0], len(p)) for p in parts] == [("a", 100), ("b", 300)]
    assert list(sample(["abc"], corpus_bytes=3, limit=400)) == ["abc"]


@pytest.fixture
def trained(source_of, cache):
    """A source with a trained BPE, and the files it left in the cache by their kind."""
    source = source_of(["hello world " * 9] * 20, tokenizer="bpe", vocab_size=270)
    files = {p.suffix if p.name.startswith("tokens-") else "bpe": p for p in cache.iterdir()}
    assert set(files) == {"bpe", ".ids", ".offsets", ".json"}
    return source, files


def test_caches_are_used(trained, source_of, monkeypatch):
    first, files = trained
    before = {p: p.stat().st_mtime_ns for p in files.values()}
    monkeypatch.setattr("train.data.bpe.train_bpe", None)
    monkeypatch.setattr("train.data.store._write", None)
    again = source_of(["hello world " * 9] * 20, tokenizer="bpe", vocab_size=270)
    assert {p: p.stat().st_mtime_ns for p in files.values()} == before
    np.testing.assert_array_equal(again.store.ids, first.store.ids)
    assert again.tokenizer.to_json() == first.tokenizer.to_json()
    monkeypatch.undo()
    other = source_of(["hello world " * 9] * 21, tokenizer="bpe", vocab_size=270)
    assert other.meta["data_hash"] != first.meta["data_hash"]


@pytest.mark.parametrize("kind", ["bpe", ".ids", ".offsets", ".json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_corrupt_cache_is_refused_by_name(trained, source_of, kind, damage):
    path = trained[1][kind]
    raw = bytearray(path.read_bytes())
    # The flipped bit lies in the middle; in a .json record it must hit a value that matters.
    at = raw.index(b"ids_sha256") + 20 if kind == ".json" else len(raw) // 2
    raw[at] ^= 1
    path.write_bytes({"flip": raw, "truncate": raw[: len(raw) // 2], "empty": b""}[damage])
    with pytest.raises(DataError, match=r"the cache file '.*' .*delete it") as caught:
        source_of(["hello world " * 9] * 20, tokenizer="bpe", vocab_size=270)
    named = path if kind != ".json" or damage != "flip" else trained[1][".ids"]
    assert named.name in str(caught.value)


def test_a_lost_cache_file_is_named(trained, source_of):
    trained[1][".ids"].unlink()
    with pytest.raises(DataError, match=r"has lost its partner 'tokens-.*\.ids': delete it"):
        source_of(["hello world " * 9] * 20, tokenizer="bpe", vocab_size=270)


def test_an_unwritable_cache(source_of, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache_dir='.*file/x' cannot be created"):
        source_of(cache_dir=str(tmp_path / "file" / "x"))


def test_end_token_name():
    assert byte_tokenizer().to_json().count(END) == 1


def bracketed(folder, around="<s> $A"):
    """A byte tokenizer whose post-processor puts <s> in front, saved with settings of one call in it."""
    body = json.loads(byte_tokenizer().to_json())
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(body))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=around, pair="$A $B", special_tokens=[("<s>", 257), (END, 256)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(str(folder))


@pytest.mark.parametrize("around", ["<s> $A", f"<s> $A {END}"])
def test_documents_begin_with_the_start_token_and_end_once(tmp_path, source_of, around):
    tokenizer = bracketed(tmp_path, around)
    end = [256] * (END in around)
    assert tokenizer.encode("hello") == [257, *b"hello", *end]
    assert tokenizer.encode_batch(["hello"], add_special_tokens=False) == [list(b"hello")]
    source = source_of(["hello", ""], tokenizer=str(tmp_path), val_fraction=0)
    assert source.store.ids.tolist() == [257, *b"hello", 256]
    assert source.store.offsets.tolist() == [0, 7, 7]


def test_tokens_cached_without_a_start_token_are_not_used(tmp_path):
    """The old key was a digest of the tokenizer alone; that of our own tokenizers stays."""
    tokenizer = bracketed(tmp_path)
    assert tokenizer.identity()[0] == tokenizer.to_json()
    assert len(tokenizer.identity()) == 2
    assert byte_tokenizer().identity() == (byte_tokenizer().to_json(),)


def test_sequences_cut_from_a_text_begin_with_the_start_token(tmp_path, source_of):
    """Also those from the middle; the sink study of a model that knows a start token needs it there."""
    bracketed(tmp_path)
    source = source_of(["abcdefghij" * 4] * 4, tokenizer=str(tmp_path), val_fraction=0.5)
    rows = source.held_out(12, 8)
    assert set(rows[:, 0]) == {257}
    assert 257 not in rows[:, 1:]
    assert len({tuple(row) for row in rows}) > 3
    (tmp_path / "text.txt").write_text("0123456789" * 3)
    assert source.encode_text(str(tmp_path / "text.txt"), 3, 8).tolist() == [[257, *b"0123456"]] * 3
    with pytest.raises(DataError, match=r"30 tokens, too few for 3 sequences of 12: .* ask for 2 sequences"):
        source.encode_text(str(tmp_path / "text.txt"), 3, 12)
    plain = source_of(["abcdefghij" * 4] * 4)
    assert plain.encode_text(str(tmp_path / "text.txt"), 3, 8).tolist() == [list(b"01234567")] * 3


@pytest.mark.parametrize("kind", ["bracketed", "bpe"])
def test_a_long_document_in_parts_has_the_same_tokens(tmp_path, source_of, monkeypatch, kind):
    words = "some words of a text, which goes on and on; "
    docs = ["short", words * 30, "", words * 9 + "é", "end"]
    fields = {"tokenizer": kind, "vocab_size": 300}
    if kind == "bracketed":
        bracketed(tmp_path)
        fields = {"tokenizer": str(tmp_path)}
    whole = source_of(docs, val_fraction=0, **fields)
    sizes = []
    parts = Tokenizer.encode_parts

    def small(self, text):
        for part in parts(self, text, size=100):
            sizes.append(len(part))
            yield part

    monkeypatch.setattr("train.data.store.LONG", 300)
    monkeypatch.setattr(Tokenizer, "encode_parts", small)
    cut = source_of(docs, val_fraction=0, cache_dir=str(tmp_path / "other"), **fields)
    np.testing.assert_array_equal(cut.store.ids, whole.store.ids)
    np.testing.assert_array_equal(cut.store.offsets, whole.store.offsets)
    assert cut.store.meta["ids_sha256"] == whole.store.meta["ids_sha256"]
    assert len(sizes) > 12


def test_words_of_a_training_text_are_bounded_and_others_change_nothing(monkeypatch):
    """Learning merges costs the square of a word: a text without blanks is cut for the training alone."""
    text = [TEXT, "the cat sat on the mat, 1234 times; " * 50]
    want = train_bpe(text, 300).to_json()
    monkeypatch.setattr("train.data.bpe.LONGEST_WORD", 99_999)
    assert train_bpe(text, 300).to_json() == want
    monkeypatch.setattr("train.data.bpe.LONGEST_WORD", 4)
    made = train_bpe(["abcdefgh" * 200], 300)
    assert max(map(len, (made.token(i) for i in range(1, made.vocab_size)))) == 4
    assert len(made.encode("abcdefgh" * 4)) < 32
    assert json.loads(made.to_json())["pre_tokenizer"] == json.loads(want)["pre_tokenizer"]


def test_another_file_of_a_tokenizer_s_kind_and_what_hides_in_a_folder(tmp_path):
    byte_tokenizer().save(tmp_path / "own.json")
    assert load_tokenizer(str(tmp_path / "own.json")).encode("a") == [97]
    with pytest.raises(DataError, match=r"data.tokenizer='.*': .* has no tokenizer \(none of"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "own.json").write_text("{}")
    with pytest.raises(DataError, match=r"own.json' is not a tokenizer.json"):
        load_tokenizer(str(tmp_path / "own.json"))
