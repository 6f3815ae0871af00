"""The study of retrieval heads: what it masks is what its rows say, prompts are read once, and verdicts can fail."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from evals.needles import Asked
from jaxattn.errors import ConfigError
from scripts.reproduce import _study as study
from scripts.reproduce import retrieval_heads as script
from tests.analysis.planted import INDUCTION, MODEL, SINK, params

SCORES = np.linspace(0, 0.5, 40).reshape(4, 10)


def test_what_is_masked_is_the_first_heads_or_as_many_of_low_scores():
    found = script.masks(SCORES, tops=[3, 6], draws=2)
    names = [tuple(named.values()) for named, _ in found]
    assert len(set(names)) == len(names) == 1 + 2 * 2 * 3 + 3
    for named, mask in found:
        assert mask.heads.sum() == named["heads"]
        assert (mask.by, mask.phases) == (named["by"], named["phases"])
        if named["which"] == "first":
            assert set(np.flatnonzero(mask.heads)) == set(range(40 - named["heads"], 40))
        elif named["which"] == "drawn":
            assert SCORES[mask.heads].max() < 0.1
    drawn = [np.flatnonzero(mask.heads).tolist() for named, mask in found if named["which"] == "drawn"]
    assert drawn[0] != drawn[1]
    assert found[0][1].policy == "mask_heads(top=0)"
    alone = script.masks(SCORES, tops=[3, 6], draws=2, prompts=False)
    assert [named for named, _ in alone] == [named for named, _ in found if named["phases"] == "answers"]


@pytest.mark.parametrize("phases", ["answers", "all"])
def test_answers_under_masks_behind_one_prompt(phases, monkeypatch):
    """A model that copies what followed a token before: token 2 is followed by 3 4 5 6 7."""
    text = {n: str(n - 2) for n in range(3, 12)} | {1: "."}
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(text.get(i, "?") for i in ids), vocab_size=24)
    loaded = SimpleNamespace(model=MODEL, params=params(), tokenizer=tokenizer, stop_tokens=(1,))
    prompts = [[20, 2, 3, 4, 5, 6, 7, 1, 21, 22], [22, 2, 7, 6, 5, 4, 3, 1, 20, 21]]
    needles = script.Needles(
        loaded, [Asked(prompt, [2], answer, 0) for prompt, answer in zip(prompts, ("12345", "54321"), strict=True)]
    )
    mask = np.zeros((2, 4), bool)
    first, other = mask.copy(), mask.copy()
    first[INDUCTION], other[SINK] = True, True
    reads = []
    plain = script.read_prompts
    monkeypatch.setattr(script, "read_prompts", lambda *given, **more: reads.append(1) or plain(*given, **more))
    for _ in range(2):  # the states behind the prompt are still there
        assert needles.right(script.Mask(mask, "uniform", phases)) == {"digits": 1.0, "needles": 1.0}
    assert needles.right(script.Mask(other, "zero", phases)) == {"digits": 1.0, "needles": 1.0}
    assert needles.right(script.Mask(first, "uniform", phases))["digits"] < 0.5
    assert len(reads) == (1 if phases == "answers" else 4)


def rows(**other: float) -> list[study.Row]:
    """Digits of a study that holds but for those given as WHICH_HEADS."""
    some = {"by": "uniform", "phases": "answers"}
    out = [{"which": "none", "heads": 0, "draw": 0, "digits": 0.96, **some}]
    for top, first in ((5, 0.6), (10, 0.4)):
        out.append({"which": "first", "heads": top, "draw": 0, "digits": other.get(f"first_{top}", first), **some})
        for draw in range(2):
            digits = other.get(f"drawn_{top}", 0.9) + 0.02 * draw
            out.append({"which": "drawn", "heads": top, "draw": draw, "digits": digits, **some})
    return out


def profile(high: int = 3) -> dict:
    scores = np.zeros(80)
    scores[:high] = 0.5
    scores[high:20] += np.linspace(0.09, 0.01, max(0, 20 - high))
    return {"retrieval": scores.reshape(8, 10).tolist(), "induction": scores.reshape(8, 10).tolist()}


def test_expectations_hold_and_fail():
    failing = lambda found, **other: [e.text for e in script.expect(rows(**other), found) if not e.holds]
    assert failing(profile()) == []
    assert failing(profile(high=9)) == ["1 to 10 % of heads score 0.1 or more"]
    assert failing(profile(), first_5=0.91) == [
        "uniform, in answers: no more digits without the first 5 heads than without any 5 drawn"
    ]
    assert failing(profile(), first_10=0.5) == [
        "uniform, in answers: without the first 10 at most half of dense's digits"
    ]
    assert failing(profile(), drawn_10=0.8) == [
        "uniform, in answers: without 10 drawn ones at most 10 points less than dense, on average"
    ]
    other = profile() | {"induction": np.array(profile()["induction"])[::-1].tolist()}
    assert failing(other) == ["first 20 heads among the first 20 by induction: more than three times chance"]


def test_impossible_flags_are_refused_before_anything_runs(monkeypatch, tmp_path):
    words = [str(tmp_path), "--text", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    for more, message in ((["--draws=0"], "--draws is 0"), (["--tops=a"], "--tops is 'a'")):
        monkeypatch.setattr(sys, "argv", ["retrieval_heads", *words, *more])
        with pytest.raises(ConfigError, match=message):
            script.main()
    assert not (tmp_path / "out").exists()


def test_rows_of_another_setup_are_not_known(tmp_path):
    path = tmp_path / "a.json"
    assert study.known_rows(path, {}) == []
    path.write_text(json.dumps({"setup": {"n": 1}, "rows": [{"x": 1}]}))
    assert study.known_rows(path, {"n": 1}) == [{"x": 1}]
    assert study.known_rows(path, {"n": 2}) == []
