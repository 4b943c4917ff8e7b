"""Whatever comes in leaves as 16 kHz mono, or as one clear reason."""

import io
import resource
from contextlib import nullcontext
from functools import cache

import numpy as np
import pytest
import soundfile

from data.audio import SAMPLE_RATE, AudioError, decode, encode_flac, is_silent
from tests.data.made import noise


def tone(rate: int, seconds: float = 0.5, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(
        np.float32
    )


def encoded(wave: np.ndarray, rate: int = SAMPLE_RATE, kind: str = "WAV", width=None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=kind, subtype=width)
    return buffer.getvalue()


def lying_wav(samples: int, claimed: int) -> bytes:
    data = bytearray(encoded(noise(samples)))
    data[40:44] = (2 * claimed).to_bytes(4, "little")
    return bytes(data)


def lying_flac(samples: int, claimed: int) -> bytes:
    data = bytearray(encoded(noise(samples), kind="FLAC"))
    packed = int.from_bytes(data[18:26], "big")  # STREAMINFO: its low 36 bits count the samples
    data[18:26] = (packed >> 36 << 36 | claimed).to_bytes(8, "big")
    return bytes(data)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
def test_formats_and_rates(kind: str, rate: int) -> None:
    wave = decode(encoded(tone(rate), rate, kind), max_seconds=1)
    assert wave.dtype == np.float32
    assert abs(len(wave) - SAMPLE_RATE // 2) <= (1200 if kind == "MP3" else 1)
    middle = slice(2000, 6000)
    spectrum = np.abs(np.fft.rfft(wave[middle]))
    assert abs(np.argmax(spectrum) * SAMPLE_RATE / 4000 - 440) <= 4


@pytest.mark.parametrize("rate", [11_025, 22_050, 48_000, 96_000, 7999, 44_101])
def test_resampling_keeps_the_tone(rate: int) -> None:
    wave = decode(encoded(tone(rate), rate, width="FLOAT"), max_seconds=1)
    middle = slice(2000, 6000)
    np.testing.assert_allclose(wave[middle], tone(SAMPLE_RATE)[middle], atol=2e-3)


def test_channels_are_averaged_and_24_bits_are_read() -> None:
    left, right = noise(1000, 1), noise(1000, 2)
    stereo = np.stack([left, right], axis=1)
    found = decode(encoded(stereo, width="PCM_24"), max_seconds=1)
    np.testing.assert_allclose(found, (left + right) / 2, atol=2**-22)


def test_path_and_file_and_bytes_agree(tmp_path) -> None:
    data = encoded(noise(999), kind="FLAC")
    (tmp_path / "a.flac").write_bytes(data)
    waves = [decode(s, max_seconds=1) for s in (data, io.BytesIO(data), tmp_path / "a.flac")]
    assert all(np.array_equal(waves[0], wave) for wave in waves)


def test_flac_round_trip_is_exact_at_16_bits() -> None:
    wave = (np.arange(-1000, 1000) / 32768).astype(np.float32)
    assert np.array_equal(decode(encode_flac(wave), max_seconds=1), wave)
    assert encode_flac(wave) == encode_flac(wave)


def with_nan() -> np.ndarray:
    wave = noise(100)
    wave[50] = np.nan
    return wave


FLAC = encoded(noise(SAMPLE_RATE), kind="FLAC")
MP3 = encoded(noise(SAMPLE_RATE), kind="MP3")
FAULTS = {
    "nothing": (b"", "not audio"),
    "text": (b"hello world, this is no audio" * 9, "not audio"),
    "truncated FLAC": (FLAC[: len(FLAC) // 2], "truncated"),
    "FLAC without its end": (FLAC[:-1], "truncated"),
    "truncated MP3": (MP3[: len(MP3) // 2], "truncated"),
    "truncated WAV": (encoded(noise(SAMPLE_RATE))[:9000], "truncated"),
    "no samples": (encoded(noise(0)), "empty"),
    "NaN": (encoded(with_nan(), width="FLOAT"), "not finite"),
    "infinite": (encoded(np.full(9, np.inf, np.float32), width="FLOAT"), "not finite"),
    "2 hours": (encoded(np.zeros(7200 * 100, np.float32), 100), "too long: 7200.0 s"),
    "WAV header of 8 hours": (lying_wav(999, 16_000 * 28_800), "truncated"),
    "FLAC header of 8 hours": (lying_flac(999, 16_000 * 28_800), "too long"),
    "FLAC header of 1.5 s": (lying_flac(16_000, 24_000), "truncated"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_have_one_reason(case: str) -> None:
    data, reason = FAULTS[case]
    with pytest.raises(AudioError) as caught:
        decode(data, max_seconds=2)
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)


def test_streamed_wav_without_a_length_is_whole() -> None:
    data = bytearray(encoded(noise(1000)))
    data[40:44] = b"\xff\xff\xff\xff"
    assert len(decode(bytes(data), max_seconds=1)) == 1000


def test_missing_file_is_the_systems_error(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "none.wav", max_seconds=1)


def test_lengths_at_the_limit() -> None:
    assert len(decode(encoded(noise(1)), max_seconds=1)) == 1
    assert len(decode(encoded(noise(SAMPLE_RATE)), max_seconds=1)) == SAMPLE_RATE
    with pytest.raises(AudioError, match="too long"):
        decode(encoded(noise(SAMPLE_RATE + 1)), max_seconds=1)


def test_silence() -> None:
    assert is_silent(np.zeros(0, np.float32))
    assert is_silent(np.full(1000, 1e-4, np.float32))
    assert not is_silent(noise(1000))


@cache
def ten_hours_of_silence(rate: int = 4000) -> bytes:
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", rate, 1, "PCM_16", format="FLAC") as sound:
        for _ in range(60):
            sound.write(np.zeros(600 * rate, np.int16))
    return buffer.getvalue()


@pytest.mark.parametrize("claimed", [None, 0, 4000])
def test_ten_hours_of_silence_in_half_a_megabyte_take_no_memory(claimed: int | None) -> None:
    data = bytearray(ten_hours_of_silence())
    assert len(data) < 600_000
    if claimed is not None:  # a header that says less, or that it does not know
        packed = int.from_bytes(data[18:26], "big")
        data[18:26] = (packed >> 36 << 36 | claimed).to_bytes(8, "big")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AudioError, match="too long") if claimed != 4000 else nullcontext():
        assert len(decode(bytes(data), max_seconds=30.0)) == SAMPLE_RATE
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 50_000  # KB; ten hours are 576,000
