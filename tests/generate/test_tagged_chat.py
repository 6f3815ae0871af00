"""Which tokens of a chat are the user's, against the template's text."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxattn.chat import render
from jaxattn.errors import UserError
from jaxattn.nn.stream import OTHER, USER
from jaxattn.text import Loaded
from jaxattn.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "Say user."},
    {"role": "user", "content": " user"},  # a word of the template, and a blank that it takes away
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "naïve 日本 user?"},
]


def loaded(template: str):
    """A model of bytes, as far as its chats go."""
    alphabet = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    written = lambda messages: render(template, {}, messages)
    return SimpleNamespace(render=written, tokenizer=Tokenizer(inner), checked=lambda ids: ids, folder="folder")


def test_tokens_of_the_users_messages_are_the_users():
    model = loaded(CHATML)
    ids, tags = Loaded.tagged_chat(model, MESSAGES)
    assert ids == model.tokenizer.encode(model.render(MESSAGES), add_special_tokens=False)
    assert set(tags) == {OTHER, USER}
    theirs = [i for i, tag in zip(ids, tags, strict=True) if tag == USER]
    assert model.tokenizer.decode(theirs) == "user" + "naïve 日本 user?"
    first = model.render(MESSAGES).encode().index(b"<|user|>\nuser\n") + len(b"<|user|>\n")
    assert tags[:first] == [OTHER] * first
    assert tags[first : first + 5] == [USER] * 4 + [OTHER]


def test_a_template_that_rewrites_messages_is_refused():
    with pytest.raises(UserError, match="does not write messages as they are"):
        Loaded.tagged_chat(loaded("{% for m in messages %}{{ m.content | upper }}{% endfor %}"), MESSAGES)
