"""Learning-rate schedules at the steps where they could be off by one."""

from __future__ import annotations

import dataclasses

import pytest

from jaxattn.models import ModelConfig
from jaxattn.runs.config import OptimConfig
from train.optimizer import make_schedule
from train.presets import get_preset
from train.step import make_train_step


def test_warm_up_rises_to_the_peak_and_then_the_schedule_starts():
    lr = make_schedule(OptimConfig(lr=1.0, warmup_steps=4, schedule="linear", min_lr_ratio=0.5), 8)
    assert [float(lr(i)) for i in range(9)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.875, 0.75, 0.625, 0.5])


def test_cosine_ends_at_its_floor():
    lr = make_schedule(OptimConfig(lr=2.0, schedule="cosine", min_lr_ratio=0.1), 10)
    assert [float(lr(0)), float(lr(5)), float(lr(10))] == pytest.approx([2.0, 1.1, 0.2])


def test_a_run_shorter_than_the_warm_up_is_allowed():
    """`--steps=20` alone must work with every preset; the run ends inside the warm-up."""
    cfg = dataclasses.replace(get_preset("bb"), steps=20)
    lr = make_schedule(cfg.optim, cfg.steps)
    assert float(lr(19)) == pytest.approx(cfg.optim.lr * 20 / cfg.optim.warmup_steps)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_runs_of_any_length_share_a_step_where_the_rate_is_constant(schedule):
    optim, model = OptimConfig(schedule=schedule), ModelConfig(vocab_size=5)
    first, same, longer = (make_train_step(model, optim, steps) for steps in (8, 8, 12))
    assert first is same
    assert (first is longer) == (schedule == "constant")
    assert make_train_step(model, OptimConfig(schedule=schedule, lr=0.5), 8) is not first
