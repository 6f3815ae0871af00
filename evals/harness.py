"""Our checkpoints in EleutherAI's lm-evaluation-harness: `python -m evals.harness CKPT --tasks hellaswag,arc_easy`.

`JaxattnLM` answers the harness's three questions: `loglikelihood` of a continuation, `loglikelihood_rolling` of a whole
text, `generate_until` a stop string. Needs the extra `eval`; the tasks' data come from the HuggingFace hub.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.model import LM
from rich.progress import track

from evals.perplexity import losses
from evals.trained import write_result
from jaxattn.errors import ConfigError, run_cli
from jaxattn.nn import Decoder
from jaxattn.sampling import Sampling
from jaxattn.text import Loaded, load, stream_text

BUCKET = 64  # sequence lengths are rounded up to a multiple of this, so few programs are compiled


class JaxattnLM(LM):
    """A converted checkpoint or trained run as the harness's model."""

    def __init__(self, loaded: Loaded, *, batch_size: int = 8, max_new_tokens: int = 256) -> None:
        super().__init__()
        self.loaded, self.batch, self.max_new_tokens = loaded, batch_size, max_new_tokens
        model = loaded.model

        @jax.jit
        def score(params: Any, tokens: Any, live: Any) -> tuple[Any, Any]:
            """log p of tokens[:, 1:] [b, T], and whether each is the likeliest."""
            logits: Any = Decoder(model).apply({"params": params}, tokens[:, :-1], None, live)
            logp, targets = jax.nn.log_softmax(logits, axis=-1), tokens[:, 1:]
            return jnp.take_along_axis(logp, targets[..., None], -1)[..., 0], jnp.argmax(logits, -1) == targets

        self._score = score

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """log p (nats) of each continuation behind its context, and whether greedy decoding would give it.

        Raises:
          ConfigError: a continuation alone is longer than the model's context.
        """
        pairs = [self._pair(*request.args) for request in requests]
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]))
        found: dict[int, tuple[float, bool]] = {}
        for at in track(range(0, len(order), self.batch), "loglikelihood", transient=True):
            group = order[at : at + self.batch]
            longest = -(-len(pairs[group[0]][0]) // BUCKET) * BUCKET
            tokens = np.zeros((self.batch, longest + 1), np.int32)
            live = np.zeros((self.batch, longest), np.int32)
            for row, i in enumerate(group):
                ids, _ = pairs[i]
                tokens[row, : len(ids)], live[row, : len(ids) - 1] = ids, 1
            logp, best = (
                np.asarray(x) for x in self._score(self.loaded.params, jnp.asarray(tokens), jnp.asarray(live))
            )
            for row, i in enumerate(group):
                ids, count = pairs[i]
                cut = slice(len(ids) - 1 - count, len(ids) - 1)
                found[i] = float(logp[row, cut].astype(np.float64).sum()), bool(best[row, cut].all())
        return [found[i] for i in range(len(pairs))]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """log p (nats) of each whole text behind an end-of-text token, in windows of the model's context."""
        found = []
        for request in track(requests, "rolling", transient=True):
            ids = [*self._start(), *self.loaded.tokenizer.encode(request.args[0])]
            context = min(self.loaded.context, max(2, -(-len(ids) // BUCKET) * BUCKET))
            values = losses(self.loaded.model, self.loaded.params, np.asarray(ids), context=context, stride=context)
            found.append(-float(values.sum()))
        return found

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy (or sampled) text behind each context, up to the first of its stop strings."""
        found, loaded = [], self.loaded.prepared()
        for request in track(requests, "generating", transient=True):
            prompt, options = request.args
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            count = int(options.get("max_gen_toks", self.max_new_tokens))
            how = Sampling(float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0)
            ids = self.loaded.encode(prompt)[-max(1, self.loaded.context - count) :]
            found.append("".join(stream_text(loaded, ids, max_new_tokens=count, how=how, stop=until)))
        return found

    def _start(self) -> list[int]:
        return [self.loaded.stop_tokens[0]] if self.loaded.stop_tokens else []

    def _pair(self, prompt: str, continuation: str) -> tuple[list[int], int]:
        """Ids of both, cut on the left to the context, and how many belong to the continuation.

        The border is where the tokens of the whole text begin to differ from the context's, blanks on the right of
        the context going to the continuation, as the harness's own models do it.
        """
        blanks = len(prompt) - len(prompt.rstrip())
        if blanks:
            prompt, continuation = prompt[:-blanks], prompt[-blanks:] + continuation
        encode = self.loaded.tokenizer.encode
        before = encode(prompt) if prompt else self._start()
        whole = encode(prompt + continuation) if prompt else [*before, *encode(continuation)]
        count = len(whole) - len(before)
        most = self.loaded.context + 1
        if not 0 < count < most:
            raise ConfigError(f"a continuation of {count} tokens does not fit a context of {most - 1}.")
        return whole[-most:], count


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m evals.harness", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="converted checkpoint or run of text")
    parser.add_argument("--tasks", required=True, help="comma-separated names of the harness's tasks")
    parser.add_argument("--limit", type=int, help="only this many examples a task")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the results here")
    args = parser.parse_args()
    import lm_eval

    model = JaxattnLM(load(args.checkpoint), batch_size=args.batch_size)
    found = lm_eval.simple_evaluate(model=model, tasks=args.tasks.split(","), limit=args.limit)
    results = (found or {}).get("results", {})
    if args.json:
        write_result(args.json, results)
    print(json.dumps(results, indent=2, default=str))
    return 0


if __name__ == "__main__":
    run_cli(main)
