"""The frozen speech encoder: padded features in, frames of the clips out."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

from train.model.lengths import Conv

SAMPLE_RATE = 16_000

# Whisper's mel hop, in samples (its feature extractor never uses another).
_HOP = 160


class Featurize:
    """Waveform (float32 mono 16 kHz) → the encoder's input, in a data worker.

    Pickles as its path, so a worker process loads its own feature extractor.
    """

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Featurize, (self.path,)

    @cached_property
    def _extractor(self) -> Any:
        return AutoFeatureExtractor.from_pretrained(self.path)

    def __call__(self, wave: np.ndarray) -> np.ndarray:
        """[samples] → waveform [samples], or log-mel [mel, frames] padded to the window."""
        out = self._extractor(wave, sampling_rate=SAMPLE_RATE, return_tensors="np")
        return out[self._extractor.model_input_names[0]][0].astype(np.float32)


class SpeechEncoder(nn.Module):
    """Wav2Vec2/MMS or Whisper encoder, frozen: always in eval mode, never with gradients."""

    def __init__(self, path: str, dtype: torch.dtype, trust_remote_code: bool = False):
        super().__init__()
        model = AutoModel.from_pretrained(path, dtype=dtype, trust_remote_code=trust_remote_code)
        self.kind = model.config.model_type
        self.model = model.get_encoder() if self.kind == "whisper" else model
        self.model.requires_grad_(False)
        self.eval()

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    def train(self, mode: bool = True) -> SpeechEncoder:
        """Stays in eval mode: dropout and LayerDrop of a frozen encoder must not wake up."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, features: torch.Tensor, samples: tuple[int, ...]) -> torch.Tensor:
        """Hidden states [clips, frames, C]; rows past a clip's own frames hold nothing of use.

        Args:
            features: waveforms [clips, samples] or log-mel [clips, mel, frames], float32,
                padded at the end.
            samples: each clip's own length in samples (on the host).
        """
        features = features.to(self.model.dtype)
        if self.kind == "whisper":
            return self.model(features).last_hidden_state
        at = torch.arange(features.shape[1], device=features.device)
        lengths = torch.tensor(samples).to(features.device, non_blocking=True)
        mask = (at[None, :] < lengths[:, None]).long()
        return self.model(features, attention_mask=mask).last_hidden_state


def front_end(path: str, trust_remote_code: bool = False) -> tuple[Conv, ...]:
    """The encoder's samples → frames geometry, from its config alone (no weights)."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    if config.model_type == "whisper":
        # Mel frames, then the strided second convolution (the first keeps the length).
        return Conv(1, _HOP), Conv(3, 2, 1)
    if hasattr(config, "conv_kernel"):
        return tuple(
            Conv(k, s) for k, s in zip(config.conv_kernel, config.conv_stride, strict=True)
        )
    raise ValueError(
        f"model.encoder.path {path!r} is a {config.model_type!r} model; "
        "known are Whisper and Wav2Vec2/MMS"
    )
