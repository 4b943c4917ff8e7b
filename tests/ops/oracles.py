"""What the tests hold the ops against: sequence by sequence, in the plainest PyTorch there is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from train.ops import Segments


def conv_one_by_one(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    segments: Segments,
    *,
    stride: int,
    padding: int,
    activation: str,
) -> Tensor:
    """nn.Conv1d on every sequence alone, then all of them one after another."""
    channels = weight.shape[0] // 2 if activation == "glu" else weight.shape[0]
    ys = [x.new_zeros(0, channels)]
    for start, length in zip(segments.host_starts, segments.host_lengths, strict=True):
        if length + 2 * padding < weight.shape[1] or length == 0:
            continue
        sequence = x[start : start + length].t()[None]
        y = F.conv1d(sequence, weight.transpose(1, 2), bias, stride, padding)[0].t()
        ys.append({"none": lambda t: t, "gelu": F.gelu, "glu": F.glu}[activation](y))
    return torch.cat(ys)


def pack_one_by_one(
    table: Tensor,
    speech: Tensor,
    source: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Position by position."""
    normed = F.layer_norm(speech, speech.shape[1:], ln_weight, ln_bias, eps)
    rows = [table[v] if v >= 0 else normed[-v - 1] for v in source.tolist()]
    return (
        torch.stack([row.to(dtype) for row in rows])
        if rows
        else table.new_zeros(0, table.shape[1], dtype=dtype)
    )


def worst(found: Tensor, truth: Tensor) -> float:
    """The largest error, on the scale of the truth."""
    if truth.numel() == 0:
        return 0.0
    error = (found.detach().double() - truth.detach().double()).abs().max()
    return float(error / truth.detach().double().abs().max().clamp(min=1e-12))
