"""The corpus as training data of the encoders: recordings with their texts, in batches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch

from examples.micro.corpus import plan
from examples.micro.settings import CorpusSettings
from examples.micro.voices import SAMPLE_RATE


@dataclass(frozen=True)
class Recording:
    wave: np.ndarray  # float32 at 16 kHz
    text: str
    language: str


def load(root: Path, settings: CorpusSettings, split: str) -> list[Recording]:
    return [
        Recording(
            soundfile.read(root / utterance.audio, dtype="float32")[0],
            utterance.text,
            utterance.language,
        )
        for utterance in plan(settings, split)
    ]


def batches(
    recordings: list[Recording], seconds: float, rng: random.Random
) -> Iterator[list[Recording]]:
    """Endless batches of at most `seconds` of audio, of about equal lengths, in random order."""
    jitter = SAMPLE_RATE // 5  # keeps the same recordings from always meeting
    while True:
        filled = cut(sorted(recordings, key=lambda r: len(r.wave) + rng.random() * jitter), seconds)
        rng.shuffle(filled)
        yield from filled


def cut(recordings: list[Recording], seconds: float) -> list[list[Recording]]:
    """Consecutive recordings in batches of at most `seconds`, padding counted."""
    filled: list[list[Recording]] = [[]]
    longest = 0
    for recording in recordings:
        longest = max(longest, len(recording.wave))
        if filled[-1] and longest * (len(filled[-1]) + 1) > seconds * SAMPLE_RATE:
            filled.append([])
            longest = len(recording.wave)
        filled[-1].append(recording)
    return filled


def padded(waves: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of samples with zeros behind, and their lengths."""
    lengths_B = torch.tensor([len(wave) for wave in waves])
    samples_BS = torch.zeros(len(waves), int(lengths_B.max()))
    for row_S, wave in zip(samples_BS, waves, strict=True):
        row_S[: len(wave)] = torch.from_numpy(wave)
    return samples_BS, lengths_B
