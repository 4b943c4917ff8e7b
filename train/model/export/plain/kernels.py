"""Packed attention by torch's scaled dot product alone; stands in for `train.model.kernels`."""

from __future__ import annotations

from typing import Literal

import torch

from train.model.kernels import sdpa
from train.model.kernels.packing import Packing, Scores

__all__ = ["Name", "Packing", "Scores", "attend"]

Name = Literal["auto", "flash_attn", "varlen", "flex", "sdpa"]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: Packing,
    scores: Scores,
    name: Name = "auto",
) -> torch.Tensor:
    """Attention inside each document, whichever kernel was used in training."""
    return sdpa.attend(q, k, v, packing, scores)
