"""The learning rate as a pure function of the step, so that nothing of it needs saving."""

from __future__ import annotations

import math

from train.config import Train


def lr_at(step: int, train: Train) -> float:
    """Learning rate of the update number `step` (from 0)."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    fall = done if train.schedule == "linear" else (1 - math.cos(math.pi * min(1.0, done))) / 2
    return train.lr * (1 - (1 - train.final_lr_share) * min(1.0, fall))
