"""optax chains from an `OptimConfig`."""

from __future__ import annotations

import optax

from jaxattn.runs.config import OptimConfig


def make_schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate at a step: linear warm-up, then constant, cosine or linear decay to the last step."""
    rest = max(1, steps - cfg.warmup_steps)
    end = cfg.lr * cfg.min_lr_ratio
    after = {
        "constant": lambda: optax.constant_schedule(cfg.lr),
        "cosine": lambda: optax.cosine_decay_schedule(cfg.lr, rest, cfg.min_lr_ratio),
        "linear": lambda: optax.linear_schedule(cfg.lr, end, rest),
    }[cfg.schedule]()
    if not cfg.warmup_steps:
        return after
    # The first step already moves: step 0 trains with lr / warmup_steps.
    warm = optax.linear_schedule(cfg.lr / cfg.warmup_steps, cfg.lr, max(1, cfg.warmup_steps - 1))
    return optax.join_schedules([warm, after], [cfg.warmup_steps])


def make_optimizer(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Gradient clipping by global norm (if on), then AdamW or SGD with momentum."""
    schedule = make_schedule(cfg, steps)
    if cfg.name == "adamw":
        core = optax.adamw(schedule, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay)
    else:
        core = optax.chain(
            optax.add_decayed_weights(cfg.weight_decay) if cfg.weight_decay else optax.identity(),
            optax.sgd(schedule, momentum=cfg.momentum or None),
        )
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), core) if cfg.clip_norm else core
