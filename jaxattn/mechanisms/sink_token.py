"""Softmax attention with a learnable sink token in front of every sequence.

Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453, section 3.3, "Learnable
Sink") and When Attention Sink Emerges in Language Models (arXiv 2410.10781, "sink token").

The mechanism itself is plain softmax. It asks the model for `tokens` learned embeddings in front of the
stream: they pass through every layer at positions 0..tokens-1, every segment sees them, and the model
drops them before the logits. They attend only to each other, so one copy serves all packed documents.
"""

from __future__ import annotations

import dataclasses

from jaxtyping import Array

from jaxattn.errors import ConfigError
from jaxattn.mechanisms import softmax
from jaxattn.mechanisms._score_family import score_family
from pallas_kernels import Score


@dataclasses.dataclass(frozen=True)
class Spec:
    """tokens: how many sink tokens are put in front."""

    tokens: int = 1

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"sink_token.tokens is {self.tokens} but must be at least 1.")


def row_weights(s: Array, see: Array, spec: Spec) -> Array:
    return softmax.row_weights(s, see, softmax.Spec())


MECHANISM = score_family(
    name="sink_token",
    title="Softmax with a learnable sink token",
    arxiv="2309.17453",
    equation="softmax([x*; X])",
    spec=Spec,
    row_weights=row_weights,
    score=lambda spec: Score("exp", "sum"),
    prefix_tokens=lambda spec: spec.tokens,
)
