"""Roofs of a CPU: nobody is above them, and what is taken for one is measured."""

from __future__ import annotations

import pytest

from scripts.bench import cpu_roofs, infer_cpu


def test_the_best_product_of_every_library_is_a_rate_of_this_machine():
    shapes = {(64, 128, 96): 2, (64, 96, 128): 1}
    rates = cpu_roofs.products("float32", shapes)
    assert set(rates) >= {"XLA", "NumPy"}
    assert all(1e6 < rate < 1e14 for rate in rates.values())
    assert "NumPy" not in cpu_roofs.products("bfloat16", {(8, 8, 8): 1}), "it has no such numbers"


def test_a_product_costs_its_multiplications_as_often_as_it_occurs(monkeypatch):
    sent = []
    monkeypatch.setattr(cpu_roofs, "_least", lambda call: 1e-3)
    pipe = type("Pipe", (), {"send": staticmethod(sent.append)})
    cpu_roofs._serve("NumPy", "float32", {(10, 20, 30): 3, (10, 30, 5): 1}, pipe)
    assert sent == [pytest.approx((2 * 10 * 20 * 30 * 3 + 2 * 10 * 30 * 5) / 4e-3)]


def test_a_library_that_is_not_there_has_no_rate(monkeypatch):
    monkeypatch.setattr(cpu_roofs, "LIBRARIES", ("NumPy",))
    assert cpu_roofs.products("bfloat16", {(8, 8, 8): 1}) == {}


def test_nobody_exceeds_a_roof():
    slow = {"prefill": {"XLA": 1.0, "NumPy": 2.0}, "decode": {"reading": 10.0}}
    later = {"prefill": {"XLA": 4.0}, "decode": {"reading": 20.0}}
    flop = infer_cpu.FLOP_PER_TOKEN
    found = {"weight_bytes": 2, "tokens_per_s": {"ours": {"prefill": 3.0 / flop, "decode": 30.0}}}
    roofs = infer_cpu.roofs(found, slow, later)
    assert (roofs["prefill"]["rate"], roofs["prefill"]["whose"]) == (4.0, "XLA"), "of all samples the best"
    assert (roofs["decode"]["rate"], roofs["decode"]["whose"]) == (60.0, "ours"), "or a contender's own"
    for part, roof in roofs.items():
        assert found["tokens_per_s"]["ours"][part] <= roof["tokens_per_s"] * (1 + 1e-12)


def test_flop_of_a_token_are_those_of_the_kernels_and_of_attention():
    assert pytest.approx(2 * 106.2e6 + 30 * 4 * 576 * 256, rel=1e-3) == infer_cpu.FLOP_PER_TOKEN
