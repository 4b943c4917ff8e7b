"""Every size and rate of the micro world: this file is the one to turn knobs in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CorpusSettings:
    train_per_language: int = 2400
    test_per_language: int = 100
    seed: int = 1


@dataclass(frozen=True)
class LanguageModelSettings:
    kind: str  # llama or bloom
    width: int = 128
    layers: int = 3
    heads: int = 4
    inner: int = 384  # of Llama's feed-forward; BLOOM's is four times the width
    steps: int = 600
    tokens_per_batch: int = 3000
    matrix_lr: float = 5e-3
    other_lr: float = 5e-3
    disturbed: float = 0.6  # share of source sentences that are said carelessly
    blur: float = 0.8  # noise on the embeddings of a prompt, at most, relative to their spread
    seed: int = 2


@dataclass(frozen=True)
class Wav2Vec2Settings:
    bands: int = 40
    width: int = 128
    layers: int = 4
    heads: int = 4
    inner: int = 384
    steps: int = 600
    seconds_per_batch: float = 64.0
    matrix_lr: float = 4e-3
    other_lr: float = 4e-3
    seed: int = 3


@dataclass(frozen=True)
class WhisperSettings:
    width: int = 128
    encoder_layers: int = 3
    decoder_layers: int = 1
    heads: int = 4
    inner: int = 384
    seconds: int = 5  # of audio at most, where Whisper has 30
    mel_bins: int = 80
    vocabulary: int = 700
    steps: int = 700
    utterances_per_batch: int = 24
    matrix_lr: float = 4e-3
    other_lr: float = 4e-3
    seed: int = 4
