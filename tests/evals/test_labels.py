"""Names cut for figures: they fit, they stay apart, and what tells them apart is what is left."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.labels import middle, tell_apart

PATTERN = "softmax(window=32), sigmoid(normalise=True, train_len={}), softmax_off_by_one, relu"


@pytest.mark.parametrize("limit", [14, 24, 40])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("bb-softmax-window-64-and-a-very-long-name-indeed-seed{}", range(10)),
        ("bb_softmax_window_64_and_a_very_long_name_indeed_seed{}", range(10)),
        ("softmax(window=64, row_sum=0.5), sigmoid(normalise=True), seed {}", range(10)),
        ("{} is how this very long name of a run begins", range(10)),
        ("a name with {} in the middle of much that all of the runs have", range(10)),
    ],
)
def test_what_differs_is_what_stays(name, values, limit):
    shown = tell_apart([name.format(v) for v in values], limit)
    assert len(set(shown)) == len(shown)
    assert all(len(text) <= limit for text in shown)
    for value, text in zip(values, shown, strict=True):
        assert str(value) in text


def test_by_hand():
    assert tell_apart(["softmax", "relu"], 24) == ["softmax", "relu"]
    assert tell_apart(["x" * 30] * 2, 11) == ["xxxxx…xxxxx"] * 2
    assert middle("abcdefghij", 5) == "ab…ij"
    names = ["softmax", PATTERN.format(128), PATTERN.format(1024)]
    assert tell_apart(names, 28) == ["softmax", "softmax(…train_len=128…", "softmax(…train_len=1024…"]


@given(
    st.lists(st.text(string.ascii_lowercase[:3] + "_=(), 01", min_size=1, max_size=60), min_size=1, max_size=8),
    st.integers(12, 40),
)
@settings(max_examples=300, deadline=None)
def test_any_names_fit_and_stay_apart(names, limit):
    shown = tell_apart(names, limit)
    assert all(len(text) <= limit for text in shown)
    assert len(set(shown)) == len(set(names))
    for a, b in zip(names, shown, strict=True):
        assert all(x == a for x, y in zip(names, shown, strict=True) if y == b)
