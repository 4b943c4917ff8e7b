"""Where each sequence lies in a flat [rows, channels] tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Lengths = TypeVar("Lengths", int, np.ndarray)


@dataclass(frozen=True, eq=False)
class Segments:
    """Start and length of every sequence in a flat `[rows, channels]` tensor.

    Built from host integers, and holding them beside their device copies, so that no step has
    to ask the device how many rows it has: S segments, none overlapping, starts ascending.
    """

    starts: Tensor
    """int64 [S], on the device."""
    lengths: Tensor
    """int64 [S], on the device."""
    host_starts: tuple[int, ...]
    host_lengths: tuple[int, ...]
    rows: int
    """Rows of the flat tensor that the segments were laid out for."""

    @classmethod
    def packed(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Segments:
        """Sequences one after another without a gap: `rows` is the sum of `lengths`."""
        starts, row = [], 0
        for length in lengths:
            starts.append(row)
            row += length
        return cls.at(starts, lengths, row, device)

    @classmethod
    def padded(
        cls, lengths: Sequence[int], pitch: int, device: torch.device | str = "cpu"
    ) -> Segments:
        """Sequences at a fixed distance: a padded `[B, pitch, C]` seen as `[B * pitch, C]`."""
        for index, length in enumerate(lengths):
            if length > pitch:
                raise ValueError(
                    f"lengths[{index}] must be at most pitch = {pitch}, but is {length}."
                )
        starts = [index * pitch for index in range(len(lengths))]
        return cls.at(starts, lengths, len(starts) * pitch, device)

    @classmethod
    def at(
        cls,
        starts: Sequence[int],
        lengths: Sequence[int],
        rows: int,
        device: torch.device | str,
    ) -> Segments:
        """Sequences that start at these rows, of `rows` in all."""
        for index, length in enumerate(lengths):
            if length < 0:
                raise ValueError(f"lengths[{index}] must not be negative, but is {length}.")
        pinned = torch.device(device).type == "cuda"
        host = torch.tensor([list(starts), list(lengths)], dtype=torch.int64, pin_memory=pinned)
        on_device = host.to(device, non_blocking=True)
        return cls(on_device[0], on_device[1], tuple(starts), tuple(lengths), rows)

    @property
    def total(self) -> int:
        """Rows that belong to a segment."""
        return sum(self.host_lengths)

    @property
    def device(self) -> torch.device:
        return self.starts.device

    def __len__(self) -> int:
        return len(self.host_lengths)

    def conv(self, kernel: int, stride: int, padding: int) -> Segments:
        """The packed segments that a convolution over each segment leaves.

        `floor((L + 2 * padding - kernel) / stride) + 1` rows of L, never negative; none of none.
        """
        lengths = [conv_length(length, kernel, stride, padding) for length in self.host_lengths]
        return Segments.packed(lengths, self.device)


def conv_length(length: Lengths, kernel: int, stride: int, padding: int) -> Lengths:
    """Rows that a convolution leaves of `length` rows; an empty sequence stays empty.

    Elementwise on ints and int64 arrays.
    """
    out = (length + 2 * padding - kernel) // stride + 1
    return out * (out > 0) * (length > 0)
