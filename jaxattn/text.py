"""Text in, text out: a checkpoint with its tokenizer, streams of text, stop strings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxattn._generate import BLOCK, stream
from jaxattn.chat import read_json, read_template, render
from jaxattn.errors import UserError
from jaxattn.models import ModelConfig
from jaxattn.nn.decoding import decoding_variables
from jaxattn.sampling import Sampling
from jaxattn.tokenizer import read_tokenizer
from jaxattn.types import Backend

SIDE = "hf"  # where a converted checkpoint keeps its source's own files


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint ready to generate: the model in its compute dtype, parameters, tokenizer and stop tokens."""

    model: ModelConfig
    params: Any
    tokenizer: Any
    stop_tokens: tuple[int, ...]
    folder: Path
    context: int
    """Tokens of the longest sequence that was trained."""

    def prepared(self) -> Loaded:
        """The same with parameters laid out for decoding alone (`jaxattn.nn.decoding`); the old ones may go."""
        return dataclasses.replace(self, params=decoding_variables(self.model, self.params))

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt; an empty one is the end-of-text token, behind which a text begins.

        Raises:
          UserError: the text has no token.
        """
        ids = list(self.tokenizer.encode(text)) or ([self.stop_tokens[0]] if self.stop_tokens else [])
        if not ids:
            raise UserError("the prompt is empty and the model has no end-of-text token to start from: give some text.")
        return ids

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation under the checkpoint's own template."""
        return self.tokenizer.encode(render(*read_template(self.folder / SIDE), messages), add_special_tokens=False)


def load(
    folder: Path,
    *,
    dtype: Literal["float32", "bfloat16"] | None = None,
    attn: str | None = None,
    backend: Backend | None = None,
    step: int | None = None,
) -> Loaded:
    """Open a converted checkpoint or a run of text; dtype, attention and backend default to the model's own.

    Raises:
      UserError: no checkpoint, or a run whose data are no text.
    """
    from evals.trained import open_trained
    from train.load import open_source

    trained = open_trained(folder, attn, step)
    model = trained.model if dtype is None else dataclasses.replace(trained.model, dtype=dtype)
    model = model if backend is None else dataclasses.replace(model, backend=backend)
    if (folder / SIDE / "tokenizer.json").exists():
        tokenizer = read_tokenizer(folder / SIDE)
    else:
        tokenizer = open_source(trained.cfg)[0].tokenizer
    if tokenizer is None:
        raise UserError(f"{folder} was trained on {trained.cfg.data.source!r}, which is no text: nothing to generate.")
    context = model.position_limit or trained.cfg.data.context
    return Loaded(model, trained.params, tokenizer, _stop_tokens(folder, tokenizer), folder, context)


def _stop_tokens(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """End-of-text ids: those of the source's generation_config.json or config.json, else the tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        path = folder / SIDE / name
        if path.is_file():
            ids = read_json(path).get("eos_token_id")
            ids = ids if isinstance(ids, list) else [ids]
            if all(isinstance(i, int) for i in ids):
                return tuple(ids)
    return () if tokenizer.eos is None else (tokenizer.eos,)


class TextStream:
    """Turns tokens into text as they come, holding back half a character and what may become a stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(s for s in stop if s)
        self._ids: list[int] = []
        self._shown = 0
        self.stopped = False

    def add(self, ids: Sequence[int], *, last: bool = False) -> str:
        """The text that is certain now; `last` gives out what was held back."""
        self._ids += [int(i) for i in ids]
        text = self._tokenizer.decode(self._ids)
        for stop in self._stop:
            if (at := text.find(stop)) >= 0:
                text, self.stopped, last = text[:at], True, True
        end = len(text)
        if not last:
            while end and text[end - 1] == "\ufffd":  # bytes of a character still to come
                end -= 1
            end = min([end, *(_overlap(text[:end], stop) for stop in self._stop)])
        new, self._shown = text[self._shown : end], max(self._shown, end)
        return new


def _overlap(text: str, stop: str) -> int:
    """Where a beginning of `stop` starts at the end of the text, or the text's length."""
    for n in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:n]):
            return len(text) - n
    return len(text)


def stream_text(
    loaded: Loaded, ids: Sequence[int], *, max_new_tokens: int, how: Sampling, seed: int = 0, stop: Sequence[str] = ()
) -> Iterator[str]:
    """Pieces of text behind one prompt, until a stop token, a stop string or the limit."""
    out = TextStream(loaded.tokenizer, stop)
    parts = stream(
        loaded.model, loaded.params, np.asarray(ids, np.int32)[None], max_new_tokens=max_new_tokens,
        key=jax.random.key(seed), how=how, stop_tokens=loaded.stop_tokens, block=min(BLOCK, max_new_tokens),
    )  # fmt: skip
    for tokens, own in parts:
        yield out.add(tokens[0][own[0]].tolist())
        if out.stopped:
            return
    yield out.add((), last=True)
