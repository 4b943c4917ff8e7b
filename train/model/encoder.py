"""The speech encoder: padded features in, hidden states of the clips out.

Shapes: C clips, F frames (padded), E channels.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
)

from train import config as cfg
from train.model.languages import add_languages, choose_languages
from train.model.lengths import Conv
from train.model.lora import add_lora
from train.model.masked_norm import mask_group_norm, set_lengths
from train.model.own_length import own_length

SAMPLE_RATE = 16_000

# Whisper's mel hop, in samples (its feature extractor never uses another).
_HOP = 160

# Wav2Vec2-BERT's filter banks: Kaldi's window of 25 ms every 10 ms, two of them to a frame.
_FBANK = (Conv(400, 160), Conv(2, 2))

# Families whose first layers are convolutions over the waveform.
WAVEFORM = ("wav2vec2", "hubert", "wavlm")


class Featurize:
    """Waveform (float32 mono 16 kHz) → the encoder's input, in a data worker.

    Pickles as its path, so a worker process loads its own feature extractor.
    """

    def __init__(self, path: str, own_length: bool = False):
        self.path, self.own_length = path, own_length

    @classmethod
    def of(cls, settings: cfg.Encoder) -> Featurize:
        """What this encoder is fed."""
        return cls(settings.path, settings.own_length)

    def __reduce__(self) -> tuple[Any, ...]:
        return Featurize, (self.path, self.own_length)

    @cached_property
    def _extractor(self) -> Any:
        return AutoFeatureExtractor.from_pretrained(self.path)

    def __call__(self, wave: np.ndarray) -> np.ndarray:
        """[samples] → waveform [samples], log-mel [mel, frames], or filter banks [2 mel, frames].

        Log-mel is padded to Whisper's window, or with `own_length` to a whole number of encoder
        frames; time is always the last axis.
        """
        extractor = self._extractor
        if self.own_length:
            frame = 2 * _HOP
            wave = np.pad(wave, (0, -len(wave) % frame))
            out = extractor(wave, sampling_rate=SAMPLE_RATE, return_tensors="np", padding=False)
            return out.input_features[0].astype(np.float32)
        stacked = "SeamlessM4T" in type(extractor).__name__
        out = extractor(
            wave,
            sampling_rate=SAMPLE_RATE,
            return_tensors="np",
            **({"pad_to_multiple_of": None} if stacked else {}),
        )
        features = out[extractor.model_input_names[0]][0].astype(np.float32)
        return features.T if stacked else features


class SpeechEncoder(nn.Module):
    """A pretrained encoder: always in eval mode, frozen but for LoRA's updates.

    A clip's frames do not depend on the clips beside it, whatever the family: what transformers'
    own forward gives for the clip alone.

    Raises:
        ConfigError: the model is of no known family, or lacks what the settings ask for.
    """

    def __init__(self, model: PreTrainedModel, settings: cfg.Encoder):
        super().__init__()
        self.kind = model.config.model_type
        self._front_end = front_end_of(model.config, settings.path)
        self.model = model.get_encoder() if self.kind == "whisper" else model
        self.model.requires_grad_(False)
        if self.kind in WAVEFORM:
            mask_group_norm(self.model)
        self.own_length = settings.own_length
        if settings.own_length:
            if self.kind != "whisper":
                raise cfg.ConfigError(
                    f"model.encoder.own_length is for Whisper; {self.kind} hears every clip at its "
                    "own length; remove it"
                )
            own_length(self.model)
        self._languages: dict[str, int] = {}
        if settings.languages:
            self._languages = add_languages(self.model, settings.path, settings.languages)
        self.lora = settings.lora is not None
        if settings.lora is not None:
            add_lora(self.model, settings.lora, "model.encoder.lora")
        self.eval()

    @classmethod
    def load(
        cls, settings: cfg.Encoder, dtype: torch.dtype, trust_remote_code: bool = False
    ) -> SpeechEncoder:
        """The pretrained encoder that `settings` names."""
        model = AutoModel.from_pretrained(
            settings.path, dtype=dtype, trust_remote_code=trust_remote_code
        )
        return cls(model, settings)

    @property
    def width(self) -> int:
        """E."""
        return int(self.model.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """Hidden states that `layers` returns: before the first layer, and after each."""
        return int(self.model.config.num_hidden_layers) + 1

    def train(self, mode: bool = True) -> SpeechEncoder:
        """Stays in eval mode: dropout and LayerDrop of a frozen encoder must not wake up."""
        return super().train(False)

    def forward(
        self,
        features: torch.Tensor,
        samples: tuple[int, ...],
        languages: tuple[str, ...] = (),
    ) -> torch.Tensor:
        """The last hidden states [C, F, E]; rows past a clip's own frames hold nothing of use.

        Args:
            features: waveforms [C, samples], log-mel or filter banks [C, mel, frames], float32,
                padded at the end.
            samples: each clip's own length in samples (on the host).
            languages: each clip's language; asked for with per-language adapters alone.
        Raises:
            ValueError: a language that has no adapter.
        """
        return self._run(features, samples, languages, all_layers=False).last_hidden_state

    def layers(
        self,
        features: torch.Tensor,
        samples: tuple[int, ...],
        languages: tuple[str, ...] = (),
    ) -> tuple[torch.Tensor, ...]:
        """Like `forward`: all hidden states [C, F, E], from before the first layer to the last."""
        out = self._run(features, samples, languages, all_layers=True)
        # Families differ in whether their own list ends before or after the last norm.
        return (*out.hidden_states[: self.num_layers - 1], out.last_hidden_state)

    def _run(
        self,
        features: torch.Tensor,
        samples: tuple[int, ...],
        languages: tuple[str, ...],
        all_layers: bool,
    ) -> Any:
        if self._languages:
            choose_languages(self.model, self._languages, languages, features.device)
        features = features.to(self.model.dtype)
        extras: dict[str, Any] = {"output_hidden_states": True} if all_layers else {}
        if self.own_length:
            extras["lengths"] = tuple(
                min(2 * -(-n // (2 * _HOP)), features.shape[2]) for n in samples
            )
        elif self.kind != "whisper":
            lengths = list(samples)
            if self.kind == "wav2vec2-bert":
                features = features.transpose(1, 2)
                for conv in _FBANK:
                    lengths = [conv.out(n) for n in lengths]
            else:
                set_lengths(self.model, tuple(self._front_end[0].out(n) for n in samples))
            own = torch.tensor(lengths).to(features.device, non_blocking=True)
            at = torch.arange(features.shape[1], device=features.device)
            extras["attention_mask"] = (at[None, :] < own[:, None]).long()
        with nullcontext() if self.lora else torch.no_grad():
            return self.model(features, **extras)


class LayerSum(nn.Module):
    """A trained weighted sum of the encoder's layers (SUPERB's, 2105.01051), from their mean."""

    def __init__(self, layers: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layers))

    def forward(self, *layers: torch.Tensor) -> torch.Tensor:
        """Hidden states, all [C, F, E] → [C, F, E]."""
        shares = self.weight.softmax(0)
        total = shares[0] * layers[0]
        for share, layer in zip(shares[1:], layers[1:], strict=True):
            total = total + share * layer
        return total


def front_end(path: str, trust_remote_code: bool = False) -> tuple[Conv, ...]:
    """The encoder's samples → frames geometry, from its config alone (no weights)."""
    return front_end_of(AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code), path)


def front_end_of(config: PretrainedConfig, path: str) -> tuple[Conv, ...]:
    """Like `front_end`, from a config at hand; `path` for the message.

    Raises:
        ConfigError: a family whose lengths are not known.
    """
    shortened = getattr(config, "add_adapter", False)
    if config.model_type == "whisper":
        # Mel frames, then the strided second convolution (the first keeps the length).
        return Conv(1, _HOP), Conv(3, 2, 1)
    if config.model_type == "wav2vec2-bert" and not shortened:
        return _FBANK
    if config.model_type in WAVEFORM and not shortened:
        return tuple(
            Conv(k, s) for k, s in zip(config.conv_kernel, config.conv_stride, strict=True)
        )
    raise cfg.ConfigError(
        f"model.encoder.path {path!r} is a {config.model_type!r} model"
        + (" that shortens its own output (add_adapter)" if shortened else "")
        + "; known are Whisper, Wav2Vec2/MMS, HuBERT, WavLM and Wav2Vec2-BERT"
    )
