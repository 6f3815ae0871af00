"""The harness adapter answers as a direct computation does, and the harness runs on it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import ConfigError
from jaxattn.nn import Decoder
from jaxattn.text import load
from tests.generate.helpers import byte_run

pytest.importorskip("lm_eval", reason="extra eval")
from lm_eval.api.instance import Instance

from evals.harness import JaxattnLM


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return JaxattnLM(load(byte_run(tmp_path_factory.mktemp("harness"))), batch_size=3)


def ask(kind, *args):
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)


def log_p(adapter, ids):
    """log p of every token but the first, by one plain forward pass."""
    run = jax.jit(Decoder(adapter.loaded.model).apply)
    logits = run({"params": adapter.loaded.params}, jnp.asarray([ids]))[0]
    logp = np.asarray(jax.nn.log_softmax(logits))
    return logp[np.arange(len(ids) - 1), ids[1:]], logp.argmax(-1)


def test_loglikelihoods_are_those_of_a_forward_pass_in_any_batch(adapter):
    cases = [("abc", " de"), ("a", "b"), ("", "xyz"), ("blank ", "x"), ("some", " more text")]
    found = adapter.loglikelihood([ask("loglikelihood", *c) for c in cases])
    for (prompt, more), (value, greedy) in zip(cases, found, strict=True):
        ids = list((prompt + more).encode()) if prompt else [256, *more.encode()]
        count = len(more) + (prompt.endswith(" "))
        values, best = log_p(adapter, ids)
        assert value == pytest.approx(float(values[-count:].sum()), abs=1e-3)
        assert greedy == bool(np.all(best[-count - 1 : -1] == ids[-count:]))


def test_what_greedy_decoding_says_is_greedy(adapter):
    (text,) = adapter.generate_until([ask("generate_until", "ab", {"until": [], "max_gen_toks": 3})])
    ids = list(b"ab")
    for _ in range(3):
        ids.append(int(log_p(adapter, [*ids, 0])[1][len(ids) - 1]))
    assert text == adapter.loaded.tokenizer.decode(ids[2:])


def test_rolling_sums_separate_windows(adapter):
    text = "a text of more than sixteen tokens"
    (value,) = adapter.loglikelihood_rolling([ask("loglikelihood_rolling", text)])
    ids = [256, *text.encode()]
    total = sum(log_p(adapter, ids[i : i + 17])[0].sum() for i in range(0, len(ids) - 1, 16))
    assert value == pytest.approx(float(total), abs=1e-3)


def test_text_ends_at_the_stop_string(adapter):
    (whole,) = adapter.generate_until([ask("generate_until", "ab", {"until": [], "max_gen_toks": 8})])
    stop = whole[2:4]
    (cut,) = adapter.generate_until([ask("generate_until", "ab", {"until": [stop], "max_gen_toks": 8})])
    assert cut == whole[: whole.index(stop)]


def test_a_continuation_that_does_not_fit_is_refused(adapter):
    with pytest.raises(ConfigError, match="does not fit a context of 16"):
        adapter.loglikelihood([ask("loglikelihood", "a", "b" * 17)])


def test_the_harness_runs_a_task_on_it(adapter, tmp_path):
    """A task of its own, from a file: multiple choice over loglikelihoods."""
    import json

    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = [{"q": "a", "choices": ["b", "c"], "gold": i % 2} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "toy.yaml").write_text(
        "task: toy\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'data.jsonl'}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{q}}'\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list:\n  - metric: acc\n"
    )
    found = lm_eval.simple_evaluate(
        model=adapter, tasks=["toy"], task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False)
    )
    assert found["results"]["toy"]["acc,none"] == 0.5
