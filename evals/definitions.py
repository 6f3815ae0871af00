"""What every measured number means: one text for a name, wherever it is written, printed or drawn.

Names ending in `_raw` are of the operation's own weights A; all other start-token weights and sink rates are of
the row shares A'. Imports nothing of JAX: reports open where no accelerator stack works.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

SHARE_EPS = 1e-8
NEARLY_EMPTY = 1e-6
NO_DISTRIBUTION = 1e-3

SINK_STUDY, BB_STUDY = "arXiv 2410.10781", "arXiv 2410.13835"


class Definition(NamedTuple):
    """A quantity: its key in `sinks.json` and `metrics.jsonl` ("" for a term), its name for people, its meaning.

    A term with `needs` says nothing to a reader who has no number of that key.
    """

    key: str
    name: str
    text: str
    needs: str = ""


TERMS = (
    Definition(
        "",
        "Row share A'",
        f"A' = |A| / (Σ|A| + 1e-8), the sum over a query's row with its slots. Where rows are distributions "
        f"it is A itself; where they are not, it stands in for A in every number without “raw” in its name, as in "
        f"{SINK_STUDY}. Of a row with Σ|A| < 1e-6 the constant takes more than 1 %: see nearly empty rows.",
    ),
    Definition("", "*", "A number of A' of an attention whose rows are no distributions; the model itself uses A."),
    Definition(
        "",
        "Slot",
        "A key in front of the tokens: learned (sink token, key or value bias), or constant (the 1 in the denominator "
        "of softmax-off-by-one), which has no parameter.",
        needs="sink_rate_slot",
    ),
    Definition(
        "",
        "Trigger, non-trigger query",
        "On Bigram-Backcopy data the token after a trigger copies the one before it; all other tokens follow a bigram "
        "table. A head is active on the former and dormant, dumping on the start token, on the latter. "
        f"{BB_STUDY}.",
        needs="first_token_weight_nontrigger",
    ),
    Definition("", "Oracle", "Loss of a perfect model, which is known of synthetic data.", needs="oracle_nats"),
    Definition(
        "",
        "Unigram, bigram entropy",
        "Loss of the best model that sees no context, or one token of it, in nats per token; the bigram figure is "
        "measured on held-out data where the run recorded it.",
        needs="unigram_nats",
    ),
)

MEASURED = (
    Definition("loss", "Training loss", "Mean cross-entropy of the step's batch, nats per token."),
    Definition("val_loss", "Validation loss", "Mean cross-entropy of the first eval.batches held-out batches, nats."),
    Definition("val_accuracy", "Validation accuracy", "Share of a task's scored positions with the right token first."),
    Definition("val_exact", "Whole answers right", "Share of a task's sequences with every scored token right."),
    Definition(
        "sink_rate",
        "Sink₁",
        "Share of (sequence, layer, head) triples with α₁ > ε, in percent; ε = 0.3 unless stated. The threshold is "
        f"applied before any mean is taken. {SINK_STUDY}, section 3.2.",
    ),
    Definition(
        "sink_rate_by_position",
        "Sinkₖ",
        "Share of (sequence, layer, head) triples with αₖ > ε, in percent, for the keys at positions k = 1, 2, …",
    ),
    Definition(
        "sink_rate_slot",
        "Sink on the slot",
        "Share of (sequence, layer, head) triples in which the largest α of a slot is above ε, in percent.",
    ),
    Definition(
        "first_token_weight",
        "Start-token weight α₁",
        "Mean of A'[i,1] over the queries i ≥ 1 that can see the first token, its own (which is 1 in causal softmax) "
        f"included; [layer][head], then mean over sequences. Uniform attention gives 0.07 at T = 64. {SINK_STUDY}.",
    ),
    Definition(
        "first_token_weight_raw",
        "Start-token weight, raw",
        "Mean of A[i,1], not of A', over the queries i ≥ 1 that can see the first token, its own included.",
    ),
    Definition(
        "first_token_weight_slot",
        "Slot weight",
        "α of the slot with the largest one, which is the mean of its A' over all queries; [layer][head].",
    ),
    Definition(
        "first_token_weight_nontrigger",
        "Start-token weight, non-trigger queries",
        f"Mean of A'[i,1] over non-trigger queries i ≥ 2 that can see the first token; [layer][head]. {BB_STUDY}.",
    ),
    Definition(
        "first_token_weight_nontrigger_raw",
        "Start-token weight, non-trigger queries, raw",
        "Mean of A[i,1], not of A', over non-trigger queries i ≥ 2 that can see the first token; [layer][head].",
    ),
    Definition(
        "first_token_weight_trigger",
        "Start-token weight, trigger queries",
        "Mean of A'[i,1] over trigger queries i ≥ 2 that can see the first token; [layer][head].",
    ),
    Definition(
        "first_token_weight_trigger_raw",
        "Start-token weight, trigger queries, raw",
        "Mean of A[i,1], not of A', over trigger queries i ≥ 2 that can see the first token; [layer][head].",
    ),
    Definition(
        "rows_no_distribution",
        "Rows that are no distributions",
        "Share of the queries' rows of A, in percent, with a weight below "
        f"-{NO_DISTRIBUTION:g} or a sum more than {NO_DISTRIBUTION:g} from one; [layer][head].",
    ),
    Definition(
        "rows_nearly_empty",
        "Nearly empty rows",
        "Share of the queries' rows of A, in percent, with Σ|A| < 1e-6; [layer][head]. Their A' sums to "
        "less than 0.99, and to 0 where nothing is attended to: they count against every sink.",
    ),
    Definition(
        "sink_logit",
        "Sink logit",
        "Mean over queries i ≥ 3 that can see the first token (non-trigger ones on Bigram-Backcopy) of s[i,1] minus "
        f"the mean of the visible s[i,j], 1 < j < i, before the non-linearity; [layer][head]. {BB_STUDY}.",
    ),
    Definition(
        "sink_logit_std",
        "Sink logit, spread",
        "Standard deviation of the sink logit over queries and sequences; [layer][head].",
    ),
    Definition(
        "value_drain",
        "Value drain",
        "Norm of the start token's value after the output projection, ‖W_O v‖, over the mean of the other tokens': far "
        f"below 1 means that attending to it adds nothing; [layer][head], none where the others are 0. {BB_STUDY}.",
    ),
    Definition("value_norm_first", "Value norm, first token", "‖W_O v₁‖, mean over sequences; [layer][head]."),
    Definition("value_norm_rest", "Value norm, other tokens", "‖W_O vⱼ‖, mean over j > 1, sequences; [layer][head]."),
    Definition(
        "residual_peak",
        "Residual peak",
        "Norm of the start token's residual stream after a block minus the mean of the others' (“massive "
        f"activation”); [layer]. {BB_STUDY}, {SINK_STUDY}.",
    ),
    Definition("residual_norm_first", "Residual norm, first token", "After each block, mean over sequences; [layer]."),
    Definition(
        "residual_norm_rest",
        "Residual norm, other tokens",
        "After each block, mean over the other tokens and sequences; [layer].",
    ),
    Definition(
        "risk_backcopy",
        "Backcopy risk",
        f"Cross-entropy on trigger queries, nats; a perfect model reaches 0. {BB_STUDY}.",
    ),
    Definition("risk_bigram", "Bigram risk", "Cross-entropy on the other queries t ≥ 2, nats."),
    Definition(
        "risk_bigram_excess",
        "Bigram excess",
        "Bigram risk minus what the bigram table itself reaches on the same tokens, nats.",
    ),
)

NAMES = {d.key: d.name for d in MEASURED}


def definitions(keys: Iterable[str]) -> dict[str, str]:
    """{key: meaning} of those `keys` that are measured quantities, and of the share they are of."""
    texts = {d.key: d.text for d in MEASURED}
    return {"A'": TERMS[0].text} | {key: texts[key] for key in keys if key in texts}
