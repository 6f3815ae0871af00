"""Text in, text out: a checkpoint with its tokenizer, its prompts, and the text behind one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxattn._generate import BLOCK, stream
from jaxattn.chat import Messages, choose_template, read_templates, render
from jaxattn.errors import Corrupt, UserError, shown
from jaxattn.json_text import optional_object
from jaxattn.models import ModelConfig
from jaxattn.nn.decoding import decoding_variables
from jaxattn.nn.stream import OTHER, USER
from jaxattn.places import SIDE
from jaxattn.policies.command import Asked
from jaxattn.runs.opened import PLAIN, open_trained
from jaxattn.runs.run_tokenizer import run_tokenizer
from jaxattn.sampling import Sampling
from jaxattn.text_stream import TextStream
from jaxattn.tokenizer import Tokenizer
from jaxattn.types import Backend

MARK = "\ue000"  # of private use, so that no template has it


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint ready to generate: the model in its compute dtype, parameters, tokenizer and stop tokens."""

    model: ModelConfig
    params: Any
    tokenizer: Tokenizer
    stop_tokens: tuple[int, ...]
    folder: Path
    context: int
    """Tokens that prompt and answer may have together."""
    first_token: int | None = None
    """What an empty prompt begins with."""

    def prepared(self, *, consume: bool = False) -> Loaded:
        """The same with parameters laid out for decoding (`jaxattn.nn.decoding`); `consume` frees the old ones."""
        return dataclasses.replace(self, params=decoding_variables(self.model, self.params, consume=consume))

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the start token where the tokenizer puts one; an empty one is what a text begins
        with: the start token, else the end-of-text token.

        Raises:
          UserError: the text has no token, or one that the model does not have.
        """
        if ids := self.tokenizer.encode(text):
            return self.checked(ids)
        if self.first_token is None:
            raise UserError("the prompt is empty and the model has no end-of-text token to start from: give some text.")
        return [self.first_token]

    def chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation under the checkpoint's own template, which writes its start token itself."""
        text = self.render(messages, tools=tools, documents=documents, **variables)
        return self.checked(self.tokenizer.encode(text, add_special_tokens=False))

    def tagged_chat(self, messages: Messages) -> tuple[list[int], list[int]]:
        """`chat`, and what each token is: `USER` where it holds some of what a user wrote, else `OTHER`.

        Raises:
          UserError: the template does not write a user's message as it is, so that it cannot be found.
        """
        text = self.render(messages)
        marks = [f"{MARK}{n}{MARK}" for n in range(len(messages))]
        marked = self.render([{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)])
        spans, made, rest = [], "", marked
        for message, mark in zip(messages, marks, strict=True):
            front, _, rest = rest.partition(mark)
            content = str(message["content"])
            content = (
                content if text.startswith(content, len(made + front)) else content.strip()
            )  # as many templates do
            made += front
            spans += [(len(made), len(made) + len(content))] if message["role"] == "user" else []
            made += content
        if made + rest != text:
            raise UserError(
                f"the chat template of {self.folder} does not write messages as they are, so that what the user said "
                "cannot be told apart: use a policy that does not ask for it."
            )
        ids = self.checked(self.tokenizer.encode(text, add_special_tokens=False))
        inside = lambda begin, end: any(begin < stop and end > start for start, stop in spans)
        tags = [USER if inside(*each) else OTHER for each in self.tokenizer.offsets(text)]
        if len(tags) != len(ids):
            raise UserError(f"the tokenizer of {self.folder} does not say which characters its tokens are of.")
        return ids, tags

    def render(self, messages: Messages, *, tools: Sequence[Mapping[str, Any]] | None = None, **more: Any) -> str:
        """The text of a conversation under the checkpoint's own template; see `jaxattn.chat.render`."""
        template = choose_template(self.templates, self.folder, tools=tools is not None)
        return render(template, self.tokenizer.named, messages, tools=tools, **more)

    @functools.cached_property
    def templates(self) -> dict[str, str]:
        """The checkpoint's chat templates by name."""
        return read_templates(self.folder / SIDE)

    def checked(self, ids: list[int]) -> list[int]:
        """The same ids.

        Raises:
          UserError: one is no token of the model.
        """
        if ids and max(ids) >= self.model.vocab_size:
            raise UserError(
                f"the tokenizer of {self.folder} makes token {max(ids)} of this text, but the model has "
                f"{self.model.vocab_size}; take the tokenizer that belongs to the model."
            )
        return ids


def load(
    folder: Path,
    *,
    dtype: Literal["float32", "bfloat16"] | None = None,
    attn: str | None = None,
    backend: Backend | None = None,
    step: int | None = None,
    asked: Asked = PLAIN,
) -> Loaded:
    """Open a converted checkpoint or a run of text; dtype, attention, backend and policy default to the model's own.

    Raises:
      UserError: no checkpoint, or a run whose data are no text.
    """
    trained = open_trained(folder, attn, step, asked)
    model = trained.model if dtype is None else dataclasses.replace(trained.model, dtype=dtype)
    model = model if backend is None else dataclasses.replace(model, backend=backend)
    tokenizer = run_tokenizer(folder, trained.cfg)
    if tokenizer is None:
        raise UserError(f"{folder} was trained on {trained.cfg.data.source!r}, which is no text: nothing to generate.")
    context = model.position_limit or trained.cfg.data.context
    side = folder / SIDE
    named, first = (_named_ids(side, f"{end}_token_id", model.vocab_size) for end in ("eos", "bos"))
    # Where the model's own files name ends of text, transformers stops at those alone, whatever the tokenizer's is
    stop = named or (() if tokenizer.eos is None else (tokenizer.eos,))
    starts = [*([] if tokenizer.bos is None else [tokenizer.bos]), *first]
    starts += [*([] if tokenizer.eos is None else [tokenizer.eos]), *stop]
    return Loaded(model, trained.params, tokenizer, stop, folder, context, starts[0] if starts else None)


def _named_ids(side: Path, key: str, count: int) -> tuple[int, ...]:
    """Token ids of the source's generation_config.json, else of its config.json.

    Raises:
      Corrupt: one is no token of the model.
    """
    for name in ("generation_config.json", "config.json"):
        value = optional_object(side / name).get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for number in ids:
            if type(number) is not int or not 0 <= number < count:
                raise Corrupt(
                    f"{side / name}: {key} is {shown(value)} but must be of whole numbers from 0 to {count - 1}; "
                    "repair the file."
                )
        if ids:
            return tuple(dict.fromkeys(ids))
    return ()


def stream_text(
    loaded: Loaded,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    how: Sampling,
    seed: int = 0,
    stop: Sequence[str] = (),
    in_context: bool = True,
    counted: Callable[[int], None] = lambda count: None,
    watch: Callable[[Any], None] = lambda states: None,
) -> Iterator[str]:
    """Pieces of text behind one prompt, until a stop token, a stop string or the limit.

    counted: is told how many tokens were made each time some were. watch: of `jaxattn._generate.stream`.
    in_context: the text as it goes on from the prompt's; else that of the new tokens alone, which may lack a blank.
    """
    out = TextStream(loaded.tokenizer, stop, prompt_ids=ids if in_context else ())
    parts = stream(
        loaded.model, loaded.params, np.asarray(ids, np.int32)[None], max_new_tokens=max_new_tokens,
        key=jax.random.key(seed), how=how, stop_tokens=loaded.stop_tokens,
        block=min(BLOCK, max_new_tokens), watch=watch,
    )  # fmt: skip
    for tokens, own in parts:
        counted(int(own.sum()))
        yield out.add([t for t in tokens[0][own[0]].tolist() if t not in loaded.stop_tokens])
        if out.stopped:
            return
    yield out.add((), last=True)
