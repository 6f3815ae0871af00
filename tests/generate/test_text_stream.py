"""Streams of text: in context, no half characters, stop strings by the earliest completion, however tokens come."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer as Inner

from jaxattn.open_tokenizer import byte_tokenizer
from jaxattn.text_stream import TextStream
from jaxattn.tokenizer import Tokenizer
from tests.generate.checkpoints import LLAMA3, byte_bpe, pieces_bpe

SPECIAL = ("<s>", "<|im_end|>", "<|x|>")


@pytest.fixture(scope="module")
def pieces():
    return Tokenizer(Inner.from_str(pieces_bpe()))


@pytest.fixture(scope="module")
def level():
    return Tokenizer(Inner.from_str(byte_bpe(LLAMA3, SPECIAL)))


def streamed(tokenizer, ids, stop=(), prompt=(), block=1):
    """The text, and the stream."""
    out = TextStream(tokenizer, stop, prompt_ids=prompt)
    parts = [out.add(ids[i : i + block]) for i in range(0, len(ids), block)]
    return "".join([*parts, out.add((), last=True)]), out


def ids_of(tokenizer, *parts):
    """Ids of texts and of special tokens, one after the other, and nothing put around them."""
    return [i for part in parts for i in tokenizer.encode(part, add_special_tokens=False)]


def test_new_text_goes_on_from_the_prompt_s(pieces):
    whole = pieces.encode("hello World def foo")
    cut = next(i for i in range(len(whole)) if pieces.decode(whole[:i]) == "hello")
    assert streamed(pieces, whole[cut:], prompt=whole[:cut])[0] == " World def foo"
    assert streamed(pieces, whole[1:], prompt=whole[:1])[0] == "hello World def foo"  # behind <s> alone
    assert streamed(pieces, whole[cut:])[0] == "World def foo"  # nothing before: a text's first blank goes


@pytest.mark.parametrize("name", ["pieces", "level"])
def test_any_tokens_in_any_blocks_are_the_decoded_whole(name, request):
    """Random ids: broken UTF-8, special tokens in the middle of characters, runs of bytes."""
    tokenizer, rng = request.getfixturevalue(name), random.Random(0)
    prompt = tokenizer.encode("The")
    for _ in range(60):
        ids = [rng.randrange(tokenizer.vocab_size if rng.random() < 0.5 else 260) for _ in range(rng.randint(1, 24))]
        ids += ids_of(tokenizer, rng.choice(["", "é🙂東", "end"]))
        want = tokenizer.decode([*prompt, *ids]).removeprefix(tokenizer.decode(prompt))
        for block in (1, 3, 8, 16, 99):
            assert streamed(tokenizer, ids, prompt=prompt, block=block)[0] == want


@pytest.mark.parametrize("name", ["pieces", "level"])
def test_stops_do_not_depend_on_how_tokens_come(name, request):
    tokenizer, rng = request.getfixturevalue(name), random.Random(1)
    special = "<s>" if name == "pieces" else "<|im_end|>"
    text = "def walk(self):\n    return self.path  # é🙂 and more of it"
    stops = [
        (special,),
        ("self", "path"),
        ("path", "lf", "return"),
        (f"x{special}", "🙂"),
        ("é", f"{special} "),
        ("no",),
    ]
    for stop in stops:
        for _ in range(8):
            words = [w for word in text.split(" ") for w in ([word + " "], [word, " ", special])[rng.random() < 0.2]]
            ids = ids_of(tokenizer, *words)
            found = [streamed(tokenizer, ids, stop, block=block) for block in (1, 2, 8, 16, 99)]
            assert len({(text, out.used, out.stopped) for text, out in found}) == 1
            # What it says is true: the stop string is complete with that token, and not before
            full = [tokenizer.decode(ids[:n], skip_special_tokens=False) for n in range(len(ids) + 1)]
            used = next((n for n, t in enumerate(full) if any(s in t for s in stop)), len(ids))
            assert found[0][1].used == used


def letters(text, stop, block=1):
    text, out = streamed(byte_tokenizer(), list(text.encode()), stop, block=block)
    return text, out.used


@pytest.mark.parametrize("block", [1, 2, 16])
@pytest.mark.parametrize(
    ("stop", "want"),
    [
        (["d"], ("abc", 4)),
        (["bcd", "c"], ("ab", 3)),  # the one that is complete first
        (["cd", "abcd", "d"], ("", 4)),  # of those that the same token completes, the one that begins first
        (["de", "cde"], ("ab", 5)),
        (["abcdefgh"], ("", 8)),
        (["hx"], ("abcdefgh", 8)),
        (["", "f"], ("abcde", 6)),
        (["cdx", "bcde"], ("a", 5)),
    ],
)
def test_the_earliest_completion_counts(stop, want, block):
    assert letters("abcdefgh", stop, block) == want


def test_what_comes_after_a_stop_is_ignored():
    out = TextStream(byte_tokenizer(), ["c"])
    assert out.add(list(b"abcd")) == "ab"
    assert (out.stopped, out.used, out.reason) == (True, 3, "stop")
    assert out.add(list(b"efg"), last=True) == ""
    assert out.used == 3


@pytest.mark.parametrize(
    ("stop", "want"),
    [
        ("<|im_end|>", "hello World"),
        ("end|>", "hello World"),
        ("ld<|im_end|>", "hello Wor"),
        ("World<|im_end|> ", "hello "),
        ("<|x|> W", "hello"),
    ],
)
def test_a_special_token_stops_and_is_not_shown(level, stop, want):
    ids = ids_of(level, "hello", "<|x|>", " World", "<|im_end|>", " more")
    assert streamed(level, ids)[0] == "hello World more"
    text, out = streamed(level, ids, [stop])
    used = next(n for n in range(len(ids) + 1) if stop in level.decode(ids[:n], skip_special_tokens=False))
    assert (text, out.used) == (want, used)


def test_a_run_of_bytes_is_held_until_it_ends(pieces):
    """A byte that does not fit makes question marks of the whole run: nothing of it may have been shown."""
    run = [pieces._inner.token_to_id(f"<0x{b:02X}>") for b in "🙂".encode()]
    bad, word = pieces._inner.token_to_id("<0xFF>"), ids_of(pieces, "a")
    out = TextStream(pieces, prompt_ids=ids_of(pieces, "def"))
    assert [out.add([t]) for t in run] == [""] * 4
    assert out.add(word).startswith("🙂")
    assert streamed(pieces, [*run, bad, *word])[0].startswith("\ufffd" * 5)
    assert streamed(pieces, run, prompt=ids_of(pieces, "def"))[0] == "🙂"


def test_a_prompt_s_last_character_is_not_changed_by_bytes_behind_it(pieces):
    prompt = ids_of(pieces, "def 🙂")
    bad = pieces._inner.token_to_id("<0xFF>")
    assert streamed(pieces, [bad, *ids_of(pieces, "a")], prompt=prompt)[0].startswith("\ufffd")
    half = [*ids_of(pieces, "def "), *(pieces._inner.token_to_id(f"<0x{b:02X}>") for b in "é".encode())]
    assert streamed(pieces, half[-1:], prompt=half[:-1])[0] == "é"  # half of it is the prompt's


def test_half_a_character_across_a_special_token(level):
    first, second = (level._inner.token_to_id(c) for c in ("Ã", "©"))
    ids = [*ids_of(level, "caf"), first, *ids_of(level, "<|x|>"), second, *ids_of(level, "!")]
    assert level.decode(ids) == "café!"
    assert streamed(level, ids)[0] == "café!"
    assert streamed(level, ids, ["<|x|>"])[0] in ("caf", "caf\ufffd")


def test_a_long_prompt_costs_no_more_than_a_short_one(level):
    """Only its end is decoded again."""
    prompt = level.encode("hello World " * 5000)
    seen = []
    decode = level.decode
    try:
        level.decode = lambda ids, **more: seen.append(len(list(ids))) or decode(ids, **more)
        out = TextStream(level, prompt_ids=prompt)
        for token in level.encode(" and so on" * 50):
            out.add([token])
    finally:
        del level.decode
    assert max(seen) < 40
