"""Tokenizers of GGUF files: ids, what goes around a text and where generation ends, as llama.cpp has them."""

from __future__ import annotations

import itertools
import json
import resource

import pytest

from convert import gguf_tokenizer
from convert.from_hf import convert
from convert.gguf_pre import PRE
from jaxattn.chat import choose_template, read_templates
from jaxattn.errors import UserError
from jaxattn.split_regex import KNOWN
from jaxattn.text import load
from jaxattn.tokenizer import Tokenizer, read_tokenizer
from tests.convert import gguf_models
from tests.convert.llama_cpp import CASES, KEY, PRES, TEXTS, fields_of, kept, write_gguf


def made(fields, folder):
    folder.mkdir(exist_ok=True)
    gguf_tokenizer.save(fields, folder, "x.gguf")
    return read_tokenizer(folder)


@pytest.mark.parametrize("name", CASES)
def test_ids_and_ends_are_llama_cpp_s(name, tmp_path):
    wanted, ours = kept()["cases"][name], made(fields_of(name, kept()), tmp_path)
    for text, ids, plain in zip(TEXTS, wanted["ids"], wanted["plain"], strict=True):
        assert ours.encode(text) == ids, text
        assert ours.encode(text, add_special_tokens=False) == plain, text
    ends = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    assert ends == wanted["ends"]


def test_every_way_to_cut_text_is_among_the_cases():
    assert {PRE[name] for name in PRES} == set(PRE.values())


def test_every_expression_is_one_that_the_library_does_not_fail_over():
    assert {expression for pre in PRE.values() for expression in pre.expressions} <= KNOWN


def test_a_file_is_read_as_its_fields(tmp_path):
    """Through the package, and with what a GGUF file alone can hold: f32 scores, u32 ids."""
    pytest.importorskip("gguf")
    from convert.gguf_files import GgufFile

    for name in ("pieces with special tokens", "llama-bpe"):
        fields = GgufFile(write_gguf(tmp_path / "x.gguf", fields_of(name, kept()))).fields
        ours = made(fields, tmp_path / name.replace(" ", "-"))
        assert [ours.encode(text) for text in TEXTS] == kept()["cases"][name]["ids"]


def test_a_full_disk_is_an_error_of_the_disk(tmp_path):
    """For which `new_folder` has a sentence; the library raises a bare Exception."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            gguf_tokenizer.save(fields_of(next(iter(CASES)), kept()), tmp_path, "x.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_word_that_no_merge_reaches(tmp_path):
    fields = {KEY + "model": "gpt2", KEY + "tokens": [*"abc", "ab", "abc"], KEY + "merges": ["a b"]}
    whole = made(fields | {KEY + "pre": "llama-bpe"}, tmp_path / "one")
    assert whole.encode("abc") == [4]  # no bos_token_id: nothing that could be put in front
    assert made(fields | {KEY + "pre": "qwen2"}, tmp_path / "two").encode("abc") == [3, 2]


def test_text_comes_back(tmp_path):
    ours = made(fields_of("pieces with special tokens", kept()), tmp_path / "pieces")
    for text in ("hello world", "naïve 東京 🙂", "  lead", "a\nb"):
        assert ours.decode(ours.encode(text)) == text
    assert (
        ours.decode(ours.encode("<|im_start|>hi <tool>")) == "hi <tool>"
    )  # control tokens are left out, users' are not


def test_the_tokenizer_counts_as_it_is_whatever_class_its_model_has(tmp_path):
    """transformers' Qwen2Tokenizer composes characters first; llama.cpp does not."""
    ours = made(fields_of("qwen2", kept()), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    again = read_tokenizer(tmp_path)
    assert again.encode("cafe\u0301") == ours.encode("cafe\u0301") != ours.encode("caf\u00e9")


def test_chat_templates_by_name(tmp_path):
    fields, chat = fields_of("qwen2", kept()), "tokenizer.chat_template"
    made(fields | {chat: "plain"}, tmp_path / "one")
    assert read_templates(tmp_path / "one") == {"default": "plain"}
    made(
        fields | {chat: "plain", f"{chat}.tool_use": "tools", "tokenizer.chat_templates": ["tool_use"]},
        tmp_path / "two",
    )
    two = read_templates(tmp_path / "two")
    assert choose_template(two, tmp_path) == "plain"
    assert choose_template(two, tmp_path, tools=True) == "tools"


BAD = {
    "model": 5, "pre": ["llama-bpe"], "tokens": [1, 2], "token_type": ["1"], "merges": [1, 2], "bos_token_id": "4",
    "eos_token_id": [1, 2], "eot_token_id": 2**31, "eom_token_id": -5, "fim_pad_token_id": True, "add_bos_token": 1,
    "add_eos_token": "yes", "unknown_token_id": 1.0, "padding_token_id": 4096,
}  # fmt: skip


@pytest.mark.parametrize("key", [*BAD, "scores", "add_space_prefix"])
def test_a_field_of_another_type_is_named(key, tmp_path):
    name = "pieces" if key in ("scores", "add_space_prefix") else "qwen2"
    value = {"scores": [float("nan")] * 999, "add_space_prefix": "no"}.get(key, BAD.get(key))
    with pytest.raises(UserError, match=rf"tokenizer\.ggml\.{key} ") as caught:
        gguf_tokenizer.save(fields_of(name, kept()) | {KEY + key: value}, tmp_path, "x.gguf")
    assert len(str(caught.value)) < 300
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pre": "nosuch"}, "pre-tokenizer 'nosuch' is not one of default, gpt-2"),
        ({"model": "t5"}, "tokenizer 't5' is neither gpt2 nor llama"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["a zz"]}, "inconsistent"),
        ({"tokens": ["a", "a"], "token_type": None}, "holds 'a' twice"),
        ({"tokens": []}, "tokens is missing or empty"),
        ({"token_type": [1]}, r"token_type has 1 values for \d+ tokens"),
        ({"bos_token_id": None, "add_bos_token": True}, "add_bos_token is true but no bos_token_id"),
        ({"tokens": ["a" * 600, *"bcd"], "model": "llama", "scores": [0.0] * 4, "token_type": None}, "600 characters"),
        ({"model": "llama"}, "scores is missing"),
    ],
)  # fmt: skip
def test_a_file_that_contradicts_itself_is_refused(change, words, tmp_path):
    fields = fields_of("qwen2", kept()) | {KEY + key: value for key, value in change.items()}
    with pytest.raises(UserError, match=words):
        gguf_tokenizer.save({key: value for key, value in fields.items() if value is not None}, tmp_path, "x.gguf")


def test_a_converted_file_generates_from_its_start_token_to_any_of_its_ends(tmp_path):
    pytest.importorskip("gguf")
    key, ids = "tokenizer.ggml.", {"bos_token_id": 30, "eos_token_id": 31, "eot_token_id": 32, "add_bos_token": True}
    path = gguf_models.write(tmp_path / "x.gguf", whole={key + name: value for name, value in ids.items()})
    loaded = load(convert(str(path), tmp_path / "made"))
    assert (loaded.stop_tokens, loaded.first_token) == ((31, 32), 30)
    assert loaded.encode("ab") == [30, 26]
    assert loaded.encode("") == [30]
    assert isinstance(loaded.tokenizer, Tokenizer)


def test_long_texts_in_parts_have_the_ids_of_the_whole(tmp_path):
    """Under every way to cut text; SentencePiece's merges may cross any blank, so such a text stays whole."""
    text = "".join(text for text in TEXTS if "<" not in text) * 4
    for name in PRES:
        ours = made(fields_of(name, kept()), tmp_path / name)
        parts = list(ours.encode_parts(text, size=200))
        assert [*itertools.chain(*parts)] == ours.encode(text)
        assert len(parts) > 5, name
    assert len(list(made(fields_of("pieces", kept()), tmp_path / "pieces").encode_parts(text, size=200))) == 3
