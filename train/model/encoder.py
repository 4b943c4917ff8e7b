"""The speech encoder: padded features in, hidden states of the clips out.

Shapes: C clips, F frames (padded), E channels.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
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
from train.model.packed_layers import PackedLayers, pack_layers, unpacked
from train.model.windows import OVERLAP, kept, starts

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
        frames; a clip that is longer gives its windows one after another. Time is always the last
        axis.
        """
        longest = getattr(self._extractor, "n_samples", len(wave))
        if len(wave) <= longest:
            return self._of_window(wave)
        begins = starts(-(-len(wave) // (2 * _HOP)), longest // (2 * _HOP))
        cut = (wave[2 * _HOP * begin :][:longest] for begin in begins)
        return np.concatenate([self._of_window(window) for window in cut], axis=-1)

    def _of_window(self, wave: np.ndarray) -> np.ndarray:
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
            pack_layers(self.model)
        self.own_length = settings.own_length
        if settings.own_length:
            if self.kind != "whisper":
                raise cfg.ConfigError(
                    f"model.encoder.own_length is for Whisper; {self.kind} hears every clip at its "
                    "own length; remove it"
                )
            own_length(self.model)
        self.window = self._window_of(settings)
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

    def _window_of(self, settings: cfg.Encoder) -> int | None:
        """Frames that are encoded at once; None for any number."""
        seconds = getattr(settings, "window_seconds", None)
        if self.kind == "whisper":
            if seconds is not None:
                raise cfg.ConfigError(
                    "model.encoder.window_seconds: Whisper's window is always 30 s; remove it"
                )
            return int(self.model.config.max_source_positions)
        frames = None if seconds is None else int(seconds * SAMPLE_RATE / (2 * _HOP))
        if frames is not None and frames <= 2 * OVERLAP:
            raise cfg.ConfigError(
                f"model.encoder.window_seconds must be above {2 * OVERLAP / 50:g}, twice what "
                f"windows share, found {seconds:g}"
            )
        return frames

    @property
    def width(self) -> int:
        """E."""
        return int(self.model.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """Hidden states that `layers` returns: before the first layer, and after each."""
        return int(self.model.config.num_hidden_layers) + 1

    @property
    def _packed(self) -> PackedLayers | None:
        layers = getattr(self.model, "encoder", None)
        return layers if isinstance(layers, PackedLayers) else None

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
        return self._run(features, samples, languages, all_layers=False)[0]

    def layers(
        self,
        features: torch.Tensor,
        samples: tuple[int, ...],
        languages: tuple[str, ...] = (),
    ) -> tuple[torch.Tensor, ...]:
        """Like `forward`: all hidden states [C, F, E], from before the first layer to the last."""
        return self._run(features, samples, languages, all_layers=True)

    def _run(
        self,
        features: torch.Tensor,
        samples: tuple[int, ...],
        languages: tuple[str, ...],
        all_layers: bool,
    ) -> tuple[torch.Tensor, ...]:
        """The states that are asked for, of every clip by its windows."""
        frames, window = self._frames(samples), self.window
        if window is None or max(frames, default=0) <= window:
            return self._states(features, samples, languages, all_layers)
        pieces = [
            self._piece(features[c], samples[c], begin, k)
            for c, count in enumerate(frames)
            for k, begin in enumerate(starts(count, window))
        ]
        counts = [len(starts(count, window)) for count in frames]
        spoken = tuple(s for s, n in zip(languages, counts, strict=False) for _ in range(n))
        longest = max(piece.shape[-1] for piece, _ in pieces)
        cut = torch.stack([F.pad(piece, (0, longest - piece.shape[-1])) for piece, _ in pieces])
        found = self._states(cut, tuple(n for _, n in pieces), spoken, all_layers)
        takes = [kept(count, window) for count in frames]

        def joined(state: torch.Tensor) -> torch.Tensor:
            clips = zip(state.split(counts), takes, strict=True)
            return pad_sequence(
                [torch.cat([x[at] for x, at in zip(w, t, strict=True)]) for w, t in clips],
                batch_first=True,
            )

        return tuple(map(joined, found))

    def _piece(
        self, features: torch.Tensor, samples: int, begin: int, k: int
    ) -> tuple[torch.Tensor, int]:
        """A clip's window number k, from frame `begin` on: its features, and its samples."""
        assert self.window is not None
        left = samples - 2 * _HOP * begin
        if self.kind == "whisper":  # cut by `Featurize`
            mel = 2 * self.window
            return features[:, k * mel :][:, :mel], min(left, 2 * _HOP * self.window)
        # What the window's frames see: 25 ms each, every 20 ms; or two such that are 10 ms apart.
        seen = 400 + 2 * _HOP * (self.window - 1)
        if self.kind == "wav2vec2-bert":
            return features[:, begin:][:, : self.window], min(left, seen + _HOP)
        size = min(left, seen)
        return features[2 * _HOP * begin :][:size], size

    def _frames(self, samples: tuple[int, ...]) -> tuple[int, ...]:
        for conv in self._front_end:
            samples = tuple(conv.out(n) for n in samples)
        return samples

    def _states(
        self,
        features: torch.Tensor,
        samples: tuple[int, ...],
        languages: tuple[str, ...],
        all_layers: bool,
    ) -> tuple[torch.Tensor, ...]:
        if (packed := self._packed) is not None:
            packed.frames = self._frames(samples)
        if self._languages:
            assert packed is not None  # MMS's layers are
            choose_languages(self.model, self._languages, languages, packed.frames, features.device)
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
            out = self.model(features, **extras)
        if not all_layers:
            return (out.last_hidden_state,)
        # Families differ in whether their own list ends before or after the last norm.
        states = out.hidden_states[: self.num_layers - 1]
        if packed is not None:
            states = tuple(unpacked(state, packed.frames) for state in states)
        return (*states, out.last_hidden_state)


class StoredStates(nn.Module):
    """In place of an encoder whose last hidden states were stored: batches bring them."""

    lora = False

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(
        self,
        features: torch.Tensor,
        samples: tuple[int, ...],
        languages: tuple[str, ...] = (),
    ) -> torch.Tensor:
        """[C, E, F], the features of `data.states` -> [C, F, E], as `SpeechEncoder.forward`."""
        return features.transpose(1, 2)


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
