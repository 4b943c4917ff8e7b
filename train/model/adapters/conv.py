"""BLSP's adapter (2309.00916). Shapes: see `train.model.adapters`."""

from __future__ import annotations

import torch
from torch import nn

from train import config as cfg
from train.model.lengths import Conv
from train.ops import Segments, ragged_conv1d
from train.ops.library import Impl
from train.ops.ragged_conv1d import Activation


def geometry(adapter: cfg.ConvAdapter) -> tuple[Conv, ...]:
    """The convolutions as length arithmetic (padding keeps `length / stride`)."""
    return tuple(Conv(adapter.kernel, s, adapter.kernel // 2) for s in adapter.strides)


class RaggedConv(nn.Module):
    """One strided convolution with bias and activation over ragged rows."""

    def __init__(self, channels: int, out: int, geometry: Conv, activation: Activation, impl: Impl):
        super().__init__()
        self.geometry, self.activation, self.impl = geometry, activation, impl
        width = 2 * out if activation == "glu" else out
        # The initial distribution of torch.nn.Conv1d: uniform, bound 1/sqrt(fan in).
        bound = (channels * geometry.kernel) ** -0.5
        self.weight = nn.Parameter(
            torch.empty(width, geometry.kernel, channels).uniform_(-bound, bound)
        )
        self.bias = nn.Parameter(torch.empty(width).uniform_(-bound, bound))

    def forward(self, x_NC: torch.Tensor, segments: Segments) -> torch.Tensor:
        y, _ = ragged_conv1d(
            x_NC,
            self.weight,
            self.bias,
            segments,
            stride=self.geometry.stride,
            padding=self.geometry.padding,
            activation=self.activation,
            impl=self.impl,
        )
        return y


class ConvAdapter(nn.Module):
    """Strided convolutions with GLU, then a residual bottleneck.

    The convolutions keep the encoder's width but for the last, which goes to the LLM's.
    """

    def __init__(self, adapter: cfg.ConvAdapter, channels: int, hidden: int, impl: Impl = "auto"):
        super().__init__()
        self.geometry = geometry(adapter)
        widths = [channels] * (len(self.geometry) - 1) + [hidden]
        self.convs = nn.ModuleList(
            RaggedConv(channels, width, conv, "glu", impl)
            for width, conv in zip(widths, self.geometry, strict=True)
        )
        self.down = nn.Linear(hidden, adapter.bottleneck, bias=False)
        self.up = nn.Linear(adapter.bottleneck, hidden, bias=False)

    def forward(self, x_NC: torch.Tensor, segments: Segments) -> torch.Tensor:
        for conv, g in zip(self.convs, self.geometry, strict=True):
            x_NC = conv(x_NC, segments)
            segments = segments.conv(g.kernel, g.stride, g.padding)
        return x_NC + self.up(nn.functional.gelu(self.down(x_NC)))
