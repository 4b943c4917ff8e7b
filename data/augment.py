"""Augmentation by torchaudio: speed, noise, SpecAugment.

What is drawn for a sample follows from (seed, epoch, its number) alone, so that a resume, or
another number of ranks or workers, repeats it exactly. Speed changes lengths, so the length table
asks here first; noise and masks do not.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torchaudio.functional import add_noise, mask_along_axis

from data.audio import SAMPLE_RATE, AudioError, decode, resample
from data.draws import MASKS, NOISE, SPEEDS, draws, draws_of

_MAX_NOISE_SECONDS = 600.0
_NOISES_KEPT = 64  # decoded noise files that a worker keeps, at most 38 MB each
_AUDIO = {".wav", ".flac", ".ogg", ".opus", ".mp3"}


class AugmentError(ValueError):
    """Settings of augmentation that cannot work; the message names the setting."""


@dataclass(frozen=True)
class Augment:
    """What may be done to a sample.

    speeds          one is drawn per sample and epoch; 1.1 is faster and higher
    noise           folder of noise recordings, searched in depth
    noise_share     share of samples that get noise
    noise_snr_db    bounds of the signal-to-noise ratio
    time_masks      SpecAugment: masks per clip, each of up to time_mask_share of its frames
    mel_masks       SpecAugment: masks per clip, each of up to mel_mask_bins bins
    """

    # A misspelt setting is an error in a config, too.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    speeds: tuple[float, ...] = (1.0,)
    noise: Path | None = None
    noise_share: float = 0.5
    noise_snr_db: tuple[float, float] = (5.0, 20.0)
    time_masks: int = 0
    time_mask_share: float = 0.05
    mel_masks: int = 0
    mel_mask_bins: int = 27

    def __post_init__(self) -> None:
        if not self.speeds or not all(0.25 <= speed <= 4 for speed in self.speeds):
            raise AugmentError(f"speeds must lie within 0.25 and 4, but are {self.speeds}")
        for name in ("noise_share", "time_mask_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise AugmentError(f"{name} must be within 0 and 1, but is {getattr(self, name)}")
        if self.noise_snr_db[0] > self.noise_snr_db[1]:
            raise AugmentError(f"noise_snr_db must be (low, high), but is {self.noise_snr_db}")
        for name in ("time_masks", "mel_masks", "mel_mask_bins"):
            if getattr(self, name) < 0:
                raise AugmentError(f"{name} must be at least 0, but is {getattr(self, name)}")


class Augmenter:
    """Applies an `Augment` to the `count` samples of a run."""

    def __init__(self, augment: Augment, count: int, seed: int):
        """Raises `AugmentError` where the noise folder has no audio."""
        self.augment = augment
        self._count = count
        self._seed = seed
        self._noises = _noise_files(augment.noise) if augment.noise else []
        # Speed s is the recording taken for one of s * 16 kHz and resampled from there.
        self._rates = np.array([round(speed * SAMPLE_RATE) for speed in augment.speeds])
        self._epoch, self._rate_of = -1, self._rates

    def facts(self) -> dict[str, object]:
        """All that decides what is drawn, for the run's digest."""
        noises = [(path.name, path.stat().st_size) for path in self._noises]
        return {**vars(self.augment), "noise": noises}

    def num_samples(self, written: np.ndarray, epoch: int) -> np.ndarray:
        """[N] int64: lengths at 16 kHz after this epoch's speeds."""
        return -(-written * SAMPLE_RATE // self._rates_in(epoch))

    def shortest(self, written: np.ndarray) -> np.ndarray:
        """[N] int64: lengths at the highest speed."""
        return -(-written * SAMPLE_RATE // self._rates.max())

    def wave(self, wave: np.ndarray, i: int, epoch: int) -> np.ndarray:
        """Sample i's float32 [S] waveform, played at its speed, with its noise."""
        rate = int(self._rates_in(epoch)[i])
        if rate != SAMPLE_RATE:
            wave = resample(wave, rate)
        if not self._noises:
            return wave
        asked, which, at, level = _uniform(draws_of(i, 4, self._seed, epoch, NOISE))
        if asked >= self.augment.noise_share or not wave.any():
            return wave
        noise = _noise(self._noises[int(which * len(self._noises))])
        shift = int(at * len(noise))
        low, high = self.augment.noise_snr_db
        snr = torch.tensor(low + level * (high - low), dtype=torch.float32)
        around = torch.from_numpy(np.resize(np.roll(noise, -shift), len(wave)))
        if not around.any():
            return wave
        return add_noise(torch.from_numpy(wave), around, snr).numpy()

    def features(self, features: np.ndarray, i: int, epoch: int) -> np.ndarray:
        """Sample i's log-mel [mel, frames] with its masks; they take the features' mean.

        Raises `AugmentError` where masks are asked for and this is no log-mel.
        """
        augment = self.augment
        if not augment.time_masks and not augment.mel_masks:
            return features
        if features.ndim != 2:
            raise AugmentError(
                "time_masks and mel_masks need an encoder that hears log-mel features, but this "
                f"one hears {features.ndim}-dimensional input; set both to 0"
            )
        masked = torch.from_numpy(features)[None]
        mean = float(masked.mean())
        # torchaudio draws from torch's global generator: lent a seed, and given back as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(draws_of(i, 1, self._seed, epoch, MASKS)[0] >> np.uint64(1)))
            for _ in range(augment.mel_masks):
                masked = mask_along_axis(masked, augment.mel_mask_bins, mean, axis=1)
            widest = int(augment.time_mask_share * features.shape[1])
            for _ in range(augment.time_masks):
                masked = mask_along_axis(masked, widest, mean, axis=2)
        return masked[0].numpy()

    def _rates_in(self, epoch: int) -> np.ndarray:
        """[N] int64: the rate that each sample is taken for in this epoch."""
        if epoch != self._epoch:
            drawn = draws(self._count, self._seed, epoch, SPEEDS) % np.uint64(len(self._rates))
            self._epoch, self._rate_of = epoch, self._rates[drawn.astype(np.int64)]
        return self._rate_of


def _noise_files(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _AUDIO)
    if not found:
        raise AugmentError(f"noise: no audio in {folder}; give a folder of noise recordings")
    return found


@lru_cache(maxsize=_NOISES_KEPT)
def _noise(path: Path) -> np.ndarray:
    try:
        return decode(path, max_seconds=_MAX_NOISE_SECONDS)
    except AudioError as error:
        raise AugmentError(f"noise: {path}: {error}; mend or remove it") from None


def _uniform(raw: np.ndarray) -> list[float]:
    """uint64 draws as floats in [0, 1)."""
    return ((raw >> np.uint64(11)) * 2.0**-53).tolist()
