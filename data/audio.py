"""Decoding and encoding audio: the only file that opens a sound.

Whatever comes in (WAV, FLAC, OGG, MP3, ... at any rate, width and channel count) leaves as one
float32 channel at 16 kHz, or as an `AudioError` with one reason. Nothing here trusts a header:
its duration is checked before decoding, and memory follows what was really decoded.
"""

import io
import math
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import torch
from torchaudio.functional import resample as polyphase

SAMPLE_RATE = 16_000
SILENCE_RMS = 10 ** (-70 / 20)  # full scale is 1.0: quieter than -70 dBFS is no speech
_BLOCK = 1 << 16  # frames decoded at a time
_MAX_CHANNELS = 64
_MAX_RATE = 768_000
# torchaudio's polyphase kernel holds about 14 * max(rates) / gcd(rates) rows' worth of floats per
# output phase; above this many entries (odd rates such as 44,101 Hz) we resample by FFT instead.
_MAX_KERNEL = 1 << 24


class AudioError(ValueError):
    """A fault of the audio's content, there again tomorrow; the message is the reason."""


def decode(
    source: str | Path | bytes | BinaryIO,
    *,
    max_seconds: float,
    span: tuple[float, float] | None = None,
) -> np.ndarray:
    """Audio as a float32 [S] waveform, mono, 16 kHz, full scale 1.0; S >= 1.

    `source` is a path, the bytes of a file, or an open binary file; `span` is the part to decode,
    from one second to another. Raises `AudioError` where it is no audio, truncated, empty, not
    finite, or longer than `max_seconds`; `OSError` where a path cannot be read.
    """
    if isinstance(source, str | Path):
        Path(source).stat()  # libsndfile's own message for a missing file does not say so
        source = str(source)
    elif isinstance(source, bytes):
        source = io.BytesIO(source)
    try:
        with soundfile.SoundFile(source) as sound:
            if span is None:
                _check_header(sound, sound.frames, max_seconds)
                mono = _read_mono(sound, sound.frames, max_seconds)
            else:
                mono = _read_span(sound, *span, max_seconds)
            rate = sound.samplerate
    except soundfile.LibsndfileError as error:
        raise AudioError(f"not audio that libsndfile can open ({error.error_string})") from None
    if not len(mono):
        raise AudioError("empty: 0 samples")
    wave = mono if rate == SAMPLE_RATE else resample(mono, rate)
    for each in (mono, wave):  # samples of 1e38 are finite, their sums need not be
        if not np.isfinite(each).all():
            bad = int((~np.isfinite(each)).sum())
            raise AudioError(f"not finite: {bad} samples are NaN or Inf")
    return wave


def is_silent(wave: np.ndarray) -> bool:
    """Whether a [S] waveform is quieter than -70 dBFS (root mean square), or has no samples."""
    return not len(wave) or float(np.sqrt(np.mean(np.square(wave, dtype=np.float64)))) < SILENCE_RMS


def encode_flac(wave: np.ndarray) -> bytes:
    """A float [S] waveform at 16 kHz as the bytes of a 16-bit FLAC file; clipped at full scale."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def _check_header(sound: soundfile.SoundFile, frames: int, max_seconds: float) -> None:
    if not 1 <= sound.samplerate <= _MAX_RATE:
        raise AudioError(f"sample rate {sound.samplerate} Hz is not within 1 to {_MAX_RATE}")
    if not 1 <= sound.channels <= _MAX_CHANNELS:
        raise AudioError(f"{sound.channels} channels are not within 1 to {_MAX_CHANNELS}")
    if frames > max_seconds * sound.samplerate:
        seconds = frames / sound.samplerate
        raise AudioError(f"too long: {seconds:.1f} s, over the limit of {max_seconds:g} s")
    # libsndfile shortens a WAV's frame count to what the file holds and says so only in its log.
    # Sizes from 2 GiB are what programs write that stream to a pipe and cannot know the length.
    cut = re.search(r"^data\s*: (\d+) \(should be (\d+)\)", sound.extra_info, re.MULTILINE)
    if cut and int(cut[1]) < 0x7FFFF000:
        raise AudioError(f"truncated: the header has {cut[1]} bytes of audio, the file {cut[2]}")


def _read_span(
    sound: soundfile.SoundFile, start: float, stop: float, max_seconds: float
) -> np.ndarray:
    first, last = (round(second * sound.samplerate) for second in (start, stop))
    if not 0 <= first < last <= sound.frames:
        raise AudioError(
            f"bad span: {start:g} to {stop:g} s of {sound.frames / sound.samplerate:g} s"
        )
    _check_header(sound, last - first, max_seconds)
    sound.seek(first)
    return _read_mono(sound, last - first, max_seconds)


def _read_mono(sound: soundfile.SoundFile, frames: int, max_seconds: float) -> np.ndarray:
    """`frames` frames from here, averaged over channels, float32; fewer: a truncated file."""
    blocks: list[np.ndarray] = []
    found, limit = 0, max_seconds * sound.samplerate
    while True:
        try:
            # Of a whole file all there is, whatever its header says; of a span no more than that.
            size = _BLOCK if frames == sound.frames else min(_BLOCK, frames - found)
            block = sound.read(size, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise AudioError(
                f"truncated or corrupt: the header has {sound.frames} samples, decoding stopped "
                f"after {found} ({error.error_string or 'no reason given'})"
            ) from None
        found += len(block)
        if found > limit:
            raise AudioError(f"too long: more than {max_seconds:g} s, whatever its header says")
        blocks.append(block[:, 0] if sound.channels == 1 else block.mean(axis=1))
        if len(block) < _BLOCK:
            break
    if found < frames:
        raise AudioError(f"truncated: the header has {frames} samples, the file {found}")
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def resample(wave: np.ndarray, rate: int) -> np.ndarray:
    """float32 [S] at `rate` Hz to [ceil(S * 16000 / rate)] at 16 kHz."""
    common = math.gcd(rate, SAMPLE_RATE)
    if SAMPLE_RATE // common * 14 * max(rate, SAMPLE_RATE) // common <= _MAX_KERNEL:
        return polyphase(torch.from_numpy(wave), rate, SAMPLE_RATE).numpy()
    # Zeros behind the wave keep the FFT's wrap-around away from its start.
    length = -(-len(wave) * SAMPLE_RATE // rate)
    padded_seconds = len(wave) // rate + 2
    spectrum = torch.fft.rfft(torch.from_numpy(wave), n=padded_seconds * rate)
    bins = padded_seconds * SAMPLE_RATE // 2 + 1
    spectrum = torch.nn.functional.pad(spectrum, (0, max(0, bins - len(spectrum))))[:bins]
    wide = torch.fft.irfft(spectrum, n=padded_seconds * SAMPLE_RATE) * (SAMPLE_RATE / rate)
    return wide[:length].contiguous().numpy()
