"""GroupNorm over time that stops at a clip's own end.

The base sizes of Wav2Vec2, HuBERT and WavLM normalise each channel over the whole padded waveform,
so that a clip's frames would depend on the longest clip of its batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class MaskedChannelNorm(nn.Module):
    """`nn.GroupNorm` with a group per channel, over each clip's own length."""

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.lengths: tuple[int, ...] = ()

    def forward(self, x_BCL: torch.Tensor) -> torch.Tensor:
        """Clips [B, C, L] of the lengths set before; what lies past a clip's own is of no use."""
        lengths = torch.tensor(self.lengths).to(x_BCL.device, non_blocking=True)
        own_B1L = (torch.arange(x_BCL.shape[2], device=x_BCL.device) < lengths[:, None])[:, None]
        count = lengths.clamp(min=1)[:, None, None]
        x = x_BCL.float()
        mean = x.masked_fill(~own_B1L, 0).sum(2, keepdim=True) / count
        centred = (x - mean).masked_fill(~own_B1L, 0)
        variance = centred.square().sum(2, keepdim=True) / count
        normed = centred * (variance + self.eps).rsqrt()
        affine = normed * self.weight.float()[:, None] + self.bias.float()[:, None]
        return affine.to(x_BCL.dtype)


def mask_group_norm(model: PreTrainedModel) -> None:
    """Replace the front end's GroupNorm, where it has one."""
    first = _first_layer(model)
    if isinstance(getattr(first, "layer_norm", None), nn.GroupNorm):
        first.layer_norm = MaskedChannelNorm(first.layer_norm)


def set_lengths(model: PreTrainedModel, lengths: tuple[int, ...]) -> None:
    """Each clip's rows after the first convolution, for the next forward."""
    norm = getattr(_first_layer(model), "layer_norm", None)
    if isinstance(norm, MaskedChannelNorm):
        norm.lengths = lengths


def _first_layer(model: Any) -> Any:
    return model.feature_extractor.conv_layers[0]
