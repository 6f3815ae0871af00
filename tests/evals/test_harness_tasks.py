"""Whole tasks: prompts, requests, filters and metrics are those of the harness's own HuggingFace model."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the oracle")
pytest.importorskip("lm_eval", reason="extra eval")
import lm_eval

from evals.harness import load_tasks
from tests.evals.harness_twin import CONTEXT

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: "{rows}", test: "{rows}"}}}}
output_type: {kind}
training_split: train
test_split: test
fewshot_split: train
description: "was he for. "
doc_to_text: "{{{{q}}}} ?"
doc_to_target: {target}
num_fewshot: 2
{more}
"""
CHOICES = "doc_to_choice: choices\nmetric_list: [{metric: acc}, {metric: acc_norm}]"
TEXTS = "repeats: 2\ngeneration_kwargs: {until: [e], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]"


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("tasks"), np.random.default_rng(6)
    words = lambda n: " ".join(rng.choice(["hello", "World", "it's", "café", "12", "東京", "(no)"], n))
    rows = [{"q": words(6), "choices": [words(2) for _ in range(3)], "gold": i % 3} for i in range(6)]
    rows = [r | {"a": r["choices"][r["gold"]]} for r in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    write = lambda name, kind, target, more: (folder / f"{name}.yaml").write_text(
        TASK.format(name=name, rows=folder / "rows.jsonl", kind=kind, target=target, more=more)
    )
    write("tiny_choice", "multiple_choice", "gold", CHOICES)
    write("tiny_prefix", "multiple_choice", "gold", CHOICES + '\ngen_prefix: "it is"')
    write("tiny_text", "generate_until", "a", TEXTS)
    write("tiny_rolling", "loglikelihood_rolling", "'{{q}}'", "metric_list: [{metric: word_perplexity}]")
    return folder


CHAT, SYSTEM = {"apply_chat_template": True}, {"system_instruction": "be at"}


@pytest.mark.usefixtures("small_index")
@pytest.mark.parametrize(
    ("twin", "options"),
    [
        ("llama2", {}),
        ("llama2", CHAT | SYSTEM | {"fewshot_as_multiturn": True}),
        ("llama3", CHAT | SYSTEM | {"fewshot_as_multiturn": False}),
        ("mistral", CHAT | {"fewshot_as_multiturn": True}),
        ("qwen2.5", SYSTEM),
        ("qwen3", CHAT | SYSTEM | {"fewshot_as_multiturn": True}),
    ],
    ids=[
        "llama2-text",
        "llama2-turns",
        "llama3-one turn",
        "mistral-no system",
        "qwen2.5-system text",
        "qwen3-thinking",
    ],
    indirect=["twin"],
)
def test_whole_tasks(twin, task_folder, options, monkeypatch):
    """Prompts with examples, requests, filters and metrics, as the command runs them."""
    for lm, name in ((twin.theirs, "_max_length"), (twin.ours, "max_length")):
        monkeypatch.setattr(lm, name, CONTEXT)
        if twin.kind == "qwen3":
            monkeypatch.setattr(lm, "chat_template_args", {"enable_thinking": False})
            monkeypatch.setattr(lm, "think_end_token", "e")
    tasks = "tiny_choice,tiny_prefix,tiny_text,tiny_rolling"
    found = [
        lm_eval.simple_evaluate(lm, tasks=load_tasks(tasks, task_folder), limit=4, bootstrap_iters=0, **options)
        for lm in (twin.ours, twin.theirs)
    ]
    ours, theirs = found
    for task, samples in theirs["samples"].items():
        for mine, other in zip(ours["samples"][task], samples, strict=True):
            assert mine["arguments"] == other["arguments"]
            assert flat(mine["resps"]) == pytest.approx(flat(other["resps"]), abs=1e-3), task
    for task, metrics in theirs["results"].items():
        for name, value in metrics.items():
            assert ours["results"][task][name] == (pytest.approx(value, rel=1e-5) if type(value) is float else value)


def flat(value: Any) -> list[Any]:
    """Numbers and texts of nested answers; texts are equal or not."""
    parts = [flat(part) for part in value] if isinstance(value, list | tuple) else [[value]]
    return [float(x) if isinstance(x, bool) else x for part in parts for x in part]
