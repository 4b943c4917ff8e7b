"""What attention over a packed batch is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class Shared(Protocol):
    """What `data.sharing` plans."""

    rows: torch.Tensor
    first: torch.Tensor
    uses: torch.Tensor


@dataclass(frozen=True)
class Packing:
    """Documents that stand one after another in S positions.

    lengths     of each, on the host: their sum is S
    cu_seqlens  int32 [D + 1] on the device: where the documents begin, and S
    shared      which of the T rows that there are stands where; None where T = S
    """

    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor
    shared: Shared | None = None

    @staticmethod
    def of(lengths: tuple[int, ...], device: torch.device | str = "cpu") -> Packing:
        """Where the collator has not made them."""
        ends = torch.tensor((0, *lengths)).cumsum(0)
        return Packing(lengths, ends.to(device, torch.int32))


@dataclass(frozen=True)
class Scores:
    """How keys are scored.

    scale    factor of q·k
    slopes   float32 [heads] of ALiBi (a key `n` before the query gets `-slope * n`), or None
    window   positions that a query sees, its own among them; None for all before it
    softcap  scores become `softcap * tanh(score / softcap)` (Gemma 2); None for none
    causal   whether a position sees those before it and itself alone; an encoder's sees all, and
             has none of the above but the scale
    """

    scale: float
    slopes: torch.Tensor | None = None
    window: int | None = None
    softcap: float | None = None
    causal: bool = True
