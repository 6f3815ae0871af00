"""The real model: SmolLM2-135M-Instruct from its GGUF file, against transformers reading the same file."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import pre_tokenizers

import jaxattn
from convert.from_hf import convert
from convert.to_hf import export
from jaxattn.nn import Decoder
from jaxattn.sampling import Sampling
from jaxattn.serving.engine import Engine
from jaxattn.text import load, stream_text
from jaxattn.text_stream import TextStream
from scripts.get import fetch
from tests.generate import checkpoints
from tests.serve.engines import GREEDY, Inbox
from tests.train.helpers import rows
from train.finetune import main as finetune

torch = pytest.importorskip("torch", reason="the oracle")
pytestmark = [pytest.mark.smollm2]
# Where running costs more than compiling. What the long ones ask of this model, tests/convert/test_round_trip.py,
# tests/generate, tests/serve/test_engine.py and tests/analysis ask of tiny ones.
LONG = [pytest.mark.slow, pytest.mark.optimised]
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea,",
    "The three primary colours are red,",
    "E = mc^2 was published by",
    "import numpy as np\n\nx = np.",
    "1, 2, 3, 4, 5,",
    "Dear Sir or Madam,\n\nI am writing to",
    "The mitochondria is the",
    "To be, or not to be, that is",
    "In 1969, humans first",
    "Q: What is the largest planet?\nA:",
    "Der schnelle braune Fuchs",
    "SELECT name FROM users WHERE",
    "The recipe needs flour, eggs and 250",
    "HTTP status code 404 means",
    "Ünïcödé and 数学 and 🙂 are",
    "A",
    "The following is a list of countries in South America:\n- Argentina\n- Brazil\n-",
)


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    """The oracle with its tokenizer, and our converted checkpoint."""
    import transformers

    path = fetch("smollm2")
    call = {"gguf_file": path.name}
    oracle = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **call).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **call)
    return oracle, tokenizer, convert(str(path), tmp_path_factory.mktemp("smol") / "ours")


@pytest.fixture(scope="module")
def loaded(smol):
    return load(smol[2])


def padded(texts):
    """int32 [n, longest], zeros behind each."""
    longest = max(map(len, texts))
    return np.array([[*text, *[0] * (longest - len(text))] for text in texts], np.int32)


@pytest.mark.parametrize("prompts", [PROMPTS[:3], pytest.param(PROMPTS, marks=LONG)], ids=["few", "all"])
def test_logits_of_prompts_equal_transformers(prompts, smol, loaded):
    """All in one batch with padding behind them, whose segment is 0."""
    texts = [loaded.encode(prompt) for prompt in prompts]
    ids, here = padded(texts), padded([[1] * len(text) for text in texts])
    at = np.arange(ids.shape[1], dtype=np.int32)[None].repeat(len(ids), 0)
    run = jax.jit(lambda params, *x: Decoder(loaded.model).apply({"params": params}, *x))
    ours = np.asarray(run(loaded.params, ids, at, here))
    with torch.no_grad():
        theirs = smol[0](torch.tensor(ids, dtype=torch.long), attention_mask=torch.tensor(here)).logits.numpy()
    for prompt, text, mine, other in zip(prompts, texts, ours, theirs, strict=True):
        n = len(text)
        np.testing.assert_array_equal(mine[:n].argmax(-1), other[:n].argmax(-1), err_msg=prompt)
        assert np.abs(mine[:n] - other[:n]).max() < 1e-3, prompt


@pytest.mark.slow
@pytest.mark.optimised
def test_greedy_tokens_equal_transformers_for_prompts_alone_and_together(smol, loaded):
    oracle, count = smol[0], 64
    prompts = [loaded.encode(p) for p in PROMPTS]
    longest = max(map(len, prompts))
    rows = np.stack([np.pad(np.asarray(p, np.int32), (0, longest - len(p))) for p in prompts])
    together = jaxattn.generate(
        loaded.model, loaded.params, rows, lengths=[len(p) for p in prompts], max_new_tokens=count
    ).tokens
    with torch.no_grad():
        out = oracle.generate(
            torch.tensor([[0] * (longest - len(p)) + p for p in prompts]),
            attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
            max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    np.testing.assert_array_equal(together, out[:, longest:].numpy())
    alone = jaxattn.generate(loaded.model, loaded.params, rows[:1, : len(prompts[0])], max_new_tokens=count).tokens
    np.testing.assert_array_equal(alone[0], together[0])


def test_it_knows_the_capital_of_france(loaded):
    pieces = stream_text(loaded, loaded.encode(PROMPTS[0]), max_new_tokens=4, how=Sampling(), stop=["\n"])
    assert "".join(pieces) == " Paris."


def test_text_is_cut_into_the_tokens_of_the_models_own_tokenizer(smol, loaded):
    theirs = smol[1]
    for prompt in PROMPTS:
        assert loaded.encode(prompt) == theirs(prompt, add_special_tokens=False)["input_ids"], prompt
        assert loaded.tokenizer.decode(loaded.encode(prompt)) == prompt


def test_chat_uses_the_template_of_the_checkpoint(smol, loaded):
    messages = [{"role": "user", "content": "Name a colour."}]
    theirs = smol[1].apply_chat_template(messages, add_generation_prompt=True)
    theirs = theirs["input_ids"] if hasattr(theirs, "keys") else theirs
    assert loaded.chat(messages) == list(theirs)


@pytest.mark.slow
@pytest.mark.optimised
def test_our_export_loads_in_transformers_with_the_same_logits(smol, tmp_path):
    import transformers

    oracle, _, ours = smol
    export(ours, tmp_path / "hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ids = torch.tensor([[504, 3575, 282, 4649, 314]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, oracle(ids).logits)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")("hello world 42")["input_ids"]


@pytest.mark.slow
@pytest.mark.optimised
def test_the_sink_rate_is_that_of_torchs_attention_weights(smol, loaded):
    """Sink_1^0.3 of 2410.10781, from the oracle's own matrices."""
    from evals.measure import make_measure, summarise

    ids = np.asarray(loaded.encode(" ".join(PROMPTS) * 2)[:192], np.int32).reshape(3, 64)
    smol[0].set_attn_implementation("eager")
    with torch.no_grad():
        attentions = smol[0](torch.tensor(ids, dtype=torch.long), output_attentions=True).attentions
    alpha = np.stack([a[..., 0].mean(-1).numpy() for a in attentions], 1)  # [n, L, H], over all queries
    theirs = 100 * float((alpha > 0.3).mean())
    raw = make_measure(loaded.model)(loaded.params, ids)
    np.testing.assert_allclose(raw["alpha"][..., 0], alpha, atol=1e-3)
    assert summarise(raw, epsilon=0.3)["sink_rate"] == pytest.approx(theirs, abs=0.1)
    assert theirs > 20, "a pretrained model has sinks"


@pytest.mark.slow
@pytest.mark.optimised
def test_the_server_s_engine_answers_together_as_alone(loaded):
    """Six prompts in four slots of the real model, each its own greedy answer."""
    ready, count, inboxes = loaded.prepared(), 6, []
    engine = Engine(ready.model, ready.params, slots=4, context=128, queue=16, block=4)
    engine.start()
    try:
        for prompt in PROMPTS[:6]:
            inbox = Inbox()
            engine.submit(loaded.encode(prompt), count, GREEDY, 0, (), inbox)
            inboxes.append(inbox)
        answers = [inbox.wait() for inbox in inboxes]
    finally:
        engine.close()
    for prompt, answer in zip(PROMPTS[:6], answers, strict=True):
        alone = jaxattn.generate(ready.model, ready.params, np.asarray([loaded.encode(prompt)]), max_new_tokens=count)
        assert answer == alone.tokens[0].tolist()


@pytest.mark.slow
@pytest.mark.optimised
def test_lora_fine_tuning_starts_from_it_learns_and_exports(smol, tmp_path):
    """Twelve steps on one document: the loss falls far, and the merged export loads in transformers."""
    text = tmp_path / "document.jsonl"
    line = "Attention sinks collect the weight that no other token wants, and the first token is the usual one. "
    text.write_text("".join(json.dumps({"text": f"{n}. {line * 3}"}) + "\n" for n in range(40)))
    flags = [
        "--steps=12", "--data.context=64", "--data.batch-size=2", "--eval.every=12", "--eval.batches=1",
        "--eval.length=32", "--eval.sequences=1", "--checkpoint.every=12", "--log.no-tensorboard", "--no-report",
        "--optim.lr=0.003", "--optim.warmup-steps=0", "--lora.rank=4", "--data.val-fraction=0.2",
    ]  # fmt: skip
    assert finetune([str(smol[2]), f"--run-dir={tmp_path / 'run'}", f"--data={text}", *flags]) == 0
    losses = [row["val_loss"] for row in rows(tmp_path / "run") if "val_loss" in row]
    assert losses[-1] < losses[0] - 1.0
    export(tmp_path / "run", tmp_path / "hf")
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tuned = load(tmp_path / "run")
    ids = jnp.asarray([tuned.encode("Attention sinks collect")])
    with torch.no_grad():
        expected = theirs(torch.tensor(np.asarray(ids))).logits.numpy()
    logits = jax.jit(lambda p: Decoder(tuned.model).apply({"params": p}, ids))(tuned.params)
    np.testing.assert_allclose(logits, expected, atol=1e-3)


def test_ids_and_chats_of_two_hundred_odd_prompts_equal_transformers(smol, loaded):
    theirs, prompts = smol[1], checkpoints.prompts(200)
    # Digits apart, as the model's tokenizer.json and llama.cpp have it; transformers' reader of GGUF files forgets them
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    for text in prompts:
        assert loaded.tokenizer.encode(text) == theirs(text)["input_ids"], text
    assert loaded.encode("") == [1]  # the start token of its files, as transformers' generate has it
    for messages in checkpoints.chats(200):
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert loaded.chat(messages) == ids
        assert loaded.tokenizer.decode(ids, skip_special_tokens=False) == loaded.render(messages)


def text_of(theirs, ids, new):
    """transformers' text of new tokens behind a prompt's."""
    decode = lambda ids: theirs.decode(ids, skip_special_tokens=True)
    return decode([*ids, *new])[len(decode(ids)) :]


@pytest.mark.slow
@pytest.mark.optimised
def test_text_of_odd_prompts_equals_transformers(smol, loaded):
    """A handful whose prompts fill the program that the question for the capital has compiled."""
    oracle, theirs, _ = smol
    rows = [ids for text in checkpoints.prompts(200) if 5 <= len(ids := loaded.encode(text)) <= 8][:5]
    assert len(rows) == 5
    for ids in rows:
        with torch.no_grad():
            new = oracle.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=4, do_sample=False,
                eos_token_id=list(loaded.stop_tokens), pad_token_id=0,
            )[0, len(ids) :].tolist()  # fmt: skip
        assert "".join(stream_text(loaded, ids, max_new_tokens=4, how=Sampling())) == text_of(theirs, ids, new)


@pytest.mark.slow
@pytest.mark.optimised
def test_two_hundred_answers_and_where_they_end_equal_transformers(smol, loaded):
    """Greedy, in batches, up to any of the ends that the file names."""
    oracle, theirs, _ = smol
    count, ready, prompts, ended = 10, loaded.prepared(), checkpoints.prompts(200), 0
    assert loaded.stop_tokens == (0, 2, 4)
    for at in range(0, 200, 20):
        rows = [loaded.encode(text) for text in prompts[at : at + 20]]
        longest = 128
        tokens = np.stack([np.pad(np.asarray(ids, np.int32), (0, longest - len(ids))) for ids in rows])
        made = jaxattn.generate(
            ready.model, ready.params, tokens, lengths=[len(ids) for ids in rows], max_new_tokens=count,
            stop_tokens=loaded.stop_tokens,
        )  # fmt: skip
        with torch.no_grad():
            out = oracle.generate(
                torch.tensor([[0] * (longest - len(ids)) + ids for ids in rows]),
                attention_mask=torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows]),
                max_new_tokens=count, do_sample=False, eos_token_id=list(loaded.stop_tokens), pad_token_id=0,
            )[:, longest:].tolist()  # fmt: skip
        for ids, row, length, other in zip(rows, made.tokens.tolist(), made.lengths, out, strict=True):
            assert row[:length] == other[:length]
            assert length == count or row[length - 1] in loaded.stop_tokens
            ended += length < count
            stream = TextStream(loaded.tokenizer, prompt_ids=ids)
            assert stream.add(row[:length], last=True) == text_of(theirs, ids, row[:length])
    assert ended
