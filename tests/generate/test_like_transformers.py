"""Five families' tokenizers and tiny models: ids, chats, greedy text and where it stops, as transformers has them."""

from __future__ import annotations

import json

import numpy as np
import pytest

import jaxattn
from jaxattn.text import load
from jaxattn.text_stream import TextStream
from tests.generate import checkpoints

pytest.importorskip("torch", reason="transformers runs on it")

COUNT, NEW = 200, 12


class Pair:
    """One folder, opened by both."""

    def __init__(self, style, folder):
        import transformers

        from convert.from_hf import convert

        source = folder / "source"
        source.mkdir()
        self.style, self.source = style, source
        self.model = checkpoints.build(style, source)
        self.theirs = transformers.AutoTokenizer.from_pretrained(source)
        self.prompts = checkpoints.prompts(COUNT)
        self.theirs.padding_side = "left"
        self.theirs.pad_token = self.theirs.pad_token or self.theirs.eos_token
        free = self.generated()
        # Ends of text: one the tokenizer names, and the token that most answers hold
        counts = np.bincount([t for row in free for t in set(row[4:])])
        self.stops = [self.theirs.eos_token_id, int(counts.argmax())]
        assert 10 < sum(self.stops[1] in row for row in free) < COUNT
        self.stops = sorted(set(self.stops))
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": self.stops}))
        self.model = type(self.model).from_pretrained(source)
        self.ours = load(convert(str(source), folder / "ours"))
        self.answers = self.generated()

    def ids(self, text):
        return self.theirs(text)["input_ids"] or [self.ours.first_token]

    def generated(self):
        """New ids of every prompt up to its stop, that included."""
        import torch

        first = getattr(self, "ours", None)
        start = self.theirs.eos_token_id if first is None else first.first_token
        rows = [self.theirs(text)["input_ids"] or [start] for text in self.prompts]
        batch = self.theirs.pad({"input_ids": rows}, return_tensors="pt")
        with torch.no_grad():
            pad = self.theirs.pad_token_id
            out = self.model.generate(**batch, max_new_tokens=NEW, do_sample=False, pad_token_id=pad)
        new = out[:, batch["input_ids"].shape[1] :].tolist()
        stops = getattr(self, "stops", [])
        ends = [next((i + 1 for i, t in enumerate(row) if t in stops), len(row)) for row in new]
        return [row[:end] for row, end in zip(new, ends, strict=True)]


@pytest.fixture(scope="module", params=checkpoints.STYLES)
def pair(request, tmp_path_factory):
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


def test_ids_of_texts(pair):
    ours = pair.ours.tokenizer
    for text in pair.prompts:
        for around in (True, False):
            wanted = pair.theirs(text, add_special_tokens=around)["input_ids"]
            assert ours.encode(text, add_special_tokens=around) == wanted, text
        assert pair.ours.encode(text) == pair.ids(text), text
    assert ours.encode_batch(pair.prompts) == pair.theirs(pair.prompts)["input_ids"]
    named = pair.theirs.special_tokens_map
    assert {**ours.named, "pad_token": named["pad_token"]} == named  # the tests had to name one for their batches
    assert ours.bos == pair.theirs.bos_token_id
    assert any(ours.encode(text)[:1] == [ours.bos] for text in pair.prompts) == (
        pair.style in ("llama2", "llama3", "mistral")
    )


def test_chats_and_their_ids(pair):
    starts = []
    for messages in checkpoints.chats(COUNT):
        ids = pair.theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert pair.ours.chat(messages) == ids
        if len(starts) % 4 == 0:
            wanted = pair.theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            assert pair.ours.render(messages) == wanted
        starts.append(ids[:2])
    if pair.theirs.bos_token is not None:  # written by the template, and not a second time by the tokenizer
        assert all(ids[0] == pair.theirs.bos_token_id != ids[1] for ids in starts)


def test_greedy_ids_and_where_they_stop(pair):
    wanted = pair.answers
    rows = [pair.ours.encode(text) for text in pair.prompts]
    tokens = np.zeros((COUNT, max(map(len, rows))), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    made = jaxattn.generate(
        pair.ours.model, pair.ours.params, tokens, lengths=[len(ids) for ids in rows], max_new_tokens=NEW,
        stop_tokens=pair.ours.stop_tokens,
    )  # fmt: skip
    assert sorted(pair.ours.stop_tokens) == pair.stops
    found = [row[:n].tolist() for row, n in zip(made.tokens, made.lengths, strict=True)]
    assert found == wanted
    assert {len(row) for row in wanted} >= {1, 2, NEW}


def decoded(pair, prompt, new, **more):
    """transformers' text of the new ids behind the prompt's."""
    decode = lambda ids: pair.theirs.decode(ids, **more)
    before, whole = decode(prompt), decode([*prompt, *new])
    return whole.removeprefix(before) if whole.startswith(before) else None


def streamed(ours, prompt, new, block, stops=()):
    """The text of a stream that gets `block` tokens at a time, and the stream."""
    stream = TextStream(ours.tokenizer, stops, prompt_ids=prompt)
    parts = [stream.add(new[i : i + block]) for i in range(0, len(new), block)]
    return "".join([*parts, stream.add((), last=True)]), stream


def test_streams_are_transformers_text_of_the_whole(pair):
    """And they end at stop strings, with or without special tokens in them, however many tokens come at once."""
    ours, ended, odd = pair.ours, 0, 0
    stops = stop_strings(pair)
    for text, answer in zip(pair.prompts, pair.answers, strict=True):
        prompt, new = ours.encode(text), [t for t in answer if t not in pair.stops]
        whole = decoded(pair, prompt, new, skip_special_tokens=True)
        texts = [decoded(pair, prompt, new[:n], skip_special_tokens=False) for n in range(len(new) + 1)]
        if None in (whole, *texts):  # bytes that are no UTF-8 change those of the prompt's last character with them
            odd += 1
            continue
        used = next((n for n, t in enumerate(texts) if any(s in t for s in stops)), None)
        ended += used is not None
        for block in (1, 8):
            assert streamed(ours, prompt, new, block)[0] == whole
            found, stream = streamed(ours, prompt, new, block, stops)
            assert (stream.used, stream.stopped) == (len(new) if used is None else used, used is not None)
            if used is not None:
                at = min(texts[used].index(s) for s in stops if s in texts[used])
                assert found == shown(pair, texts[used][:at], whole)
    assert 20 < ended < COUNT
    assert odd < COUNT // 10


def stop_strings(pair):
    """A text of two characters that many answers hold, and the text of a special token that is no end of text."""
    texts = [pair.theirs.decode([t for t in new if t not in pair.stops]) for new in pair.answers]
    counts = {}
    for text in texts:
        for pair_ in {text[i : i + 2] for i in range(2, len(text) - 1)}:
            if pair_.isascii() and pair_.isprintable():
                counts[pair_] = counts.get(pair_, 0) + 1
    common = max(counts, key=counts.get)
    special = next(
        t for t in pair.theirs.all_special_tokens[::-1] if pair.theirs.convert_tokens_to_ids(t) not in pair.stops
    )
    return [special, common, "\n\n"]


def shown(pair, full, whole):
    """`full` without the text of special tokens; in SentencePiece's kind the shown text may lack its first blank."""
    for token in pair.theirs.all_special_tokens:
        full = full.replace(token, "")
    return full if whole.startswith(full) else full.removeprefix(" ")
