"""The harness's answers are those of its own HuggingFace model on the same folder."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jinja2
import numpy as np
import pytest

from convert.from_hf import convert
from jaxattn.errors import UserError
from jaxattn.text import load
from tests.generate.checkpoints import build, chats, prompts

pytest.importorskip("torch", reason="the oracle")
pytest.importorskip("lm_eval", reason="extra eval")
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from evals.harness import load_tasks
from evals.harness_lm import JaxattnLM

CONTEXT, WINDOW = 512, 64  # the models' own, and one that most texts exceed
PROMPTS = prompts(120, seed=7)


@dataclasses.dataclass
class Twin:
    """Both models on one checkpoint."""

    kind: str
    ours: JaxattnLM
    theirs: HFLM


@pytest.fixture(scope="module", params=["llama2", "llama3", "qwen2.5"])
def twin(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    source = folder / "hf"
    source.mkdir()
    build(request.param, source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 40], "top_p": 0.9}))
    loaded = load(convert(str(source), folder / "ours"))
    theirs = HFLM(pretrained=str(source), device="cpu", dtype="float32", batch_size=1, max_length=WINDOW)
    return Twin(request.param, JaxattnLM(loaded, batch_size=4, max_length=WINDOW), theirs)


def ask(kind: str, *args: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)


def both(twin: Twin, kind: str, requests: list[tuple[Any, ...]]) -> tuple[list[Any], list[Any]]:
    return tuple(getattr(lm, kind)([ask(kind, *r) for r in requests]) for lm in (twin.ours, twin.theirs))


def start_of(twin: Twin) -> str:
    return twin.theirs.tok_decode(twin.theirs.prefix_token_id, skip_special_tokens=False)


def test_what_both_models_say_of_themselves(twin, monkeypatch):
    for name in ("prefix_token_id", "eot_token_id", "max_length", "max_gen_toks"):
        assert getattr(twin.ours, name) == getattr(twin.theirs, name), name
    assert twin.ours.chat_template(True) == twin.theirs.chat_template(True)
    assert twin.ours.chat_template() is None
    monkeypatch.setattr(twin.theirs, "_max_length", None)
    assert JaxattnLM(twin.ours.loaded).max_length == twin.theirs.max_length == CONTEXT


def test_texts_have_the_same_tokens(twin):
    start = start_of(twin)
    for string in ("the of", "", " ", "two  ", start, start + "the", "the" + start, "日本 🙂\n", " " + start):
        for special in (None, True, False):
            assert twin.ours.tok_encode(string, special) == twin.theirs.tok_encode(string, special), (string, special)
        for cut in (1, 2, 100):
            found = twin.ours.tok_encode(string, left_truncate_len=cut)
            assert found == twin.theirs.tok_encode(string, left_truncate_len=cut)


def long(first: int, count: int) -> str:
    """Several prompts as one text."""
    return " ".join(PROMPTS[first : first + count])


def pairs(twin: Twin) -> list[tuple[str, str]]:
    """Contexts and continuations of every kind: none, blanks at the border, too long, equal but for the last token."""
    start = start_of(twin)
    found = [("", "the World"), ("", " to"), ("", start + "hello he"), ("the ", "of"), ("the", "  of"), ("a \n ", "is")]
    found += [("to be", c) for c in (" on", " at", " by", " on at", " on by")]
    found += [
        (start + "to be", " on"),
        ("hello " + start, "he"),
        ("東京", "🙂"),
        (long(9, 20), " 12"),
        ("a", long(30, 2)),
    ]
    found += [(PROMPTS[i], " " + PROMPTS[i + 1]) for i in range(0, 60, 2)]
    found += [(long(i, 6), " " + PROMPTS[i + 7][:20]) for i in range(60, 100, 4)]

    def fits(context: str, continuation: str) -> bool:
        """Whether the harness's own model takes it: there is a context, and a continuation that is not too long."""
        lm = twin.theirs
        if not context:
            return len(lm.tok_encode(continuation, add_special_tokens=False)) > 1
        before, behind = lm._encode_pair(context, continuation)
        return len(before) > 0 and 0 < len(behind) <= WINDOW

    kept = [pair for pair in found if fits(*pair)]
    assert len(kept) > 45
    return kept


def test_loglikelihoods(twin):
    ours, theirs = both(twin, "loglikelihood", pairs(twin))
    np.testing.assert_allclose([x for x, _ in ours], [x for x, _ in theirs], atol=1e-3)
    assert [g for _, g in ours] == [g for _, g in theirs]


def test_what_greedy_decoding_would_give_is_greedy(twin):
    contexts = [PROMPTS[i] for i in range(20, 30)]
    answers = both(twin, "generate_until", [(c, {"until": [], "max_gen_toks": 1}) for c in contexts])[1]
    found = [(c, a) for c, a in zip(contexts, answers, strict=True) if a.strip()]
    ours, theirs = both(twin, "loglikelihood", found)
    assert [g for _, g in ours] == [g for _, g in theirs]
    assert any(g for _, g in ours)


def test_rolling(twin):
    """Shorter than a window, just as long, one longer, and several windows, of which the last has its whole context."""
    text = long(0, 16)
    texts = ["", "the", start_of(twin) + "the of", *PROMPTS[5:12], *(text[: len(text) - n] for n in range(0, 60, 5))]
    ours, theirs = both(twin, "loglikelihood_rolling", [(t,) for t in texts])
    np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=1e-6)
    assert len(twin.ours.tok_encode(text)) > 3 * WINDOW


GREEDY = [
    {},
    {"until": ["e", "the"], "max_gen_toks": 20},
    {"until": "\n", "max_gen_toks": 20},
    {"until": [" ", "a"], "max_new_tokens": 12},
    {"until": [], "max_tokens": 30, "do_sample": False, "temperature": 0.7},
    {"max_gen_toks": 9, "temperature": 0.0},
    {"max_gen_toks": 9, "top_k": 4, "num_beams": 1},
    {"max_length": 40, "max_gen_toks": 50},
]


@pytest.mark.parametrize("options", GREEDY, ids=str)
def test_generated_texts(twin, options, monkeypatch):
    if not options:  # room for the default of 256 tokens
        monkeypatch.setattr(twin.theirs, "_max_length", CONTEXT)
        monkeypatch.setattr(twin.ours, "max_length", CONTEXT)
    contexts = ["the", *([start_of(twin) + "to be", *PROMPTS[8:12], long(20, 8)] if options else [])]
    ours, theirs = both(twin, "generate_until", [(c, dict(options)) for c in contexts])
    assert ours == theirs


def test_conversations(twin):
    """Also with a prefix of the answer, which some templates trim, and system messages that one refuses."""
    for chat in [*chats(25), [{"role": "system", "content": "be"}, *chats(1)[0][-1:]]]:
        assert rendered(twin.ours, chat) == rendered(twin.theirs, chat)
        for prefix in ("The answer is", "to be ", " at"):
            begun = [*chat, {"role": "assistant", "content": prefix}]
            ours, theirs = (rendered(lm, begun, add_generation_prompt=False) for lm in (twin.ours, twin.theirs))
            assert ours == theirs


def test_a_system_message_that_a_template_refuses_is_left_out(twin, monkeypatch):
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.role ~ ': ' ~ m.content ~ '; ' }}{% endfor %}"
    )
    monkeypatch.setattr(twin.theirs.tokenizer, "chat_template", template)
    monkeypatch.setitem(vars(twin.ours.loaded), "templates", {"default": template})
    turns = [{"role": "system", "content": "be"}, {"role": "user", "content": "a"}]
    for chat in (turns, turns[1:]):
        ours, theirs = (lm.apply_chat_template(chat) for lm in (twin.ours, twin.theirs))
        assert ours == theirs == "user: a; "


def rendered(lm: Any, chat: list[dict[str, str]], **options: Any) -> str | None:
    """The text of a conversation, None where it is refused."""
    try:
        return lm.apply_chat_template(chat, **options)
    except (UserError, jinja2.TemplateError):
        return None


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: "{rows}", test: "{rows}"}}}}
output_type: {kind}
training_split: train
test_split: test
fewshot_split: train
description: "was he for. "
doc_to_text: "{{{{q}}}} ?"
doc_to_target: {target}
num_fewshot: 2
{more}
"""
CHOICES = "doc_to_choice: choices\nmetric_list: [{metric: acc}, {metric: acc_norm}]"
TEXTS = "generation_kwargs: {until: [e], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]"


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("tasks"), np.random.default_rng(6)
    words = lambda n: " ".join(rng.choice(["hello", "World", "it's", "café", "12", "東京", "(no)"], n))
    rows = [{"q": words(6), "choices": [words(2) for _ in range(3)], "gold": i % 3} for i in range(6)]
    rows = [r | {"a": r["choices"][r["gold"]]} for r in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    write = lambda name, kind, target, more: (folder / f"{name}.yaml").write_text(
        TASK.format(name=name, rows=folder / "rows.jsonl", kind=kind, target=target, more=more)
    )
    write("tiny_choice", "multiple_choice", "gold", CHOICES)
    write("tiny_prefix", "multiple_choice", "gold", CHOICES + '\ngen_prefix: "it is"')
    write("tiny_text", "generate_until", "a", TEXTS)
    write("tiny_rolling", "loglikelihood_rolling", "'{{q}}'", "metric_list: [{metric: word_perplexity}]")
    return folder


CHAT = {"apply_chat_template": True, "system_instruction": "be at"}


@pytest.mark.usefixtures("small_index")
@pytest.mark.parametrize(
    ("twin", "chat"),
    [
        ("llama2", {}),
        ("llama2", CHAT),
        ("llama2", CHAT | {"fewshot_as_multiturn": False}),
        ("llama3", CHAT),
        ("qwen2.5", {}),
    ],
    ids=["llama2-text", "llama2-turns", "llama2-one turn", "llama3-turns", "qwen2.5-text"],
    indirect=["twin"],
)
def test_whole_tasks(twin, task_folder, chat, monkeypatch):
    """Prompts with examples, requests, filters and metrics, as the command runs them."""
    for lm, name in ((twin.theirs, "_max_length"), (twin.ours, "max_length")):
        monkeypatch.setattr(lm, name, CONTEXT)
    found = [
        lm_eval.simple_evaluate(
            model=lm,
            tasks=load_tasks("tiny_choice,tiny_prefix,tiny_text,tiny_rolling", task_folder),
            limit=4,
            bootstrap_iters=0,
            **chat,
        )
        for lm in (twin.ours, twin.theirs)
    ]
    ours, theirs = found
    for task, samples in theirs["samples"].items():
        for mine, other in zip(ours["samples"][task], samples, strict=True):
            assert mine["arguments"] == other["arguments"]
            assert flat(mine["resps"]) == pytest.approx(flat(other["resps"]), abs=1e-3), task
    for task, metrics in theirs["results"].items():
        for name, value in metrics.items():
            assert ours["results"][task][name] == (pytest.approx(value, rel=1e-5) if type(value) is float else value)


def flat(value: Any) -> list[Any]:
    """Numbers and texts of nested answers; texts are equal or not."""
    parts = [flat(part) for part in value] if isinstance(value, list | tuple) else [[value]]
    return [float(x) if isinstance(x, bool) else x for part in parts for x in part]
