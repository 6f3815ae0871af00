"""Our models as lm-evaluation-harness's model: the same requests, answered as its own HuggingFace model does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from rich.progress import track

from evals.gen_kwargs import Generation, read_gen_kwargs
from evals.harness_chat import check_variables, conversation
from jaxattn._generate import stream
from jaxattn.chat import choose_template, read_templates
from jaxattn.errors import ConfigError, UserError, shown
from jaxattn.json_text import field, optional_object
from jaxattn.places import SIDE
from jaxattn.reader import hidden_of, scores
from jaxattn.text import Loaded

BUCKET = 64  # sequence lengths are rounded up to a multiple of this, so few programs are compiled
MAX_GEN_TOKS = 256  # where a task names no number, as the harness's own models have it
Pair = tuple[Any, list[int], list[int]]


class JaxattnLM(TemplateLM):
    """A converted checkpoint or trained run as the harness's model.

    Pairs of context and continuation, prefix tokens and rolling windows are the harness's own. Answers depend neither
    on the batch size nor on the order of requests; sampled ones on `seed` and the request's place.

    Args:
      max_length: tokens of a context; by default the checkpoint's max_position_embeddings, or what was trained.
      add_bos_token: whether texts begin with BOS; by default they get the tokenizer's own special tokens.
      prefix_token_id: stands before a text without context; by default BOS, or the end of text.
      think_end_token: ends what a model thinks before it answers: text, or the number of a token.
      chat_template_args: more that the chat template may read, such as enable_thinking.
    """

    backend = "causal"

    def __init__(
        self,
        loaded: Loaded,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        think_end_token: str | int | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        seed: int = 1234,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size} but must be at least 1.")
        side = loaded.folder / SIDE
        self.loaded, self.tokenizer = loaded.prepared(), cast(Any, loaded.tokenizer)
        self.batch_size, self.seed = batch_size, seed
        self.add_bos_token, self._prefix = add_bos_token, prefix_token_id
        number = isinstance(think_end_token, str) and think_end_token.isdigit()
        self.think_end_token = int(think_end_token) if number else think_end_token
        self.chat_template_args = dict(chat_template_args or {})
        check_variables(self.chat_template_args)
        self._generation_config = optional_object(side / "generation_config.json")
        limit, config = loaded.model.max_positions, side / "config.json"
        known = field(optional_object(config), "max_position_embeddings", int, config, loaded.context)
        self.max_length: int = known if max_length is None else max_length
        if self.max_length < 2 or (limit and self.max_length > limit):
            raise ConfigError(f"max_length is {self.max_length} but must be from 2 to {limit or 'any number'}.")

    # ------------------------------------------------------------------------------------------------ tokens

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos  # None where the tokenizer has none, as in the harness's own model

    @property
    def prefix_token_id(self) -> int:
        found = (self._prefix, self.tokenizer.bos, self.tokenizer.eos)
        for token in found:
            if token is not None:
                return token
        raise UserError("the tokenizer has no start and no end of text: give JaxattnLM a prefix_token_id.")

    @property
    def max_gen_toks(self) -> int:
        return MAX_GEN_TOKS

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text; special tokens are added as asked, else as `add_bos_token` and the tokenizer say, but never
        to a text that begins with the prefix token."""
        special = add_special_tokens if add_special_tokens is not None else self.add_bos_token
        if add_special_tokens is None and has_bos_prefix(string, self._text_of(self.prefix_token_id)):
            special = False
        ids = self._ids(string, special)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _ids(self, text: str, special: bool | None) -> list[int]:
        """Ids of a text, with special tokens unless `special` is False: BOS where it was asked for, else the usual."""
        usual = self.add_bos_token is None and special is not False
        ids = self.loaded.checked(self.tokenizer.encode(text, add_special_tokens=usual))
        first = self.add_bos_token and special and self.tokenizer.bos is not None
        return [self.tokenizer.bos, *ids] if first else ids

    def _text_of(self, token: int | None) -> str | None:
        return None if token is None else self.tokenizer.decode([token], skip_special_tokens=False)

    # ------------------------------------------------------------------------------------------ conversations

    @property
    def tokenizer_name(self) -> str:
        """Names the prompts of this checkpoint in the harness's cache of requests."""
        return str(self.loaded.folder.resolve()).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The checkpoint's template, None where none is asked for.

        Raises:
          UserError: the checkpoint has none.
        """
        side = self.loaded.folder / SIDE
        return choose_template(read_templates(side), side) if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in the checkpoint's template; see `evals.harness_chat.conversation`."""
        return conversation(self.loaded, chat_history, self.chat_template_args, ask=add_generation_prompt)

    # ------------------------------------------------------------------------------------------------ scores

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """log p (nats) of each continuation behind its context, and whether greedy decoding would give it.

        Raises:
          ConfigError: a continuation without a token, or one that is longer than `max_length`.
        """
        for request in requests:
            context, continuation = request.args
            if not context and not self.tok_encode(continuation, add_special_tokens=False):
                raise ConfigError(f"the continuation {shown(continuation)} has no token.")
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """log p (nats) of each whole text behind the prefix token, every window with as much context as fits."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            new = [(None, *make_disjoint_window(window)) for window in cut]
            windows += new
            owners += [i] * len(new)
        found = np.zeros(len(requests))
        for i, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            found[i] += value
        for request, value in zip(requests, found.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return found.tolist()

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **kwargs: Any) -> list[tuple[float, bool]]:
        """Score pairs of token ids; contexts that differ in nothing the model reads are read once."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for i, (text, context, continuation) in enumerate(requests):
            context = context or [self.prefix_token_id]  # of blanks, which went to the continuation
            if not 0 < len(continuation) <= self.max_length:
                raise ConfigError(
                    f"the continuation {shown(text[1] if text else None)} has {len(continuation)} tokens behind its "
                    f"context, but needs from 1 to {self.max_length}, the most that is read at once."
                )
            rows.setdefault(tuple((context + continuation)[-self.max_length - 1 : -1]), []).append(i)
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(rows, key=len, reverse=True)
        for group in _groups(order, self.batch_size, "scoring"):
            tokens, lengths = _padded(group, self.batch_size)
            hidden = hidden_of(self.loaded.model, self.loaded.params, tokens, lengths)
            for turn in range(max(len(rows[row]) for row in group)):
                asked = [(b, rows[row][turn]) for b, row in enumerate(group) if turn < len(rows[row])]
                for i, answer in self._judge(hidden, lengths, [(b, i, requests[i][2]) for b, i in asked]):
                    found[i] = answer
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
        return [found[i] for i in range(len(requests))]

    def _judge(
        self, hidden: Any, lengths: np.ndarray, asked: Sequence[tuple[int, int, list[int]]]
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """For (row of `hidden`, request, its continuation at the row's end): the request and its answer."""
        longest = -(-max(len(ids) for _, _, ids in asked) // BUCKET) * BUCKET
        targets, at = np.zeros((2, len(lengths), longest), np.int32)
        for b, _, ids in asked:
            targets[b, : len(ids)] = ids
            at[b, : len(ids)] = np.arange(lengths[b] - len(ids), lengths[b])
        wanted = jnp.take_along_axis(hidden, jnp.asarray(at)[..., None], axis=1)
        logp, best = map(np.asarray, scores(self.loaded.model, self.loaded.params, wanted, jnp.asarray(targets)))
        for b, i, ids in asked:
            value = float(logp[b, : len(ids)].astype(np.float64).sum())
            yield i, (value, bool((best[b, : len(ids)] == targets[b, : len(ids)]).all()))

    # ---------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The text behind each context, up to the first of its stop strings; a repeated request draws anew.

        Raises:
          ConfigError: generation options that are impossible or not built.
        """
        end, found = self._text_of(self.eot_token_id), [""] * len(requests)
        groups: dict[Generation, list[int]] = {}
        for i, request in enumerate(requests):
            asked = read_gen_kwargs(
                request.args[1], checkpoint=self._generation_config, end=end, default_count=self.max_gen_toks
            )
            groups.setdefault(asked, []).append(i)
        prompts = {i: self._prompt(requests[i].args[0], asked) for asked, group in groups.items() for i in group}
        for asked, group in groups.items():
            for part in _groups(sorted(group, key=lambda i: -len(prompts[i])), self.batch_size, "generating"):
                texts = self._answers([prompts[i] for i in part], part, asked)
                for i, text in zip(part, texts, strict=True):
                    found[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return found

    def _prompt(self, text: str, asked: Generation) -> list[int]:
        """Ids of a prompt, its newest where it leaves no room for the answer."""
        room = self.max_length - asked.room
        if room < 1:
            raise ConfigError(
                f"{asked.room} new tokens leave no room for a prompt in {self.max_length}: ask for fewer with "
                "--gen-kwargs max_gen_toks=N."
            )
        bos = self.tokenizer.bos
        special = False if has_bos_prefix(text, self._text_of(bos)) else self.add_bos_token
        return self._ids(text, special)[-room:] or [self.prefix_token_id]

    def _answers(self, prompts: Sequence[list[int]], places: Sequence[int], asked: Generation) -> list[str]:
        """Texts behind prompts that are generated together, each as it would be alone."""
        tokens, lengths = _padded(prompts, self.batch_size)
        counts = [asked.tokens(len(ids)) for ids in prompts]
        seed = jax.random.key(self.seed)
        places = [*places, *[0] * (self.batch_size - len(places))]
        keys = jax.vmap(lambda i: jax.random.fold_in(seed, i))(jnp.asarray(places, jnp.uint32))
        answers: list[list[int]] = [[] for _ in prompts]
        ends: list[int | None] = [None for _ in prompts]
        for new, own in stream(
            self.loaded.model, self.loaded.params, tokens, lengths=lengths, max_new_tokens=max(counts), key=keys,
            how=asked.how, stop_tokens=self.loaded.stop_tokens,
        ):  # fmt: skip
            for b, (ids, count) in enumerate(zip(answers, counts, strict=True)):
                if ends[b] is None:
                    ids += new[b][own[b]].tolist()
                    del ids[count:]
                    ends[b] = self._end(ids, asked.until)
            if all(e is not None or len(ids) >= n for e, ids, n in zip(ends, answers, counts, strict=True)):
                break
        return [self._answer(ids[:end], asked.until) for ids, end in zip(answers, ends, strict=True)]

    def _answer(self, ids: Sequence[int], until: Sequence[str]) -> str:
        """The text of new tokens, behind what was thought and up to the first stop string."""
        think = self.think_end_token
        if isinstance(think, int):
            begin = max((i + 1 for i, token in enumerate(ids) if token == think), default=0)
            text, think = self.tokenizer.decode(ids[begin:]).lstrip(), None
        else:
            text = self.tokenizer.decode(ids)
        return postprocess_generated_text(text, list(until), think)

    def _end(self, ids: Sequence[int], until: Sequence[str]) -> int | None:
        """How many tokens there are up to the first that completes a stop string, special tokens' text included."""
        stops = lambda count: any(s in self.tokenizer.decode(ids[:count], skip_special_tokens=False) for s in until)
        if not stops(len(ids)):
            return None
        return next(count for count in range(1, len(ids) + 1) if stops(count))


def _groups(items: Sequence[Any], size: int, label: str) -> Iterator[Sequence[Any]]:
    """Batches of `size`, with a progress bar where somebody looks."""
    for at in track(range(0, len(items), size), label, transient=True, console=Console(stderr=True)):
        yield items[at : at + size]


def _padded(rows: Sequence[Sequence[int]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids in `count` rows of one bucketed length, and how many each has; rows that are not there have one."""
    width = -(-max(map(len, rows)) // BUCKET) * BUCKET
    tokens, lengths = np.zeros((count, width), np.int32), np.ones(count, np.int32)
    for b, row in enumerate(rows):
        tokens[b, : len(row)], lengths[b] = row, len(row)
    return tokens, lengths
