"""Perplexity: every token once, with the context the windows promise, by forward passes and by the decode state."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.from_hf import convert
from evals.perplexity import _bytes, losses, main, perplexity, windows
from jaxattn.errors import ConfigError, DataError, UserError
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from jaxattn.open_tokenizer import byte_tokenizer
from jaxattn.text import load
from tests.conformance.model import params_of
from tests.generate.checkpoints import build
from tests.generate.helpers import byte_run

MODEL = ModelConfig(vocab_size=17, num_layers=2, d_model=16, num_heads=2)
IDS = np.random.default_rng(0).integers(0, 17, 61)


@pytest.mark.parametrize("count", [2, 3, 16, 17, 18, 61])
@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 8), (16, 1), (16, 5), (100, 100)])
def test_windows_score_every_token_but_the_first_once(count, context, stride):
    ids = np.arange(1, count + 1)
    scored = []
    for w in windows(ids, context, stride):
        assert w.tokens.shape == (context + 1,)
        assert 0 <= w.first < w.length - 1
        scored += w.tokens[w.first + 1 : w.length].tolist()
    assert scored == ids[1:].tolist()


@pytest.mark.parametrize("stride", [16, 5])
def test_losses_are_those_of_each_token_behind_its_window(stride):
    params = params_of(MODEL)
    found = losses(MODEL, params, IDS, context=16, stride=stride)
    apply = jax.jit(Decoder(MODEL).apply)
    at = 0
    for w in windows(IDS, 16, stride):
        logits = np.asarray(apply({"params": params}, jnp.asarray(w.tokens[None, : w.length - 1])))[0]
        logp = np.asarray(jax.nn.log_softmax(logits))
        for t in range(w.first, w.length - 1):
            assert found[at] == pytest.approx(-logp[t, w.tokens[t + 1]], abs=1e-4)
            at += 1
    assert at == len(found) == 60


@pytest.mark.parametrize("attn", ["softmax", "softmax(window=5)", "lightning", "softplus"])
def test_token_by_token_gives_the_same_losses(attn):
    model = MODEL.with_attention(attn)
    params = params_of(model)
    whole = losses(model, params, IDS, context=16, stride=16)
    np.testing.assert_allclose(losses(model, params, IDS, context=16, stride=16, prefill=0), whole, atol=3e-4)


def test_retrieving_attention_reads_through_its_cache():
    """One forward pass would show attention to everything; the decode state fetches a block."""
    model = MODEL.with_attention("landmark(block=3, retrieve=1, context=16)")
    params = params_of(model)
    whole = losses(model, params, IDS, context=32, stride=32)
    plain = losses(MODEL.with_attention("landmark(block=3)"), params, IDS, context=32, stride=32)
    assert np.all(np.isfinite(whole))
    assert not np.allclose(whole, plain, atol=1e-3)


def test_more_context_is_what_a_smaller_stride_gives():
    """A token is scored with at least context - stride tokens before it."""
    for w in list(windows(IDS, 16, 4))[1:]:
        assert w.first >= 16 - 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"context": 1}, "--context is 1"),
        ({"context": 40}, "--context is 40 but must be from 2 to 32"),
        ({"stride": 0}, "--stride is 0"),
        ({"stride": 17}, "--stride is 17"),
        ({"stride": 4, "prefill": 0}, "--token-by-token reads separate pieces"),
    ],
)
def test_impossible_windows_are_refused(call, message):
    model = ModelConfig(vocab_size=17, num_layers=1, d_model=16, num_heads=2, max_positions=32)
    with pytest.raises(ConfigError, match=message):
        losses(model, {}, IDS, **({"context": 16, "stride": 16} | call))


# --------------------------------------------------------------------------------------- beside transformers


@pytest.fixture(scope="module", params=["llama2", "llama3", "qwen2.5"])
def twin(request, tmp_path_factory):
    """Our checkpoint, transformers' model and its tokenizer; two of three tokenizers begin a text with BOS."""
    transformers = pytest.importorskip("transformers", reason="the oracle")
    folder = tmp_path_factory.mktemp(request.param)
    source = folder / "hf"
    source.mkdir()
    build(request.param, source)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    loaded = load(convert(str(source), folder / "ours"))
    return loaded, oracle, transformers.AutoTokenizer.from_pretrained(source)


def strided_nats(oracle, ids, length, stride):
    """Sum of -log p as transformers' guide to the perplexity of fixed-length models has it: windows of `length`
    tokens move on by `stride`, and a window's loss counts the tokens that no window before it held."""
    import torch

    total, seen = 0.0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        row = torch.tensor([ids[begin:end]])
        labels = row.clone()
        labels[:, : -(end - seen)] = -100
        with torch.no_grad():
            loss = oracle(row, labels=labels).loss
        total += float(loss) * int((labels[:, 1:] != -100).sum())
        seen = end
        if end == len(ids):
            return total


TEXT = "the of and 🙂 to a in is was, he 日本 for it with\n\nas his on be at by (that) from not are but or " * 2


@pytest.mark.parametrize("stride", [5, 20, 39])
def test_strided_windows_are_those_of_transformers(twin, stride):
    """Its window of 40 tokens, which counts the last target, is our context of 39; a stride of 40 would leave a token
    out of every window, so it has no counterpart."""
    loaded, oracle, tokenizer = twin
    ids = tokenizer(TEXT)["input_ids"]
    found = perplexity(loaded, TEXT, context=39, stride=stride)
    assert found["tokens"] == len(ids) - 1 > 60
    expected = strided_nats(oracle, ids, 40, stride)
    assert found["nats_per_token"] * found["tokens"] == pytest.approx(expected, rel=1e-5)
    start = tokenizer.bos_token_id == ids[0]
    unscored = 0 if start else len(tokenizer.decode(ids[:1]).encode())
    assert found["bits_per_byte"] == pytest.approx(expected / np.log(2) / (len(TEXT.encode()) - unscored), rel=1e-5)


def test_bytes_of_a_first_token_that_is_half_a_character():
    """BPE may cut a character; the unscored part of the text is its bytes, not those of U+FFFD."""
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("🙂")
    assert len(ids) == 4
    assert [_bytes(tokenizer, i) for i in ids] == [1, 1, 1, 1]
    assert _bytes(tokenizer, tokenizer.encode("a")[0]) == 1


def test_the_beginning_of_a_text_is_its_first_tokens(tmp_path):
    loaded = load(byte_run(tmp_path))
    whole = perplexity(loaded, "some words 🙂", context=32, stride=32)
    cut = perplexity(loaded, "some words 🙂 and more", context=32, stride=32, max_tokens=15)
    assert cut == whole
    assert perplexity(loaded, "some words", context=32, stride=32, max_tokens=99)["tokens"] == 9
    middle = perplexity(loaded, "some words 🙂", context=32, stride=32, max_tokens=13)
    assert middle["bits_per_byte"] == pytest.approx(middle["nats_per_token"] * 12 / np.log(2) / 10, rel=1e-6)


def test_texts_without_a_prediction_and_losses_that_are_no_numbers_are_refused(tmp_path):
    loaded = load(byte_run(tmp_path))
    for text, count in (("", 0), ("a", 1)):
        with pytest.raises(DataError, match=f"the text has {count} tokens"):
            perplexity(loaded, text, context=8, stride=8)
    with pytest.raises(ConfigError, match="--max-tokens is 1"):
        perplexity(loaded, "some", context=8, stride=8, max_tokens=1)
    broken = dataclasses.replace(loaded, params=jax.tree.map(lambda x: x * np.nan, loaded.params))
    with pytest.raises(DataError, match="the model gives no numbers"):
        perplexity(broken, "some words", context=8, stride=8)


BAD = {
    "bytes": (b"some \xff words", [], "cannot be read as UTF-8"),
    "utf-16": ("some words".encode("utf-16"), [], "cannot be read as UTF-8"),
    "empty": (b"", [], "the text has 0 tokens"),
    "mark": (b"\xef\xbb\xbfa", [], "the text has 1 tokens"),
    "context": (b"some words", ["--context=0"], "--context is 0"),
    "stride": (b"some words", ["--stride=0"], "--stride is 0"),
    "no file": (None, [], "cannot be read as UTF-8"),
    "out": (b"some words", ["--json=/nowhere/x.json"], "/nowhere/x.json cannot be written"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return byte_run(tmp_path_factory.mktemp("perplexity"))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name, run, monkeypatch, tmp_path, capsys):
    content, words, says = BAD[name]
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["evals.perplexity", str(run), "--text", str(path), *words])
    with pytest.raises(UserError) as error:
        main()
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert ('"perplexity"' in capsys.readouterr().out) == (name == "out")  # what was measured is not lost


def test_a_byte_order_mark_is_no_part_of_the_text(run, monkeypatch, tmp_path, capsys):
    found = []
    for content in ("some words 日", "\ufeffsome words 日"):
        (tmp_path / "text.txt").write_text(content, "utf-8")
        monkeypatch.setattr(sys, "argv", ["evals.perplexity", str(run), "--text", str(tmp_path / "text.txt")])
        assert main() == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]


def test_the_command_prints_and_writes_the_numbers(tmp_path):
    run = byte_run(tmp_path)
    text = tmp_path / "held.txt"
    text.write_text("words that were not seen before")
    call = [
        sys.executable,
        "-m",
        "evals.perplexity",
        str(run),
        "--text",
        str(text),
        "--json",
        str(tmp_path / "out.json"),
    ]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["tokens"] == 30
    assert result["bits_per_byte"] == pytest.approx(result["nats_per_token"] / np.log(2), rel=1e-6)
    done = subprocess.run([*call[:4], "--text", str(tmp_path / "none")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "cannot be read as UTF-8" in done.stderr
