"""Augmentation: the same for a sample wherever and whenever, and counted in the lengths."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from data.audio import SAMPLE_RATE
from data.augment import Augment, Augmenter, AugmentError
from data.prompts import Prompt
from data.shards import Overlay, ShardSet
from data.stream import Stream
from tests.data import made
from tests.data.test_audio import tone
from tests.data.test_stream import fingerprint

SPEEDS = (0.9, 1.0, 1.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[ShardSet, Overlay]:
    folder = tmp_path_factory.mktemp("augment")
    base = made.shards(folder / "s", [9, 8])
    return base, made.targets(folder / "t", base)


@pytest.fixture(scope="module")
def noises(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("noise")
    for n in range(3):
        soundfile.write(folder / f"{n}.wav", made.noise(5000 + n, n), SAMPLE_RATE)
    return folder


def log_mel(wave: np.ndarray) -> np.ndarray:
    """As if: 80 mel bins of 160 samples each."""
    return np.tile(wave[: len(wave) // 160 * 160].reshape(-1, 160).mean(1), (80, 1))


def build(data, augment: Augment | None, workers: int = 0, featurize=made.waveform, seed=3):
    return Stream.build(
        *data, Prompt(made.ByteTokenizer(), "{instruction}{input}"), made.Rule(), featurize,
        seed=seed, tokens_per_bin=120, seconds_per_bin=4.0, bins_per_step=3, workers=workers,
        augment=augment,
    )  # fmt: skip


def prints(stream: Stream, epoch: int, start: int = 0) -> list[list[str]]:
    return [[fingerprint(batch) for batch in step] for step in stream.steps(epoch, start)]


@pytest.fixture(scope="module")
def everything(noises) -> Augment:
    return Augment(SPEEDS, noises, 0.5, (0, 10), 2, 0.1, 1, 20)


def test_exact_on_resume_and_with_any_workers(data, everything) -> None:
    whole = prints(build(data, everything, featurize=log_mel), 1)
    assert prints(build(data, everything, featurize=log_mel, workers=2), 1, 1) == whole[1:]
    torch.manual_seed(5)  # the generators that others use change nothing, and are not changed
    np.random.seed(5)
    before = torch.get_rng_state()
    assert prints(build(data, everything, featurize=log_mel), 1, 2) == whole[2:]
    assert torch.equal(torch.get_rng_state(), before)


def test_each_part_changes_with_epoch_and_seed(data, everything) -> None:
    plain = Augment()
    assert prints(build(data, plain), 0) == prints(build(data, None), 0)
    wave, mel = made.noise(16_000), np.random.default_rng(0).random((80, 100), np.float32)
    for alone in (
        replace(plain, noise=everything.noise, noise_share=1.0),
        replace(plain, time_masks=1),
        replace(plain, mel_masks=1),
    ):

        def heard(i: int, epoch: int, seed: int, alone: Augment = alone) -> bytes:
            augmenter = Augmenter(alone, 10, seed)
            changed = augmenter.wave(wave, i, epoch), augmenter.features(mel, i, epoch)
            return b"".join(part.tobytes() for part in changed)

        found = {heard(i, epoch, seed) for i in (1, 2) for epoch in (0, 1) for seed in (0, 7)}
        assert len(found) >= 7
        assert heard(2, 1, 7) == heard(2, 1, 7)


def test_lengths_follow_the_speed(data) -> None:
    stream = build(data, Augment(SPEEDS))
    written = data[0].num_samples
    for epoch in (0, 1):
        planned = stream.lengths.num_samples(epoch)
        speeds = written / planned
        assert {round(speed, 2) for speed in speeds} == set(SPEEDS)
        tokens = stream.lengths.tokens(epoch)
        keys = data[0].keys.to_pylist()
        for step in stream.steps(epoch):
            for batch in step:
                rows = [keys.index(key) for key in batch.keys]
                assert not rows or list(batch.samples) == planned[rows].tolist()
                assert not rows or list(batch.lengths) == tokens[rows].tolist()
                assert sum(batch.samples) <= 4 * SAMPLE_RATE
    assert (stream.lengths.num_samples(0) != stream.lengths.num_samples(1)).any()


def test_speed_changes_pitch_and_length() -> None:
    faster = Augmenter(Augment((1.25,)), 1, 0).wave(tone(SAMPLE_RATE, 1.0), 0, 0)
    assert len(faster) == 12_800
    spectrum = np.abs(np.fft.rfft(faster[2000:10_000]))
    assert abs(np.argmax(spectrum) * SAMPLE_RATE / 8000 - 440 * 1.25) <= 2


def test_noise_has_the_ratio_asked_for(noises) -> None:
    wave = tone(SAMPLE_RATE, 1.0)
    augmenter = Augmenter(Augment(noise=noises, noise_share=0.5, noise_snr_db=(7, 7)), 200, 0)
    added = [augmenter.wave(wave, i, 0) - wave for i in range(200)]
    noisy = [noise for noise in added if noise.any()]
    assert 70 < len(noisy) < 130
    for noise in noisy:
        ratio = 10 * np.log10(np.square(wave).sum() / np.square(noise).sum())
        assert abs(ratio - 7) < 0.01
    assert not Augmenter(Augment(noise=noises, noise_share=1), 1, 0).wave(wave * 0, 0, 0).any()


def test_masks_are_bands_of_the_mean() -> None:
    mel = np.random.default_rng(0).random((80, 200)).astype(np.float32)
    augmenter = Augmenter(Augment(time_masks=2, time_mask_share=0.1, mel_masks=1), 50, 0)
    widths = []
    for i in range(50):
        masked = augmenter.features(mel, i, 0)
        hidden = masked != mel
        assert np.unique(masked[hidden]).size <= 1
        columns, rows = hidden.all(0).sum(), hidden.all(1).sum()
        assert columns <= 40
        assert rows <= 27
        assert hidden.sum() == columns * 80 + rows * 200 - columns * rows
        widths.append(columns + rows)
    assert 0 < np.mean(widths) < 67


def test_too_short_at_the_highest_speed(tmp_path) -> None:
    base = made.shards(tmp_path / "s", [0])
    made.write_shard(tmp_path / "s" / "x.tar", [made.row("k", 2700)], made.FIELDS, {})
    base = ShardSet.open(tmp_path / "s")
    stream = build((base, made.targets(tmp_path / "t", base)), Augment(SPEEDS))
    assert [skip.reason for skip in stream.skipped(0)] == [
        "too short: the length rule gives it 0 adapter slots at speed 1.1"
    ]


def test_settings_that_cannot_work(data, tmp_path) -> None:
    for wrong in (
        {"speeds": ()}, {"speeds": (0.1,)}, {"noise_share": 2}, {"noise_snr_db": (9, 1)},
        {"time_masks": -1}, {"time_mask_share": -0.1},
    ):  # fmt: skip
        with pytest.raises(AugmentError, match=next(iter(wrong))):
            Augment(**wrong)
    with pytest.raises(AugmentError, match="no audio in"):
        Augmenter(Augment(noise=tmp_path), 1, 0)
    with pytest.raises(AugmentError, match="log-mel"):
        build(data, Augment(time_masks=1))
    (tmp_path / "x.wav").write_text("no audio")
    with pytest.raises(AugmentError, match=r"x\.wav: not audio"):
        Augmenter(Augment(noise=tmp_path, noise_share=1.0), 1, 0).wave(made.noise(99), 0, 0)
    facts = Augmenter(Augment(noise=tmp_path), 1, 0).facts()
    assert facts["noise"] == [("x.wav", 8)]
