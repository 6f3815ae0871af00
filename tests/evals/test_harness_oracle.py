"""The harness's answers are those of its own HuggingFace model on the same folder, request by request."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jinja2
import numpy as np
import pytest
import tokenizers
from tokenizers import processors

pytest.importorskip("torch", reason="the oracle")
pytest.importorskip("lm_eval", reason="extra eval")
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM

from evals.gen_kwargs import read_gen_kwargs
from evals.harness_lm import JaxattnLM
from jaxattn.errors import UserError
from jaxattn.tokenizer import read_tokenizer
from tests.evals.harness_twin import CONTEXT, WINDOW, Twin, ask, both
from tests.generate.checkpoints import STYLES, chats, prompts

PROMPTS = prompts(120, seed=7)
pytestmark = pytest.mark.parametrize("twin", STYLES, indirect=True)


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


@pytest.mark.parametrize("around", ["usual", "nothing", "both ends"])
def test_a_start_that_is_asked_for(twin, around, tmp_path):
    """With each choice of BOS and of the prefix token, whatever the tokenizer's own file puts around a text."""
    for file in twin.source.glob("*.json*"):
        (tmp_path / file.name).write_text(file.read_text())
    if around != "usual":
        inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        first, last = (inner.id_to_token(i) for i in (twin.theirs.prefix_token_id, twin.theirs.eot_token_id))
        special = {token: inner.token_to_id(token) for token in (first, last)}
        single = f"{first} $A {last}" if around == "both ends" else "$A"
        inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(special.items()))
        inner.save(str(tmp_path / "tokenizer.json"))
    loaded = dataclasses.replace(twin.ours.loaded, tokenizer=read_tokenizer(tmp_path))
    for bos, prefix in itertools.product((None, True, False), (None, 5)):
        more = {"add_bos_token": bos, "prefix_token_id": prefix}
        ours, theirs = JaxattnLM(loaded, **more), HFLM(twin.theirs.model, tokenizer=str(tmp_path), **more)
        assert ours.prefix_token_id == theirs.prefix_token_id
        first = theirs.tok_decode([theirs.prefix_token_id], skip_special_tokens=False)
        for text in (*PROMPTS[:12], first, first + "the", start_of(twin) + "the"):
            assert ours.tok_encode(text) == theirs.tok_encode(text), (text, more)
            expected = theirs.tok_batch_encode([text])[0].tolist()[0] if text else []
            asked = read_gen_kwargs({"max_gen_toks": 9}, checkpoint={}, end=None, default_count=9)
            assert not expected or ours._prompt(text, asked) == expected, (text, more)


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
    contexts = [PROMPTS[i] for i in range(20, 28)]
    answers = both(twin, "generate_until", [(c, {"until": [], "max_gen_toks": 1}) for c in contexts])[1]
    found = [(c, a) for c, a in zip(contexts, answers, strict=True) if a.strip()]
    ours, theirs = both(twin, "loglikelihood", found)
    assert [g for _, g in ours] == [g for _, g in theirs]
    assert any(g for _, g in ours)


def test_rolling(twin):
    """Shorter than a window, just as long, one longer, and several windows, of which the last has its whole context."""
    text = long(0, 16)
    texts = ["", "the", start_of(twin) + "the of", *PROMPTS[5:12], *(text[: len(text) - n] for n in range(0, 60, 10))]
    ours, theirs = both(twin, "loglikelihood_rolling", [(t,) for t in texts])
    np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=1e-6)
    assert len(twin.ours.tok_encode(text)) > 3 * WINDOW


GREEDY = [
    {"until": ["e", "the"], "max_gen_toks": 20},
    {"until": " ", "max_new_tokens": 12},
    {"until": ["zz", "o", "a", "o", "</s>", "<|im_end|>", "\ufffd"], "max_gen_toks": "20"},
    {"until": [], "max_tokens": 30, "do_sample": False, "temperature": 0.7},
    {"until": ["", "e"], "max_completion_tokens": 9},
    {"max_gen_toks": 9, "temperature": 0.0, "do_sample": None},
    {"max_gen_toks": 9, "top_k": 4, "num_beams": 1},
    {"max_length": 40, "max_gen_toks": 30},
]


def greedy(twin: Twin, options: dict[str, Any]) -> list[str]:
    """What both answer, some behind a prompt that is too long."""
    contexts = ["the", start_of(twin) + "to be", PROMPTS[9], long(20, 8)]
    ours, theirs = both(twin, "generate_until", [(c, dict(options)) for c in contexts])
    assert ours == theirs, options
    assert twin.ours.tok_encode(contexts[-1])[WINDOW:]
    return ours


def test_generated_texts(twin):
    found = [greedy(twin, options) for options in GREEDY]
    assert len({tuple(texts) for texts in found}) > 5


def test_a_limit_of_the_checkpoints_own_goes_first(twin, monkeypatch):
    """As transformers has it; how much room a prompt leaves is still the task's to say."""
    monkeypatch.setattr(twin.theirs.model.generation_config, "max_new_tokens", 5)
    monkeypatch.setitem(twin.ours._generation_config, "max_new_tokens", 5)
    greedy(twin, {"until": [], "max_gen_toks": 20, "max_length": 45})
    greedy(twin, {"until": [], "max_gen_toks": 3})


def test_what_a_model_thinks_is_left_out(twin, monkeypatch):
    """Up to the last of a token, or of a text; a stop string in it ends the answer all the same."""
    options, made, decode = {"until": [], "max_gen_toks": 12}, [], twin.theirs.tok_decode
    monkeypatch.setattr(twin.theirs, "tok_decode", lambda ids, **more: made.append(ids) or decode(ids, **more))
    whole = greedy(twin, options)
    ids = made[-1]
    for mark in (whole[0][3], ids[3], str(ids[5])):
        number = int(mark) if isinstance(mark, str) and mark.isdigit() else mark
        assert JaxattnLM(twin.ours.loaded, think_end_token=mark).think_end_token == number
        for lm in (twin.ours, twin.theirs):
            monkeypatch.setattr(lm, "think_end_token", number)
        assert greedy(twin, options) != whole
    greedy(twin, options | {"until": [whole[0][5]]})


def test_answers_are_kept_under_the_same_names(twin, tmp_path, monkeypatch):
    """What one of both answered, the other finds in the harness's cache."""
    requests = [ask("loglikelihood", "to be", " on"), ask("loglikelihood", "", "hello")]
    rolling = [ask("loglikelihood_rolling", "to be on"), ask("loglikelihood_rolling", "at")]
    texts = [ask("generate_until", "to be", {"until": ["e"], "max_gen_toks": 4})]
    kinds = (("loglikelihood", requests), ("loglikelihood_rolling", rolling), ("generate_until", texts))
    CachingLM(twin.ours, str(tmp_path / "kept.db"))  # whose hook is told of each answer as it comes
    first = [getattr(twin.ours, kind)(asked) for kind, asked in kinds]
    for kind, _ in kinds:
        monkeypatch.setattr(twin.theirs, kind, None)
    again = CachingLM(twin.theirs, str(tmp_path / "kept.db"))
    monkeypatch.setattr(again.lm, "set_cache_hook", lambda hook: None)
    assert [getattr(again, kind)(asked) for kind, asked in kinds] == first


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
