"""The optimizer of all tiny models: Muon for matrices, AdamW for the rest, one cycle of lr."""

from __future__ import annotations

import torch
from torch import nn


class OneCycle:
    """Muon halves the steps that AdamW would need here, and costs little at these widths."""

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        *,
        matrix_lr: float,
        other_lr: float,
        warmup: float = 0.1,
    ) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
        is_matrix = {id(p) for p in matrices}
        others = [p for _, p in named if id(p) not in is_matrix]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices, lr=matrix_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]

        def height(step: int) -> float:
            done = (step + 1) / (steps + 1)
            return done / warmup if done < warmup else (1 - done) / (1 - warmup)

        self.schedules = [torch.optim.lr_scheduler.LambdaLR(o, height) for o in self.optimizers]
        self.parameters = [p for _, p in named]

    def step(self, loss: torch.Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
