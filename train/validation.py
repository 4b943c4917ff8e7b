"""Validation while training: the run's own losses on held-out data, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from train import config as cfg
from train.feed import Feed, open_feed
from train.loss import counted

if TYPE_CHECKING:
    from train.engine import Engine, World


@dataclass
class Validation:
    """Held-out data, and the loss on it at every checkpoint so far."""

    feed: Feed
    settings: cfg.Validation
    weights: dict[str, float]
    """Of the losses that the model computes, in its order."""
    history: list[dict[str, float]] = field(default_factory=list)
    """{step, loss} of every validation, in order; part of the checkpoint."""

    @classmethod
    def open(cls, config: cfg.Config) -> Validation | None:
        """The configuration's held-out data; heard as it is, neither augmented nor interleaved."""
        settings = config.validation
        if settings is None:
            return None
        data = config.data.model_copy(
            update={
                "shards": settings.shards,
                "targets": settings.targets,
                "words": settings.words,
                "states": settings.states,
                "augment": None,
                "interleave": None,
            }
        )
        feed = open_feed(config.model_copy(update={"data": data}))
        return cls(feed, settings, config.losses.weights)

    def measure(
        self, engine: Engine, here: World, step: int, at: Callable[[str], object]
    ) -> dict[str, float]:
        """Metrics of all held-out data after `step` updates. A collective.

        Args:
            at: told where it is at every step; all of it may take longer than a rank may hang.
        """
        at(f"the plan of the validation after step {step}")
        sums = torch.zeros(len(self.weights), dtype=torch.float64)
        counts = [0.0] * len(self.weights)
        for n, batches in enumerate(self.feed.steps(here, 0, 0)):
            at(f"step {n} of the validation after step {step}")
            for batch in batches:
                sums += engine.score(batch.to(here.device)).double().cpu()
                for k, name in enumerate(self.weights):
                    counts[k] += counted(batch, name)
            at(f"waiting for the data of step {n + 1} of the validation after step {step}")
        totals = here.sum(*sums.tolist(), *counts)
        parts = zip(self.weights, totals[: len(sums)], totals[len(sums) :], strict=True)
        means = {name: total / max(1.0, count) for name, total, count in parts}
        loss = sum(self.weights[name] * mean for name, mean in means.items())
        self.history.append({"step": step, "loss": loss})
        return {"validation/loss": loss} | {f"validation/{n}": mean for n, mean in means.items()}

    def best(self) -> list[int]:
        """Steps of the checkpoints to keep for their loss, the best first."""
        ranked = sorted(self.history, key=lambda found: (found["loss"], found["step"]))
        return [int(found["step"]) for found in ranked[: self.settings.keep_best]]

    def given_up(self) -> bool:
        """Whether the last `patience` validations have all been worse than the best before."""
        patience = self.settings.patience
        if patience is None or len(self.history) <= patience:
            return False
        losses = [found["loss"] for found in self.history]
        return min(losses[-patience:]) >= min(losses[:-patience])
