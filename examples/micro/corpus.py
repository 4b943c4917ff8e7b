"""The spoken corpus on disk: who says what, and the layouts that `data.build` reads.

English training speech lies in LibriSpeech's layout, all else in folders with a JSONL manifest.
"""

from __future__ import annotations

import json
import multiprocessing
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import soundfile

from examples.micro import grammar, voices
from examples.micro.lexicon import LANGUAGES
from examples.micro.settings import CorpusSettings

_LIBRISPEECH = Path("LibriSpeech/train-micro")


@dataclass(frozen=True)
class Utterance:
    key: str
    meaning: grammar.Meaning
    speaker: voices.Speaker
    how: voices.Delivery
    split: str

    @property
    def language(self) -> str:
        return self.speaker.language

    @property
    def text(self) -> str:
        return grammar.sentence(self.meaning, self.language)

    @property
    def audio(self) -> Path:
        speaker, chapter, _ = self.key.split("-")
        english_training = self.split == "train" and self.language == "en"
        folder = _LIBRISPEECH if english_training else Path(self.split) / self.language
        return folder / speaker / chapter / f"{self.key}.flac"


def plan(settings: CorpusSettings, split: str) -> list[Utterance]:
    """Every utterance of a split, speaker by speaker: a pure function of the settings."""
    heldout = split == "test"
    count = settings.test_per_language if heldout else settings.train_per_language
    utterances = []
    for language in LANGUAGES:
        rng = random.Random(f"{settings.seed} {split} {language}")
        meanings = list(islice(grammar.meanings(rng, heldout=heldout), count))
        speakers = voices.speakers(language, heldout=heldout)
        for number, speaker in enumerate(speakers):
            utterances += [
                Utterance(
                    key=f"{speaker.name}-{speaker.name}1-{index:04d}",
                    meaning=meaning,
                    speaker=speaker,
                    how=voices.delivery(speaker, rng),
                    split=split,
                )
                for index, meaning in enumerate(meanings[number :: len(speakers)])
            ]
    return utterances


def write(
    settings: CorpusSettings, root: Path, processes: int, spoken: Callable[[int], None]
) -> None:
    """Speak and write the whole corpus under `root`; `spoken(n)` is told of n more utterances."""
    by_speaker: dict[str, list[Utterance]] = {}
    for split in ("train", "test"):
        utterances = plan(settings, split)
        _write_manifest(utterances, root / f"{split}.jsonl")
        for utterance in utterances:
            by_speaker.setdefault(utterance.speaker.name, []).append(utterance)
    # A fresh process for each speaker: its speech does not depend on who spoke before.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Pool(processes, maxtasksperchild=1) as pool:
        jobs = [(root, utterances) for utterances in by_speaker.values()]
        for count in pool.imap_unordered(_speak_all, jobs):
            spoken(count)


def _write_manifest(utterances: list[Utterance], path: Path) -> None:
    """What lies in LibriSpeech's layout needs no manifest, and gets none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "key": utterance.key,
            "audio": str(utterance.audio),
            "text": utterance.text,
            "language": utterance.language,
            "speaker": utterance.speaker.name,
            "split": utterance.split,
        }
        for utterance in utterances
        if not utterance.audio.is_relative_to(_LIBRISPEECH)
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def _speak_all(job: tuple[Path, list[Utterance]]) -> int:
    root, utterances = job
    for utterance in utterances:
        path = root / utterance.audio
        path.parent.mkdir(parents=True, exist_ok=True)
        wave = voices.speak(utterance.text, utterance.speaker, utterance.how)
        soundfile.write(path, wave, voices.SAMPLE_RATE)
    if path.is_relative_to(root / _LIBRISPEECH):
        transcript = path.parent / f"{path.stem.rpartition('-')[0]}.trans.txt"
        lines = [f"{utterance.key} {utterance.text}\n" for utterance in utterances]
        transcript.write_text("".join(lines), encoding="utf-8")
    return len(utterances)
