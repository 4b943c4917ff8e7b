"""Corpora as they lie on disk after their official download.

A reader turns a folder or file into `Utterance`s, and into a `Fault` for every entry that it
cannot read; it opens no audio. `READERS` has them by the name that `data.build` takes.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from data.corpora import (
    common_voice,
    covost,
    fleurs,
    gigaspeech,
    instructions,
    librispeech,
    manifest,
)
from data.corpora.utterance import CorpusError, Fault, Utterance

Reader = Callable[[Path], Iterator[Utterance | Fault]]
READERS: dict[str, Reader] = {
    "common-voice": common_voice.read,
    "covost": covost.read,
    "fleurs": fleurs.read,
    "gigaspeech": gigaspeech.read,
    "instructions": instructions.read,
    "librispeech": librispeech.read,
    "manifest": manifest.read,
}

__all__ = ["READERS", "CorpusError", "Fault", "Reader", "Utterance"]
