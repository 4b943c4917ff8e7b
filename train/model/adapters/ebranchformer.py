"""BLOOMZMMS's adapter (2404.10922): an E-Branchformer (2210.00077) between two subsamplings.

Frames are projected, convolved over time and channels to a quarter (two k3 s2), pass the blocks,
are halved (k2 s2) and projected to the LLM: 50 frames a second become 6.25 slots. With `languages`
a head behind one of the first blocks tells the language of each slot.

Shapes: see `train.model.adapters`; and W width, S rows of clips at a distance (`spacing`), D clips
in a group of like length, L their longest, h heads, d = W / h.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from train import config as cfg
from train.model.adapters.language_head import LanguageHead
from train.model.adapters.spacing import rows_of, spaced, spread, strided
from train.model.kernels.sdpa import alike
from train.model.lengths import Conv
from train.ops import Segments

FRONT = (Conv(3, 2), Conv(3, 2))
BACK = Conv(2, 2)
GEOMETRY = (*FRONT, BACK)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where a batch's clips lie, worked out once for all blocks."""

    clips: Segments
    """Packed, one after another."""
    places: torch.Tensor
    """int64 [R]: their rows at a distance of half a kernel."""
    rows: int
    groups: tuple[tuple[int, ...], ...]
    """Clips of like length, for attention."""
    distances: torch.Tensor
    """[P, W], sinusoids of the distances from `longest - 1` down to `1 - longest`."""

    @classmethod
    def of(cls, clips: Segments, kernel: int, width: int, dtype: torch.dtype) -> Layout:
        apart = spaced(clips.host_lengths, clips.device, gap=kernel // 2)
        groups = (
            tuple(i for i in group if clips.host_lengths[i]) for group in alike(clips.host_lengths)
        )
        longest = max(1, *clips.host_lengths)
        return cls(
            clips,
            rows_of(apart),
            apart.rows,
            tuple(g for g in groups if g),
            _sinusoids(longest, width, clips.device).to(dtype),
        )


class EBranchformer(nn.Module):
    """Dropout and LayerDrop draw from torch's generator, which the caller may have seeded."""

    def __init__(self, adapter: cfg.EBranchformerAdapter, channels: int, hidden: int):
        super().__init__()
        width = adapter.width
        self.kernel, self.layerdrop = adapter.kernel, adapter.layerdrop
        self.dropout = adapter.dropout
        self.project = nn.Linear(channels, adapter.inputs)
        self.front = nn.ModuleList(
            nn.Conv2d(before, width, conv.kernel, conv.stride)
            for before, conv in zip((1, width), FRONT, strict=True)
        )
        bands = adapter.inputs
        for conv in FRONT:
            bands = conv.out(bands)
        self.embed = nn.Linear(width * bands, width)
        self.blocks = nn.ModuleList(Block(adapter) for _ in range(adapter.blocks))
        self.language_block = adapter.language_block
        classes = len(adapter.languages)
        self.language = LanguageHead(width, classes, BACK) if classes else None
        self.norm = nn.LayerNorm(width)
        self.back = nn.Conv1d(width, width, BACK.kernel, BACK.stride)
        self.out = nn.Linear(width, hidden)

    @overload
    def forward(self, x_NC: torch.Tensor, segments: Segments) -> torch.Tensor: ...

    @overload
    def forward(
        self, x_NC: torch.Tensor, segments: Segments, *, with_languages: Literal[True]
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def forward(
        self, x_NC: torch.Tensor, segments: Segments, *, with_languages: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Slots [R, H]; and `with_languages` logits [R, languages + 1] of blank and languages."""
        x_RW, clips = self._quarter(self.project(x_NC), segments)
        layout = Layout.of(clips, self.kernel, x_RW.shape[1], x_RW.dtype)
        x_RW = F.dropout(x_RW * math.sqrt(x_RW.shape[1]), self.dropout, self.training)
        logits_RK = None
        for number, block in enumerate(self.blocks, 1):
            y_RW = block(x_RW, layout)
            if self.training and self.layerdrop:
                # The block runs whether it counts or not: all ranks run every module.
                kept = torch.rand((), device=x_RW.device) >= self.layerdrop
                y_RW = torch.where(kept, y_RW, x_RW)
            x_RW = y_RW
            if self.language is not None and number == self.language_block:
                x_RW, logits_RK = self.language(x_RW, clips)
        x_RW, _ = strided(self.back, self.norm(x_RW), clips)
        slots_RH: torch.Tensor = self.out(x_RW)
        if not with_languages:
            return slots_RH
        assert logits_RK is not None, "the adapter has no head for languages"
        return slots_RH, logits_RK

    def _quarter(self, x_NI: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, Segments]:
        """[N, inputs] -> [R, W] and its packed clips, by one dense pass over all of them."""
        stride = math.prod(conv.stride for conv in FRONT)
        lengths = segments.host_lengths
        apart = spaced(lengths, x_NI.device, multiple=stride)
        # Rows enough for one window, should every clip be too short.
        rows = max(apart.rows, 2 * stride)
        x_SI = spread(x_NI[rows_of(segments)], rows_of(apart), rows)
        x_1WSB = x_SI[None, None]
        for conv in self.front:
            x_1WSB = F.relu(conv(x_1WSB))
        for geometry in FRONT:
            segments = segments.conv(geometry.kernel, geometry.stride, geometry.padding)
        starts = [start // stride for start in apart.host_starts]
        at = rows_of(Segments.at(starts, segments.host_lengths, x_1WSB.shape[2], x_NI.device))
        return self.embed(x_1WSB[0].permute(1, 0, 2)[at].flatten(1)), segments


class Block(nn.Module):
    """Half a feed-forward, attention beside a gated convolution, their merge, the other half."""

    def __init__(self, adapter: cfg.EBranchformerAdapter):
        super().__init__()
        width, self.dropout = adapter.width, adapter.dropout
        self.before = FeedForward(width, adapter.feed_forward, adapter.dropout)
        self.attend_norm = nn.LayerNorm(width)
        self.attend = Attention(width, adapter.heads, adapter.dropout)
        self.gate_norm = nn.LayerNorm(width)
        self.gate = ConvGate(width, adapter.cgmlp, adapter.kernel, adapter.dropout)
        self.mix = Depthwise(2 * width, adapter.kernel)
        self.merge = nn.Linear(2 * width, width)
        self.after = FeedForward(width, adapter.feed_forward, adapter.dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, x_RW: torch.Tensor, layout: Layout) -> torch.Tensor:
        x_RW = x_RW + 0.5 * self.before(x_RW)
        branches = (
            self.attend(self.attend_norm(x_RW), layout),
            self.gate(self.gate_norm(x_RW), layout),
        )
        both = torch.cat([F.dropout(b, self.dropout, self.training) for b in branches], dim=1)
        merged = self.merge(both + self.mix(both, layout))
        x_RW = x_RW + F.dropout(merged, self.dropout, self.training)
        return self.norm(x_RW + 0.5 * self.after(x_RW))


class FeedForward(nn.Module):
    """Normalised, and with its own last dropout."""

    def __init__(self, width: int, inner: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x_RW: torch.Tensor) -> torch.Tensor:
        inner = F.dropout(F.silu(self.up(self.norm(x_RW))), self.dropout, self.training)
        return F.dropout(self.down(inner), self.dropout, self.training)


class Attention(nn.Module):
    """Attention inside each clip, with Transformer-XL's relative positions (1901.02860)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.split, self.dropout = (heads, width // heads), dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.distance = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)
        bound = math.sqrt(6 / sum(self.split))
        self.content_bias = nn.Parameter(torch.empty(self.split).uniform_(-bound, bound))
        self.distance_bias = nn.Parameter(torch.empty(self.split).uniform_(-bound, bound))

    def forward(self, x_RW: torch.Tensor, layout: Layout) -> torch.Tensor:
        lengths = layout.clips.host_lengths
        q, k, v = (
            part(x_RW).unflatten(1, self.split).split(lengths)
            for part in (self.query, self.key, self.value)
        )
        # Once for all groups: how many there are differs between ranks, module calls must not.
        p_Phd = self.distance(layout.distances).unflatten(1, self.split)
        outs = [x_RW[:0]] * len(lengths)
        for group in layout.groups:
            sizes = [lengths[i] for i in group]
            mine = [[part[i] for i in group] for part in (q, k, v)]
            out_DLhd = self._group(mine, sizes, p_Phd)
            for i, size, out_Lhd in zip(group, sizes, out_DLhd, strict=True):
                outs[i] = out_Lhd[:size].flatten(1)
        return self.out(torch.cat([x_RW[:0], *outs]))

    def _group(
        self, qkv: list[list[torch.Tensor]], sizes: list[int], p_Phd: torch.Tensor
    ) -> torch.Tensor:
        """[D, L, h, d] of D clips' queries, keys and values, each [size, h, d]."""
        q_DhLd, k_DhLd, v_DhLd = (
            pad_sequence(part, batch_first=True).transpose(1, 2) for part in qkv
        )
        longest, scale = q_DhLd.shape[2], q_DhLd.shape[3] ** -0.5
        middle = p_Phd.shape[0] // 2  # distance 0
        near_hdP = p_Phd[middle - longest + 1 : middle + longest].permute(1, 2, 0)
        bias = _shifted((q_DhLd + self.distance_bias[:, None]) @ near_hdP) * scale
        lengths = torch.tensor(sizes, pin_memory=q_DhLd.is_cuda)
        lengths = lengths.to(q_DhLd.device, non_blocking=True)
        beyond_DL = torch.arange(longest, device=q_DhLd.device) >= lengths[:, None]
        out_DhLd = F.scaled_dot_product_attention(
            q_DhLd + self.content_bias[:, None],
            k_DhLd,
            v_DhLd,
            attn_mask=bias.masked_fill(beyond_DL[:, None, None], float("-inf")),
            dropout_p=self.dropout if self.training else 0.0,
            scale=scale,
        )
        return out_DhLd.transpose(1, 2)


class ConvGate(nn.Module):
    """cgMLP (2207.02971): one half of the channels, convolved over time, gates the other."""

    def __init__(self, width: int, inner: int, kernel: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.up = nn.Linear(width, inner)
        self.norm = nn.LayerNorm(inner // 2)
        self.conv = Depthwise(inner // 2, kernel)
        # The gate starts as the identity.
        nn.init.normal_(self.conv.weight, std=1e-6)
        nn.init.ones_(self.conv.bias)
        self.down = nn.Linear(inner // 2, width)

    def forward(self, x_RW: torch.Tensor, layout: Layout) -> torch.Tensor:
        gated, gate = F.gelu(self.up(x_RW)).chunk(2, dim=1)
        product = gated * self.conv(self.norm(gate), layout)
        return self.down(F.dropout(product, self.dropout, self.training))


class Depthwise(nn.Module):
    """A convolution over time of each channel for itself, which stops at a clip's borders."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        bound = kernel**-0.5
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(self, x_RC: torch.Tensor, layout: Layout) -> torch.Tensor:
        x_SC = spread(x_RC, layout.places, layout.rows)
        kernel = self.weight.shape[2]
        y_CS = F.conv1d(x_SC.T, self.weight, self.bias, padding=kernel // 2, groups=len(self.bias))
        return y_CS.T[layout.places]


def _sinusoids(longest: int, width: int, device: torch.device) -> torch.Tensor:
    """[2 * longest - 1, width] of the distances query - key, from the largest down."""
    distance = torch.arange(longest - 1, -longest, -1.0, device=device)
    rates = torch.exp(torch.arange(0, width, 2.0, device=device) * (-math.log(1e4) / width))
    angles = distance[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def _shifted(by_distance: torch.Tensor) -> torch.Tensor:
    """[..., L, 2L - 1] scores by distance -> [..., L, L] by key: row i from column L - 1 - i on."""
    *rest, length, distances = by_distance.shape
    padded = F.pad(by_distance, (1, 0)).view(*rest, distances + 1, length)
    return padded[..., 1:, :].reshape(*rest, length, distances)[..., :length]
