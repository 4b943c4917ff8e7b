"""eSpeak NG through ctypes: text in, samples out, in any of many voices.

The library keeps its state in globals: a process has one synthesiser, and what it says depends a
little on all that it said before (flutter and breath go on from where they were). The same texts
in the same order in a fresh process give the same samples.
"""

from __future__ import annotations

import ctypes
import functools
import math
import random
from dataclasses import dataclass

import espeakng_loader
import numpy as np

SAMPLE_RATE = 16_000

# espeak_ng/speak_lib.h
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_RATE, _PITCH, _RANGE = 1, 3, 4
_POS_CHARACTER = 1
_CHARS_UTF8 = 1

_DIALECTS = {"en": ("en-us", "en"), "es": ("es", "es-419"), "de": ("de", "de")}
# Many, since it is the number of training voices that decides how well a new voice is understood.
_TRAIN_VARIANTS = (
    "m1 m2 m3 m5 m6 m8 f1 f2 f4 Andy Annie Denis Gene Mario Michael adam"
    " antonio aunty belinda benjamin boris ed grandma grandpa ian john linda max"
    " miguel norbert pablo paul quincy rob sandro travis victor"
).split()
_TEST_VARIANTS = "m4 m7 f3 f5".split()


@dataclass(frozen=True)
class Speaker:
    """A voice with its habits: the same person speaks at about the same speed and pitch."""

    name: str  # a number, as LibriSpeech names its speakers
    language: str
    voice: str
    words_per_minute: int
    pitch: int


@dataclass(frozen=True)
class Delivery:
    """How one sentence is said."""

    words_per_minute: int
    pitch: int
    range: int
    signal_to_noise_db: float
    gain: float
    seed: int  # of the noise


def speakers(language: str, *, heldout: bool) -> list[Speaker]:
    rng = random.Random(f"{language} {heldout}")
    variants = _TEST_VARIANTS if heldout else _TRAIN_VARIANTS
    base = 100 * (1 + list(_DIALECTS).index(language)) + 50 * heldout
    return [
        Speaker(
            name=str(base + number),
            language=language,
            voice=f"{_DIALECTS[language][number % 2]}+{variant}",
            words_per_minute=rng.randint(180, 225),
            pitch=rng.randint(35, 65),
        )
        for number, variant in enumerate(variants)
    ]


def delivery(speaker: Speaker, rng: random.Random) -> Delivery:
    return Delivery(
        words_per_minute=round(speaker.words_per_minute * rng.uniform(0.9, 1.1)),
        pitch=speaker.pitch + rng.randint(-15, 15),
        range=rng.randint(30, 70),
        signal_to_noise_db=rng.uniform(15, 40),
        gain=rng.uniform(0.3, 0.9),
        seed=rng.randrange(2**32),
    )


def speak(text: str, speaker: Speaker, how: Delivery) -> np.ndarray:
    """`text` as float32 samples at 16 kHz within ±1, with some noise of a room."""
    synth = _synthesiser()
    wave = _resample(synth.samples(text, speaker.voice, how), synth.sample_rate)
    white = np.random.default_rng(how.seed).standard_normal(len(wave) + 7, dtype=np.float32)
    hum = np.convolve(white, np.full(8, 1 / 8, np.float32), "valid")  # a room hums more than hisses
    noise = hum + 0.3 * white[: len(wave)]
    level = np.sqrt(np.mean(wave**2) / np.mean(noise**2)) * 10 ** (-how.signal_to_noise_db / 20)
    wave += level * noise
    return wave * np.float32(how.gain / np.abs(wave).max())


def _resample(wave: np.ndarray, rate: int) -> np.ndarray:
    """To 16 kHz: each block of output is one matrix times the block of input around it."""
    taps, step, outputs = _resampling_matrix(rate)
    blocks = -(-len(wave) // step)
    padded = np.pad(wave, (taps, blocks * step - len(wave) + taps))
    windows = np.lib.stride_tricks.sliding_window_view(padded, step + 2 * taps)[::step]
    return (windows @ outputs).reshape(-1)[: len(wave) * SAMPLE_RATE // rate]


@functools.cache
def _resampling_matrix(rate: int, taps: int = 24) -> tuple[int, int, np.ndarray]:
    """Windowed-sinc low-pass for `rate` -> 16 kHz; none of the numbers depends on the signal."""
    common = math.gcd(rate, SAMPLE_RATE)
    step, outputs = rate // common, SAMPLE_RATE // common
    cutoff = 0.95 * min(1.0, SAMPLE_RATE / rate)
    at = np.arange(outputs)[None] * rate / SAMPLE_RATE  # where each output lies among the inputs
    distance = np.arange(-taps, step + taps)[:, None] - at
    window = np.where(np.abs(distance) < taps, np.cos(np.pi * distance / (2 * taps)) ** 2, 0)
    return taps, step, (cutoff * np.sinc(cutoff * distance) * window).astype(np.float32)


class _Synthesiser:
    def __init__(self) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.sample_rate: int = self._library.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS,
            0,
            espeakng_loader.get_data_path().encode(),
            _INITIALIZE_DONT_EXIT,
        )
        if self.sample_rate <= 0:
            raise RuntimeError("eSpeak NG found no voices: is espeakng-loader installed whole?")
        self._chunks: list[np.ndarray] = []
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        self._callback = kind(self._receive)  # kept alive: the library holds only its address
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, wav: ctypes._Pointer[ctypes.c_short], count: int, _events: object) -> int:
        if wav and count > 0:
            self._chunks.append(np.ctypeslib.as_array(wav, (count,)).astype(np.float32) / 2**15)
        return 0  # go on

    def samples(self, text: str, voice: str, how: Delivery) -> np.ndarray:
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"eSpeak NG has no voice {voice!r}")
        for parameter, value in (
            (_RATE, how.words_per_minute), (_PITCH, how.pitch), (_RANGE, how.range)
        ):  # fmt: skip
            self._library.espeak_SetParameter(parameter, value, 0)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(how.seed))  # else seeded by the clock
        self._chunks.clear()
        data = text.encode()
        self._library.espeak_Synth(
            data, len(data) + 1, 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None
        )
        return np.concatenate(self._chunks)


@functools.cache
def _synthesiser() -> _Synthesiser:
    return _Synthesiser()
