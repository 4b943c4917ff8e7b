"""Ragged rows for dense convolutions: clips at a distance, so that no window spans two of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from train.ops import Segments


def spaced(
    lengths: Sequence[int], device: torch.device, *, gap: int = 0, multiple: int = 1
) -> Segments:
    """Clips of `lengths` rows, at least `gap` rows apart, each from a multiple of `multiple`.

    With half a kernel for `gap`, a convolution sees zeros beyond a clip's borders, as it would at
    the ends of a tensor. With its stride for `multiple`, one without padding leaves each clip's own
    windows in a row, from `start / stride` on, and then those that span two clips.
    """
    starts, row = [], 0
    for length in lengths:
        starts.append(row)
        row += -(-(length + gap) // multiple) * multiple
    return Segments.at(starts, lengths, row, device)


def strided(conv: nn.Conv1d, x_RC: torch.Tensor, clips: Segments) -> tuple[torch.Tensor, Segments]:
    """A convolution as wide as its stride, with ReLU, over each clip's packed rows; and where the
    rows lie that it leaves."""
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    apart = spaced(clips.host_lengths, x_RC.device, multiple=stride)
    x_SC = spread(x_RC, rows_of(apart), max(apart.rows, kernel))
    y_CS = F.relu(conv(x_SC.T[None]))[0]
    fewer = clips.conv(kernel, stride, 0)
    starts = [start // stride for start in apart.host_starts]
    at = rows_of(Segments.at(starts, fewer.host_lengths, y_CS.shape[1], x_RC.device))
    return y_CS.T[at], fewer


def rows_of(segments: Segments) -> torch.Tensor:
    """int64 [total]: the rows that belong to a segment, one segment after another."""
    packed = Segments.packed(segments.host_lengths, segments.device)
    shift = segments.starts - packed.starts
    within = torch.arange(segments.total, device=segments.device)
    return within + shift.repeat_interleave(segments.lengths, output_size=segments.total)


def spread(x_RC: torch.Tensor, rows_R: torch.Tensor, rows: int) -> torch.Tensor:
    """Packed rows, put to `rows_R` among `rows` rows of zeros: [rows, C]."""
    return x_RC.new_zeros(rows, x_RC.shape[1]).index_copy(0, rows_R, x_RC)
