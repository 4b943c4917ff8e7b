"""Frames joined side by side, then two linear layers: AZeroS (2601.06086) and Ultravox's kind.

Shapes: see `train.model.adapters`; K frames to a slot.
"""

from __future__ import annotations

import torch
from torch import nn

from train import config as cfg
from train.model.lengths import Conv
from train.ops import Segments


def geometry(adapter: cfg.StackMLPAdapter) -> tuple[Conv, ...]:
    """As a convolution that does not overlap: a clip's last frames that fill no slot are left."""
    return (Conv(adapter.frames, adapter.frames),)


class StackMLP(nn.Module):
    """Linear -> ReLU -> Linear over every K frames of a clip."""

    def __init__(self, adapter: cfg.StackMLPAdapter, channels: int, hidden: int):
        super().__init__()
        self.frames = adapter.frames
        inner = adapter.hidden or hidden
        self.up = nn.Linear(adapter.frames * channels, inner)
        self.out = nn.Linear(inner, hidden)

    def forward(self, x_NC: torch.Tensor, segments: Segments) -> torch.Tensor:
        slots = segments.conv(self.frames, self.frames, 0)
        first_R = torch.arange(slots.total, device=x_NC.device) - slots.starts.repeat_interleave(
            slots.lengths, output_size=slots.total
        )
        start_R = segments.starts.repeat_interleave(slots.lengths, output_size=slots.total)
        rows_R = start_R + first_R * self.frames
        rows_RK = rows_R[:, None] + torch.arange(self.frames, device=x_NC.device)
        return self.out(nn.functional.relu(self.up(x_NC[rows_RK].flatten(1))))
