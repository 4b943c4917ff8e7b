"""What attention over a packed batch is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Packing:
    """Documents that stand one after another in T positions.

    lengths     of each, on the host: their sum is T
    cu_seqlens  int32 [D + 1] on the device: where the documents begin, and T
    """

    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor

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
