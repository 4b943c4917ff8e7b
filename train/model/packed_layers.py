"""Wav2Vec2's and HuBERT's layers on clips one after another, instead of padded to the longest.

The convolutions in front, and the positional one, stay padded: together they are some percent of a
frame's cost. WavLM's and Wav2Vec2-BERT's attention has scores of its own, so these stay padded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.hubert.modeling_hubert import (
    HubertEncoder,
    HubertEncoderStableLayerNorm,
)
from transformers.models.wav2vec2.modeling_wav2vec2 import (
    Wav2Vec2Encoder,
    Wav2Vec2EncoderStableLayerNorm,
)

from train.model.attention import NAME
from train.model.kernels import Packing

_NORM_LAST = (Wav2Vec2EncoderStableLayerNorm, HubertEncoderStableLayerNorm)


class PackedLayers(nn.Module):
    """What `pack_layers` makes of an encoder's layers.

    frames  of each clip, for the next forward; on the host
    """

    frames: tuple[int, ...] = ()

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any
    ) -> BaseModelOutput:
        """Projected frames [C, F, E] and their mask [C, F] -> [C, longest, E]; what transformers
        records of the layers in between is packed, [1, N, E], for `unpacked`."""
        this: Any = self
        x_CFE = hidden_states.masked_fill(~attention_mask[:, :, None], 0)
        x_CFE = x_CFE + this.pos_conv_embed(x_CFE)
        x_1NE = packed(x_CFE, self.frames)
        norm_last = isinstance(self, _NORM_LAST)
        if not norm_last:
            x_1NE = this.layer_norm(x_1NE)
        packing = Packing.of(self.frames, x_1NE.device)
        for layer in this.layers:
            x_1NE = layer(x_1NE, attention_mask=None, packing=packing, causal=False, **kwargs)
        if norm_last:
            x_1NE = this.layer_norm(x_1NE)
        return BaseModelOutput(last_hidden_state=unpacked(x_1NE, self.frames))


def pack_layers(model: Any) -> None:
    """Pack the layers of a loaded model, where its family can."""
    kind = type(model.encoder)
    if kind in (Wav2Vec2Encoder, HubertEncoder, *_NORM_LAST):
        model.encoder.__class__ = type(f"Packed{kind.__name__}", (PackedLayers, kind), {})
        model.encoder.config._attn_implementation = NAME


def packed(x_CFE: torch.Tensor, frames: tuple[int, ...]) -> torch.Tensor:
    """[C, F, E] -> [1, N, E]: each clip's own frames, one clip after another."""
    return torch.cat([x_FE[:n] for x_FE, n in zip(x_CFE, frames, strict=True)])[None]


def unpacked(x_1NE: torch.Tensor, frames: tuple[int, ...]) -> torch.Tensor:
    """[1, N, E] -> [C, longest, E], zeros behind a clip's own."""
    return pad_sequence(list(x_1NE[0].split(frames)), batch_first=True)
