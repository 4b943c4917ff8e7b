"""Whisper on each clip's own length instead of its window of 30 s.

Whisper was trained on full windows, so the frames are not those that it would give with silence
behind the clip: close to them, for a small part of the work. `docs/log.md` has how close.

Clips stand one after another in one row of frames, so that none is as long as the longest:
convolutions respect their borders, and attention stays inside each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from train.model.attention import NAME
from train.model.kernels import Packing
from train.ops import Segments, ragged_conv1d


class OwnLengthWhisper(WhisperEncoder):
    """A Whisper encoder whose forward takes any number of frames; made by `own_length`."""

    def forward(
        self,
        input_features: torch.Tensor,
        lengths: tuple[int, ...],
        output_hidden_states: bool = False,
    ) -> BaseModelOutput:
        """Hidden states [C, F, E], zeros behind a clip's own; no clip depends on another.

        Args:
            input_features: log-mel [C, mel, frames], padded at the end.
            lengths: each clip's own frames of log-mel, at most the window's.
        """
        device = input_features.device
        x_NM = input_features.transpose(1, 2).flatten(0, 1)
        clips = Segments.padded(lengths, input_features.shape[2], device)
        for conv in (self.conv1, self.conv2):
            taps = conv.weight.transpose(1, 2).contiguous()
            stride, padding = conv.stride[0], int(conv.padding[0])
            x_NM, clips = ragged_conv1d(
                x_NM, taps, conv.bias, clips, stride=stride, padding=padding, activation="gelu"
            )
        at = torch.arange(x_NM.shape[0], device=device)
        at -= clips.starts.repeat_interleave(clips.lengths, output_size=len(at))
        packing = Packing.of(clips.host_lengths, device)
        states = [(x_NM + self.embed_positions.weight[at])[None]]
        for layer in self.layers:
            before = states[-1] if output_hidden_states else states.pop()
            states.append(layer(before, None, packing=packing, causal=False))
        states[-1] = self.layer_norm(states[-1])
        padded = [
            pad_sequence(state[0].split(clips.host_lengths), batch_first=True) for state in states
        ]
        hidden_states = tuple(padded) if output_hidden_states else None
        return BaseModelOutput(last_hidden_state=padded[-1], hidden_states=hidden_states)


def own_length(encoder: Any) -> None:
    """Give a loaded `WhisperEncoder` the forward above."""
    encoder.__class__ = OwnLengthWhisper
    encoder.config._attn_implementation = NAME
