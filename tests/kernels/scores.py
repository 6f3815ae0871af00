"""One member of every kind of score, for tests that ask all of them."""

from __future__ import annotations

from pallas_kernels import Score

SOFTMAX = Score()
SCORES = [
    SOFTMAX,
    Score("exp", "sum", row_sum=3.0, logit_bias=0.5),
    Score("exp", "sum_plus_one"),
    Score("exp", "p_norm", p=0.5),
    Score("sigmoid", "none", logit_bias=-2.0),
    Score("sigmoid", "p_norm", p=2.0),
    Score("elu1", "sum"),
    Score("elu1", "p_norm", p=1.5),
    Score("relu", "count"),
    Score("relu", "sum_plus_one"),
    Score("identity", "clipped_sum"),
]
ids = lambda s: f"{s.activation}-{s.normaliser}"
