"""Tokenizer files of HuggingFace folders, alone and in conflict, against transformers' AutoTokenizer."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import subprocess
import sys

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

from jaxattn import hf_tokenizer, rust
from jaxattn.errors import UserError
from jaxattn.split_regex import KNOWN, QUIET
from jaxattn.tokenizer import Tokenizer as Tokenized
from jaxattn.tokenizer import check_text, read_tokenizer
from tests.generate.checkpoints import LLAMA3, QWEN2, byte_bpe, pieces_bpe

pytest.importorskip("torch", reason="transformers is the oracle")
SPECIAL = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXTS = (
    "", "hello world", "  two  blanks ", "<s>hello</s> <tool> x<tool>y", "<|im_start|>user\nhi <|im_end|>",
    "naïve cafe\u0301 東京 🙂🙂", "don't\n\n\n  stop!  \t1234 a.b",
    "<|new|><|x|><img><pad><sep><|y|><|z|><|q|><think>a", "xqz\u0000 é ▁ a", "Hello , world . it 's ' ok ' n't",
)  # fmt: skip


def oracle(folder):
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001  whatever it raises
        return error


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
    return folder


def raw_of(kind):
    return json.loads(pieces_bpe() if kind == "pieces" else byte_bpe({"llama3": LLAMA3, "qwen2": QWEN2}[kind], SPECIAL))


def template(rng):
    names = {name: {"id": name, "ids": [i], "tokens": [name]} for i, name in ((1, "<s>"), (2, "</s>"))}
    one, text = (lambda name: {"SpecialToken": {"id": name, "type_id": 0}}), {"Sequence": {"id": "A", "type_id": 0}}
    single = [one("<s>"), text, *([one("</s>")] if rng.random() < 0.3 else [])]
    pair = [text, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": names}


def variant(seed):
    """A folder's files: every key that transformers reads may be there, at whatever place, alone or against another."""
    rng = random.Random(seed)
    some = lambda share: rng.random() < share
    raw, files, config = raw_of(rng.choice(["pieces", "llama3", "qwen2"])), {}, {}
    merges = raw["model"]["merges"]
    if some(0.4):
        raw["post_processor"] = template(rng)
    if some(0.2):
        raw["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    if some(0.2):
        raw["padding"] = {"strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
        raw["padding"] |= {"pad_type_id": 0, "pad_token": "<unk>"}
    if some(0.2):
        raw["model"]["ignore_merges"] = True
    if some(0.2):
        merges = raw["model"]["merges"] = merges[: len(merges) // 2]
    if some(0.3):
        raw["model"]["merges"] = [" ".join(m) for m in merges]
    if some(0.1):
        raw["added_tokens"] = []
    next_id = max([*raw["model"]["vocab"].values(), *(t["id"] for t in raw["added_tokens"])]) + 1
    flags = lambda: {key: some(0.3) for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    if some(0.4):
        raw["added_tokens"].append({"id": next_id, "content": "<tool>", **flags()})
    if (family := rng.choice(["llama", "llama", "mistral", "qwen2", "qwen3", None])) is not None:
        files["config.json"] = {"model_type": family}
        if some(0.1):
            files["config.json"]["tokenizer_class"] = rng.choice(["LlamaTokenizer", "GPT2Tokenizer"])
    if some(0.75):
        files["tokenizer.json"] = raw
    else:
        files["vocab.json"] = raw["model"]["vocab"]
        files["merges.txt"] = "#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in merges)
    token = lambda text: {"__type": "AddedToken", "content": text, **flags()} if some(0.5) else text
    named = [("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"), ("pad_token", "<pad>")]
    if some(0.8):
        classes = ["LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizer", "TokenizersBackend"]
        if some(0.8):
            config["tokenizer_class"] = rng.choice([*classes, *(f"{name}Fast" for name in classes[:4])])
        for key, text in (*named, ("eos_token", "<|im_end|>"), ("eot_token", "<|im_end|>"), ("sep_token", "<sep>")):
            if some(0.35):
                config[key] = token(text) if some(0.9) else None
        for key in ("bos_token", "eos_token", "prefix_space"):
            if some(0.2):
                config[f"add_{key}"] = some(0.5)
        for key in ("legacy", "split_special_tokens", "clean_up_tokenization_spaces"):
            if some(0.2):
                config[key] = some(0.5)
        if some(0.3):
            config["additional_special_tokens"] = [token("<|im_start|>"), "<|new|>"]
        if some(0.2):
            config["extra_special_tokens"] = rng.choice([["<|x|>"], {"image_token": "<img>"}, []])
        if some(0.3):
            known = [*enumerate(SPECIAL[:3]), (next_id, "<tool>"), (next_id + 1, "<think>")]
            config["added_tokens_decoder"] = {str(i): {"content": t, **flags()} for i, t in known if some(0.7)}
        files["tokenizer_config.json"] = config
    if some(0.3):
        map_ = {key: rng.choice([text, {"content": text, **flags()}]) for key, text in named if some(0.5)}
        if some(0.4):
            map_["additional_special_tokens"] = ["<|im_end|>", "<|y|>"]
        if some(0.1):
            map_["extra_special_tokens"] = ["<|z|>"]
        files["special_tokens_map.json"] = map_
    if some(0.2):
        files["added_tokens.json"] = {"<tool>": next_id, "<|q|>": next_id + 1}
    return files


def assert_alike(theirs, ours):
    for text in TEXTS:
        for around in (True, False):
            assert ours.encode(text, add_special_tokens=around) == theirs(text, add_special_tokens=around)["input_ids"]
        ids = ours.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]
    assert ours.named == theirs.special_tokens_map
    assert ours.bos == theirs.bos_token_id
    assert theirs.eos_token_id in (None, ours.eos)
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1


@pytest.mark.parametrize("part", range(4))
def test_a_folder_s_files_are_read_as_autotokenizer_reads_them(part, tmp_path):
    alike = 0
    for seed in range(part * 40, part * 40 + 40):
        folder = write(tmp_path / str(seed), variant(seed))
        theirs = oracle(folder)
        # Of vocab.json transformers makes a LlamaTokenizer of three tokens and what else is named
        if isinstance(theirs, Exception) or len(theirs) < 20:
            with pytest.raises(UserError):
                read_tokenizer(folder)
            continue
        ours = read_tokenizer(folder)
        assert_alike(theirs, ours)
        alike += 1
    assert alike > 20


# ------------------------------------------------------------------------------------------------ one by one


def plain(folder, **more):
    return write(folder, {"tokenizer.json": raw_of("qwen2") | more})


def test_vocabulary_and_merges_without_a_tokenizer_json(tmp_path):
    raw = raw_of("qwen2")["model"]
    files = {"config.json": {"model_type": "qwen2"}, "vocab.json": raw["vocab"]}
    files["merges.txt"] = "#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in raw["merges"])
    write(tmp_path, files)
    ids = read_tokenizer(tmp_path).encode("hello world")
    assert ids == oracle(tmp_path)("hello world")["input_ids"]
    assert len(ids) < 8
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"vocab.json but neither merges.txt nor tokenizer.json"):
        read_tokenizer(tmp_path)


def test_settings_of_one_call_are_not_obeyed(tmp_path):
    """Truncation, padding, and merges left out by chance, which transformers' own reading would leave to chance."""
    inner = Tokenizer.from_str(byte_bpe(QWEN2, SPECIAL))
    want = inner.encode("hello world, " * 9).ids
    inner.enable_truncation(6)
    inner.enable_padding(length=50)
    inner.model.dropout = 0.9
    inner.save(str(tmp_path / "tokenizer.json"))
    ours = read_tokenizer(tmp_path)
    assert ours.encode("hello world, " * 9) == want
    assert ours.encode_batch(["hello world, " * 9, ""]) == [want, []]
    assert '"truncation": null' in json.dumps(json.loads(ours.to_json()))


def test_a_start_token_named_in_special_tokens_map_alone(tmp_path):
    plain(tmp_path)
    write(tmp_path, {"special_tokens_map.json": {"bos_token": "<s>"}, "tokenizer_config.json": {}})
    assert read_tokenizer(tmp_path).named == {"bos_token": "<s>"} == oracle(tmp_path).special_tokens_map
    write(tmp_path, {"tokenizer_config.json": {"added_tokens_decoder": {}}})  # which shuts the other file out
    assert read_tokenizer(tmp_path).named == {} == oracle(tmp_path).special_tokens_map


def test_nothing_to_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer \(none of tokenizer.json, vocab.json"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("missing", ["transformers", "sentencepiece", "google.protobuf"])
def test_what_a_sentencepiece_model_needs_is_named(tmp_path, monkeypatch, missing):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    monkeypatch.setattr(hf_tokenizer, "_installed", lambda name: name != missing)
    name = missing.removeprefix("google.")
    with pytest.raises(UserError, match=rf"tokenizer.model\) is read with {name}: pip install {name}\.$"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GemmaTokenizer", None])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_sentencepiece_model_is_read_as_transformers_reads_it(tmp_path, family, kind):
    sentencepiece = pytest.importorskip("sentencepiece", reason="extra `test`")
    from tests.generate.checkpoints import corpus

    lines = [line for text in corpus() for line in text.splitlines() if line.strip()][:3000]
    (tmp_path / "corpus.txt").write_text("\n".join(lines), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=500,
        model_type="bpe", byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    files = {"config.json": {"model_type": family}}
    files["tokenizer_config.json"] = {"add_bos_token": True, **({} if kind is None else {"tokenizer_class": kind})}
    assert_alike(oracle(write(tmp_path, files)), read_tokenizer(tmp_path))


MERGES = '{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b", %s]}}'
BAD_MERGES = ['"a b c"', '"ab"', '["a", 1]', '["a"]', '["a", "b", "c"]', "7", "null"]
BROKEN = {
    "tokenizer.json": [
        "[1]", "{", '{"model": 3}', '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [1, 2]}}', "[" * 200_000,
    ],
    "tokenizer_config.json": [
        {"bos_token": {}}, {"bos_token": 5}, {"eos_token": ["</s>"]}, {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"x": {"content": "a"}}}, {"added_tokens_decoder": {"0": "a"}},
        {"added_tokens_decoder": {"1" * 5000: {"content": "a"}}},
        {"added_tokens_decoder": {"0": {"content": 5}}}, {"additional_special_tokens": 7},
        {"added_tokens_decoder": {"0": {"content": "a", "special": "yes"}}}, {"additional_special_tokens": [7]},
        {"extra_special_tokens": {"a_token": 7}}, {"split_special_tokens": "no"}, {"tokenizer_class": 3},
        {"clean_up_tokenization_spaces": "x" * 9000}, "[1]", "\\xff",
    ],
    "special_tokens_map.json": [{"bos_token": {}}, {"bos_token": 3}, "null"],
    "added_tokens.json": [{"<x>": "a"}, {"<x>": -1}, {"<x>": True}, {"<x>": 2**70, "<y>": []}, "[]"],
    "config.json": [{"model_type": 5}, {"model_type": "llama", "tokenizer_class": []}],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BROKEN.items() for value in values])
def test_a_broken_file_is_one_sentence(tmp_path, name, value):
    plain(tmp_path)
    raw = value if isinstance(value, str) else json.dumps(value)
    (tmp_path / name).write_bytes(b"\xff\xfe" if raw == "\\xff" else raw.encode())
    with pytest.raises(UserError) as caught:
        read_tokenizer(tmp_path)
    message = str(caught.value)
    assert name in message
    assert "\n" not in message
    assert len(message) < 500 + 2 * len(str(tmp_path))


@pytest.mark.parametrize("bad", BAD_MERGES)
def test_of_many_merges_the_broken_one_is_named(tmp_path, bad):
    plain(tmp_path)
    (tmp_path / "tokenizer.json").write_text(MERGES % bad)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(UserError, match=re.escape(f"merges has {json.loads(bad)!r} where two pieces")):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(("add_prefix_space", "legacy"), [("yes", None), (None, 5)])
def test_a_llama_tokenizer_s_own_settings_are_checked(tmp_path, add_prefix_space, legacy):
    write(tmp_path, {"tokenizer.json": raw_of("pieces"), "config.json": {"model_type": "llama"}})
    config = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": add_prefix_space, "legacy": legacy}
    write(tmp_path, {"tokenizer_config.json": config})
    with pytest.raises(UserError, match="add_prefix_space is 'yes'" if legacy is None else "legacy is 5"):
        read_tokenizer(tmp_path)


SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
UNKNOWN = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<no>", "type_id": 0}}], "pair": []}


def test_a_panic_is_one_sentence_too(tmp_path):
    """Of Rust, which writes pages to stderr itself and passes `except Exception`; other writings are not lost."""
    plain(tmp_path / "regex", pre_tokenizer=SPLIT)
    plain(tmp_path / "post", post_processor=UNKNOWN | {"special_tokens": {}})
    code = (
        "import os, sys; from pathlib import Path; from jaxattn.tokenizer import read_tokenizer\n"
        "from jaxattn.errors import UserError\n"
        "folder = Path(sys.argv[1])\n"
        "good = read_tokenizer(folder / 'regex')\n"
        "for ask in (lambda: good.encode('a' * 60 + 'b'), lambda: good.encode_batch(['x', 'a' * 60 + 'b']),\n"
        "            lambda: read_tokenizer(folder / 'post')):\n"
        "    try:\n        ask()\n        print('passed')\n"
        "    except UserError as error:\n        print(str(error).replace(chr(10), 'NEWLINE'))\n"
        "print(good.decode(good.encode('hello')))\n"
    )
    env = dict(os.environ, RUST_BACKTRACE="1")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=env)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(lines) == 4, done.stdout
    assert all("retry-limit" in line for line in lines[:2])
    assert "cannot be used" in lines[2]
    assert lines[3] == "hello"


def test_others_messages_pass_while_a_panic_is_held_back(capfd):
    from jaxattn.rust import guarded

    with guarded("nothing"):
        os.write(2, b"from elsewhere\n")
    with pytest.raises(KeyboardInterrupt), guarded("nothing"):
        raise KeyboardInterrupt
    assert capfd.readouterr().err == "from elsewhere\n"


@pytest.mark.parametrize("expression", sorted(KNOWN))
def test_known_expressions_need_steps_by_the_length_of_a_text_alone(expression):
    """So that the library's limit of 10,000,000 is out of reach: blanks and capitals are what they try longest on."""
    split = pre_tokenizers.Split(Regex(expression), behavior="isolated", invert=False)
    for text in (" " * QUIET, "A" * (QUIET // 16)):
        assert "".join(piece for piece, _ in split.pre_tokenize_str(text)) == text


@pytest.mark.parametrize(
    ("expression", "text", "held"),
    [(LLAMA3, "hello world", 0), (QWEN2, "hello", 0), ("[a-z]+", "hello", 1), (LLAMA3, "hello " * 9, 1)],
)
def test_stderr_is_held_back_only_where_a_panic_can_be(expression, text, held, tmp_path, monkeypatch):
    """It is one for all threads, which wait for each other meanwhile."""
    plain(tmp_path, pre_tokenizer={**SPLIT, "pattern": {"Regex": expression}})
    tokenizer, seen = read_tokenizer(tmp_path), []
    monkeypatch.setattr("jaxattn.tokenizer.QUIET", 20)
    monkeypatch.setattr(rust, "_stderr", lambda forget: seen.append(forget) or contextlib.nullcontext())
    tokenizer.encode(text)
    tokenizer.encode_batch(["", text])
    assert len(seen) == 2 * held


def test_a_full_temporary_folder_does_not_matter(monkeypatch, capfd):
    def full():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(rust.tempfile, "TemporaryFile", full)
    with rust.guarded("nothing"):
        os.write(2, b"from elsewhere\n")
    with pytest.raises(UserError, match=r"nothing \(why\)"), rust.guarded("nothing"):
        raise ValueError("why")
    assert capfd.readouterr().err == "from elsewhere\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ab\udcff", "the byte 0xff, which is not UTF-8 .U.DCFF. at character 2"),
        ("\ud83d!", "half a character .U.D83D. at character 0"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, text, words):
    ours = read_tokenizer(plain(tmp_path))
    for ask in (ours.encode, lambda text: ours.encode_batch(["a", text]), check_text):
        with pytest.raises(UserError, match=words):
            ask(text)


def test_blanks_before_punctuation_are_cleaned_where_transformers_does(tmp_path):
    """Not for a BPE unless it is forced to."""
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    for config in ({}, {forced: True}):
        write(plain(tmp_path), {"tokenizer_config.json": {"clean_up_tokenization_spaces": True} | config})
        theirs, ours = oracle(tmp_path), read_tokenizer(tmp_path)
        for text in ("Hello , world . it 's ' ok ' n't 've 're 'm ! ?", "plain"):
            ids = ours.encode(text)
            assert ours.decode(ids) == theirs.decode(ids)
        assert (ours.decode(ours.encode("a ,")) == "a,") == bool(config)


def test_start_and_end_tokens_go_around_long_texts_once(tmp_path):
    inner = Tokenizer.from_str(byte_bpe(LLAMA3, SPECIAL))
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="$A $B",
        special_tokens=[("<s>", inner.token_to_id("<s>")), ("</s>", inner.token_to_id("</s>"))],
    )
    inner.save(str(tmp_path / "tokenizer.json"))
    ours, text = read_tokenizer(tmp_path), "some words and more; " * 60 + "<s> and more"
    parts = list(ours.encode_parts(text, size=100))
    assert len(parts) > 8
    assert [*itertools.chain(*parts)] == inner.encode(text).ids


def test_the_start_token_goes_before_a_text_whatever_its_letters_are():
    """The vocabulary need not have the letter a."""
    inner = Tokenizer(models.BPE(vocab={"<s>": 0, "1": 1, "</s>": 2}, merges=[]))
    inner.add_special_tokens(["<s>", "</s>"])
    around = [("<s>", 0), ("</s>", 2)]
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair="$A $B", special_tokens=around)
    tokenizer = Tokenized(inner)
    assert tokenizer.around == ([0], [2])
    text = "1" * 50
    parts = list(tokenizer.encode_parts(text, size=10))
    assert [i for part in parts for i in part] == inner.encode(text).ids == [0, *[1] * 50, 2]


def test_long_texts_are_cut_only_where_characters_are_composed_already(tmp_path):
    write(plain(tmp_path, normalizer={"type": "NFC"}), {"config.json": {"model_type": "qwen3"}})
    ours, rng = read_tokenizer(tmp_path), random.Random(3)
    words = [
        "cafe\u0301 ",
        "word, ",
        "a\u0308. ",
        "x=1; ",
        "plain text and more of it, so it goes on and on. " * 5,
        "\n",
    ]
    text = "".join(rng.choice(words) for _ in range(300))
    parts = list(ours.encode_parts(text, size=50))
    assert [*itertools.chain(*parts)] == oracle(tmp_path)(text)["input_ids"]
    assert len(parts) > 3


def test_long_texts_are_cut_neither_inside_a_word_nor_inside_an_added_token():
    """Here a word goes from comma to comma, and a merge goes over a blank."""
    inner = Tokenizer(models.BPE(vocab={"a": 0, "Ġ": 1, "aĠ": 2, ",": 3, "<": 4, ">": 5}, merges=[("a", "Ġ")]))
    split = pre_tokenizers.Split(Regex("[^,]+|,"), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    inner.add_special_tokens(["<a,a>"])
    ours = Tokenized(inner)
    for text in ("a a a a a, " * 60, "a a<a,a>a, a a a a a a a a a a a a a a a a" * 40, "a <a,a> " * 90):
        for size in (10, 33, 100):
            assert [*itertools.chain(*ours.encode_parts(text, size=size))] == inner.encode(text).ids
    assert len(list(ours.encode_parts("a a a a a, " * 60, size=33))) > 5
