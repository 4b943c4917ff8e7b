"""A head that tells each slot's language, and a condition on it: BLOOMZMMS (2404.10922).

Shapes: see `train.model.adapters.ebranchformer`; K languages and the blank.
"""

from __future__ import annotations

import torch
from torch import nn

from train.model.adapters.spacing import strided
from train.model.lengths import Conv
from train.ops import Segments


class LanguageHead(nn.Module):
    """As in self-conditioned CTC (2104.02724), with a subsampling of its own.

    So its labels come at the pace of the slots; a row gets the condition of the slot that it
    becomes part of.
    """

    def __init__(self, width: int, languages: int, slots: Conv):
        super().__init__()
        self.pair = nn.Conv1d(width, width, slots.kernel, slots.stride)
        self.tell = nn.Linear(width, languages + 1)
        self.condition = nn.Linear(languages + 1, width)

    def forward(self, x_RW: torch.Tensor, clips: Segments) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed rows with their condition, and the slots' logits [slots, K]; the blank is 0."""
        y_SW, slots = strided(self.pair, x_RW, clips)
        logits_SK = self.tell(y_SW)
        given_SW = self.condition(logits_SK.float().softmax(-1).to(x_RW.dtype))
        # The last row of an odd clip goes with the slot before it; a clip without slots has none.
        row_R = torch.arange(clips.total, device=x_RW.device) - _each(clips.starts, clips)
        last_R = _each(slots.lengths, clips) - 1
        slot_R = _each(slots.starts, clips) + torch.minimum(row_R // self.pair.stride[0], last_R)
        slot_R = torch.where(last_R < 0, slots.total, slot_R)
        padded_SW = torch.cat([given_SW, given_SW.new_zeros(1, given_SW.shape[1])])
        return x_RW + padded_SW[slot_R], logits_SK


def _each(values_D: torch.Tensor, clips: Segments) -> torch.Tensor:
    """A value of each clip, at each of its rows."""
    return values_D.repeat_interleave(clips.lengths, output_size=clips.total)
