"""Generation options of the harness's tasks, read as transformers' `generate` reads them, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from jaxattn.errors import ConfigError, shown
from jaxattn.sampling import Sampling

SAMPLING = ("temperature", "top_k", "top_p", "min_p")
TOP_K = 50  # of transformers, where neither the task nor the checkpoint names one

# Options of `generate` that are not built, with the values that change nothing.
INERT: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1),
    "max_time": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0),
    "repetition_penalty": (None, 1),
    "sequence_bias": (None, {}, []),
    "stop_strings": (None, []),
    "suppress_tokens": (None, []),
    "token_healing": (None, False),
    "watermarking_config": (None,),
}
# The same, of those that matter only to sampling.
INERT_TO_GREEDY: dict[str, tuple[Any, ...]] = {
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "top_h": (None,),
    "typical_p": (None, 1),
}
# Without beams these have no meaning, whatever they are.
MEANINGLESS = ("early_stopping", "length_penalty", "remove_invalid_values", "renormalize_logits", "use_cache")


class Generation(NamedTuple):
    """One way to generate: at most `count` tokens, or up to `length` with the prompt, ending at a string of `until`;
    prompts leave room for `room` tokens."""

    how: Sampling
    count: int
    length: int | None
    until: tuple[str, ...]
    room: int

    def tokens(self, prompt: int) -> int:
        """Most new tokens behind a prompt of so many."""
        return self.count if self.length is None else max(1, self.length - prompt)


def read_gen_kwargs(
    given: Mapping[str, Any], *, checkpoint: Mapping[str, Any], end: str | None, default_count: int
) -> Generation:
    """What a task's `generation_kwargs` ask for.

    Args:
      given: of the task, with --gen-kwargs.
      checkpoint: its generation_config.json, which holds where `given` says nothing.
      end: the end-of-text token as text, which ends an answer too.
      default_count: tokens, where `given` names no number.

    Raises:
      ConfigError: an option that is not built has a value that would change the answer, or a value is impossible.
    """
    try:
        asked: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), default_count))
        until = handle_stop_sequences(asked.pop("until", None), eos=end)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"generation_kwargs {shown(dict(given))} cannot be read ({error}).") from error
    if not all(isinstance(stop, str) for stop in until):
        raise ConfigError(f"generation_kwargs.until is {shown(until)} but must be texts.")
    count, length, sampled = asked.pop("max_gen_toks"), asked.pop("max_length", None), asked.pop("do_sample")
    if count < 1 or not isinstance(length, int | None):
        raise ConfigError(f"generation_kwargs ask for {count} tokens, max_length {length}: use at least 1 token.")
    inert = INERT if not sampled else INERT | INERT_TO_GREEDY
    known = (*SAMPLING, *INERT, *INERT_TO_GREEDY, *MEANINGLESS)
    for name, value in asked.items():
        if name not in known:
            raise ConfigError(f"generation_kwargs.{name} is not built; known are {', '.join(sorted(known))}.")
        if name in inert and value not in inert[name]:
            raise ConfigError(f"generation_kwargs.{name} is {shown(value)}, which is not built; leave it out.")
    for name, neutral in inert.items():
        if name not in asked and (value := checkpoint.get(name)) not in neutral:
            raise ConfigError(
                f"generation_config.json of the checkpoint sets {name} to {shown(value)}, which is not built; "
                f"give --gen-kwargs {name}={neutral[-1]} to do without it."
            )
    room, most = count, checkpoint.get("max_new_tokens")
    if most is not None:  # as in transformers, it goes before a length, which is how the harness asks for `count`
        if type(most) is not int or most < 1:
            raise ConfigError(
                f"generation_config.json of the checkpoint sets max_new_tokens to {shown(most)} but it must be a "
                "whole number of at least 1; repair the file."
            )
        count, length = most, None
    return Generation(_sampling(asked, checkpoint) if sampled else Sampling(), count, length, tuple(until), room)


def _sampling(asked: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> Sampling:
    """The filters of a sampled answer; the temperature is the task's alone."""
    temperature = asked.get("temperature", 0.0)
    if not temperature:
        raise ConfigError("generation_kwargs.do_sample is True without a temperature: give a positive one.")
    found = {name: asked.get(name, checkpoint.get(name)) for name in ("top_k", "top_p", "min_p")}
    top_k = TOP_K if found["top_k"] is None else found["top_k"]
    top_p = 1.0 if found["top_p"] is None else found["top_p"]
    try:
        return Sampling(float(temperature), int(top_k), float(top_p), float(found["min_p"] or 0.0))
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"generation_kwargs {shown(dict(asked))} hold no numbers ({error}).") from error
