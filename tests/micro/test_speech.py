"""Voices and the corpus that they speak."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from examples.micro import corpus, voices
from examples.micro.lexicon import LANGUAGES
from examples.micro.settings import CorpusSettings

SMALL = CorpusSettings(train_per_language=72, test_per_language=8, seed=5)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    told: list[int] = []
    corpus.write(SMALL, folder, processes=2, spoken=told.append)
    assert sum(told) == 3 * (72 + 8)
    return folder


def test_no_voice_is_in_both_splits() -> None:
    for language in LANGUAGES:
        train = {s.voice.split("+")[1] for s in voices.speakers(language, heldout=False)}
        test = {s.voice.split("+")[1] for s in voices.speakers(language, heldout=True)}
        assert len(train) > 10
        assert len(test) > 2
        assert not train & test
    both = [voices.speakers(language, heldout=h) for language in LANGUAGES for h in (True, False)]
    names = [speaker.name for speakers in both for speaker in speakers]
    assert len(set(names)) == len(names)


def test_speech_is_the_same_in_any_fresh_process() -> None:
    script = (
        "import random, sys; from examples.micro import voices;"
        "s = voices.speakers('es', heldout=True)[2]; how = voices.delivery(s, random.Random(1));"
        "out = [voices.speak(t, s, how) for t in ('la niña ve el pan', 'el chico ama la sopa')];"
        "sys.stdout.buffer.write(b''.join(w.tobytes() for w in out))"
    )
    spoken = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
        for _ in range(2)
    ]
    assert len(spoken[0]) > 4 * voices.SAMPLE_RATE
    assert hashlib.sha256(spoken[0]).digest() == hashlib.sha256(spoken[1]).digest()


def test_resampling_keeps_a_tone_and_drops_what_would_alias() -> None:
    seconds = np.arange(22_050) / 22_050
    for hertz, loud in ((440, True), (6000, True), (9500, False)):
        out = voices._resample(np.sin(2 * np.pi * hertz * seconds).astype(np.float32), 22_050)
        assert len(out) == 16_000
        middle = out[1000:-1000]
        if loud:
            expected = np.sin(2 * np.pi * hertz * np.arange(16_000) / 16_000)[1000:-1000]
            np.testing.assert_allclose(middle, expected, atol=0.05)
        else:
            assert np.abs(middle).max() < 0.05


def test_every_utterance_lies_where_its_manifest_says(root: Path) -> None:
    rows = [
        json.loads(line)
        for split in ("train", "test")
        for line in (root / f"{split}.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 2 * 72 + 3 * 8  # English training speech has no manifest
    for row in rows:
        assert set(row) == {"key", "audio", "text", "language", "speaker", "split"}
        assert "." not in row["key"]
        wave, rate = soundfile.read(root / row["audio"], dtype="float32")
        assert rate == voices.SAMPLE_RATE
        assert 0.5 < len(wave) / rate < 5
        assert 0.2 < np.abs(wave).max() < 1


def test_english_training_speech_lies_as_librispeech_does(root: Path) -> None:
    transcripts = sorted((root / "LibriSpeech" / "train-micro").glob("*/*/*.trans.txt"))
    said = {}
    for path in transcripts:
        speaker, chapter = path.parts[-3:-1]
        assert path.name == f"{speaker}-{chapter}.trans.txt"
        for line in path.read_text().splitlines():
            key, _, text = line.partition(" ")
            assert soundfile.info(path.with_name(f"{key}.flac")).frames > 0
            said[key] = text
    expected = {u.key: u.text for u in corpus.plan(SMALL, "train") if u.language == "en"}
    assert said == expected


def test_the_plan_holds_out_sentences() -> None:
    train, test = corpus.plan(SMALL, "train"), corpus.plan(SMALL, "test")
    assert not any(utterance.meaning.heldout for utterance in train)
    assert all(utterance.meaning.heldout for utterance in test)
    keys = [utterance.key for utterance in train + test]
    assert len(set(keys)) == len(keys)
