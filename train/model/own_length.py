"""Whisper on each clip's own length instead of its window of 30 s.

Whisper was trained on full windows, so the frames are not those that it would give with silence
behind the clip: close to them, for a small part of the work. `docs/log.md` has how close.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import gelu
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder


class OwnLengthWhisper(WhisperEncoder):
    """A Whisper encoder whose forward takes any number of frames; made by `own_length`."""

    def forward(
        self,
        input_features: torch.Tensor,
        lengths: tuple[int, ...],
        output_hidden_states: bool = False,
    ) -> BaseModelOutput:
        """Hidden states [C, F, E]; a clip's do not depend on the clips beside it.

        Args:
            input_features: log-mel [C, mel, frames], padded at the end.
            lengths: each clip's own frames of log-mel, at most the window's.
        """
        device = input_features.device
        own = torch.tensor(lengths).to(device, non_blocking=True)
        inside = torch.arange(input_features.shape[2], device=device) < own[:, None]
        # Behind a clip there are zeros, as at the end of the longest.
        x_CEM = gelu(self.conv1(input_features * inside[:, None])) * inside[:, None]
        x_CFE = gelu(self.conv2(x_CEM)).transpose(1, 2)
        frames = x_CFE.shape[1]
        x_CFE = x_CFE + self.embed_positions.weight[:frames]
        heard = torch.arange(frames, device=device) < ((own + 1) // 2)[:, None]
        mask = torch.zeros(heard.shape, dtype=x_CFE.dtype, device=device)
        mask = mask.masked_fill(~heard, torch.finfo(x_CFE.dtype).min)[:, None, None]
        states = [x_CFE]
        for layer in self.layers:
            states.append(layer(states[-1] if output_hidden_states else states.pop(), mask))
        last = self.layer_norm(states[-1])
        hidden_states = (*states[:-1], last) if output_hidden_states else None
        return BaseModelOutput(last_hidden_state=last, hidden_states=hidden_states)


def own_length(encoder: nn.Module) -> None:
    """Give a loaded `WhisperEncoder` the forward above."""
    encoder.__class__ = OwnLengthWhisper
