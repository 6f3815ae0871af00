"""Where a prompt begins and where generation ends, from every file that says so; and prompts that are no text."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from convert.from_hf import convert, run_config
from jaxattn.errors import UserError
from jaxattn.models import ModelConfig
from jaxattn.text import load, stream_text
from jaxattn.text_stream import TextStream
from tests.generate import checkpoints
from tests.generate.helpers import byte_run

pytest.importorskip("torch", reason="the checkpoint is made by transformers")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    (folder / "source").mkdir()
    checkpoints.build("llama2", folder / "source")
    return convert(str(folder / "source"), folder / "made")


@pytest.fixture
def side(llama):
    """The folder of the checkpoint's own files, as it was when the test ends."""
    folder = llama / "hf"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    yield folder
    for path in folder.iterdir():
        path.unlink()
    for name, raw in before.items():
        (folder / name).write_bytes(raw)


def put(path, **fields):
    raw = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (raw | fields).items() if v != "gone"}))


@pytest.mark.parametrize(
    ("generation", "config", "stop", "first"),
    [
        ({"eos_token_id": 7}, {"eos_token_id": 8}, (7,), 1),
        ({"eos_token_id": [7, 9, 7]}, {"eos_token_id": 8}, (7, 9), 1),
        ({"bos_token_id": 5}, {"eos_token_id": [8, 3]}, (8, 3), 1),
        ({"eos_token_id": None}, {"eos_token_id": 8}, (8,), 1),
        ({}, {}, (2,), 1),  # nobody but the tokenizer names one
    ],
)
def test_ends_are_those_that_transformers_stops_at(llama, side, generation, config, stop, first):
    put(side / "generation_config.json", **({"eos_token_id": "gone"} | generation))
    put(side / "config.json", **({"eos_token_id": "gone"} | config))
    loaded = load(llama)
    assert (loaded.stop_tokens, loaded.first_token) == (stop, first)
    assert loaded.encode("") == [1]
    assert loaded.encode("hello")[0] == 1 != loaded.encode("hello")[1]


def test_an_empty_prompt_without_a_start_token_of_the_tokenizer(llama, side):
    """It begins with the model's own, as transformers' generate does, else with the end of text."""
    raw = json.loads((side / "tokenizer.json").read_text())
    (side / "tokenizer.json").write_text(json.dumps(raw | {"post_processor": None}))
    put(side / "tokenizer_config.json", bos_token=None, tokenizer_class="PreTrainedTokenizerFast")
    put(side / "generation_config.json", eos_token_id=[9, 2])
    assert load(llama).encode("") == [2]
    put(side / "config.json", bos_token_id=6)
    assert load(llama).encode("") == [6]
    assert load(llama).encode("hello")[0] != 6


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id"])
@pytest.mark.parametrize("value", [2**31, -5, True, "2", 2.0, [2, None], [[2]], {}, 10**40, ["x" * 5000]])
def test_ids_that_are_none_are_named(llama, side, name, key, value):
    put(side / "generation_config.json", eos_token_id="gone", bos_token_id="gone")
    put(side / name, **{key: value})
    with pytest.raises(UserError, match=rf"{name}: {key} is .* whole numbers from 0 to \d+") as caught:
        load(llama)
    assert len(str(caught.value)) < 300 + len(str(side))


def test_a_tokenizer_that_is_not_the_model_s_is_named(llama, side):
    raw = json.loads((side / "tokenizer.json").read_text())
    raw["added_tokens"].append({"id": 5000, "content": "<far>", "special": True, "normalized": False})
    raw["added_tokens"][-1] |= {"single_word": False, "lstrip": False, "rstrip": False}
    raw["model"]["vocab"]["<far>"] = 5000
    (side / "tokenizer.json").write_text(json.dumps(raw))
    put(side / "tokenizer_config.json", added_tokens_decoder="gone", tokenizer_class="PreTrainedTokenizerFast")
    loaded = load(llama)
    with pytest.raises(UserError, match=r"makes token 5000 of this text, but the model has \d+; take the tokenizer"):
        loaded.encode("so <far>")


def test_a_missing_tokenizer_is_not_replaced_by_bytes(llama, side):
    (side / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer: the source had none"):
        load(llama)
    (side / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=r"vocab\.json"):
        load(llama)


@pytest.mark.parametrize(
    ("file", "vocabulary", "tokenizer"),
    [
        ("tokenizer.json", 257, "hf/tokenizer.json"),
        ("vocab.json", 257, "hf"),
        ("tokenizer.model", 257, "hf"),
        (None, 256, "hf"),  # refused by name where text is wanted
        (None, 257, "bytes"),  # a model of bytes has no files for them
    ],
)
def test_what_a_converted_checkpoint_says_of_its_tokenizer(tmp_path, file, vocabulary, tokenizer):
    if file is not None:
        (tmp_path / file).write_text("{}")
    model = ModelConfig(vocab_size=vocabulary, num_layers=1, d_model=16, num_heads=2, max_positions=32)
    assert run_config(model, tmp_path).data.tokenizer == tokenizer


def test_a_chat_gets_no_second_start_token(llama):
    ids = load(llama).chat([{"role": "user", "content": "hi"}])
    assert ids.count(1) == 1
    assert ids[0] == 1


def test_streams_of_a_prompt_go_on_from_it(llama):
    """And those of the harness, which reads answers by themselves, do not."""
    from jaxattn.sampling import Sampling

    loaded = load(llama).prepared()
    ids = loaded.encode("hello")
    pieces = [list(stream_text(loaded, ids, max_new_tokens=8, how=Sampling(), in_context=way)) for way in (True, False)]
    together, alone = ("".join(p) for p in pieces)
    out = TextStream(loaded.tokenizer, prompt_ids=ids)
    assert together.endswith(alone)
    assert len(together) - len(alone) in (0, 1)
    assert out.add(loaded.tokenizer.encode("World", add_special_tokens=False)) == " World"


def command(*args, **env):
    done = subprocess.run(
        [sys.executable, "-m", "jaxattn.generate", *args], capture_output=True, env=os.environ | env, timeout=300
    )
    return done.returncode, done.stdout, done.stderr.decode()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return byte_run(tmp_path_factory.mktemp("run"))


def test_bytes_that_are_no_text_are_one_sentence(run):
    code, _, err = command(str(run), "--prompt", b"a\xff")
    assert (code, err.count("\n")) == (2, 1)
    assert "the byte 0xff, which is not UTF-8" in err


def test_a_terminal_without_the_characters_gets_question_marks(run):
    code, out, err = command(str(run), "--prompt", "é", "--max-new-tokens=2", PYTHONIOENCODING="ascii")
    assert code == 0, err
    assert out.startswith(b"?")


def test_a_template_that_eats_memory_is_one_sentence(run):
    (run / "hf").mkdir()
    (run / "hf" / "chat_template.jinja").write_text("{{ 'a' * 3000000000 }}")
    code, _, err = command(str(run), "--prompt", "hi", "--chat")
    assert (code, err.count("\n")) == (2, 1)
    assert "chat template cannot be used" in err
