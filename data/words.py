"""The record of alignment: when each word of a transcript is spoken.

`KEY.words.json` is `{"words": [word, ...]}`, all the words of the transcript in their order, each

    {"text": str, "start": float, "end": float, "score": float}

in seconds of the recording; `score` is the mean probability of its letters, and 0 for a word
that the aligner could place but not spell. An utterance that could not be aligned is
`{"words": [], "unaligned": reason}`. The index repeats the times, in samples at 16 kHz, the words
that were not spelled, and the reason, so that planning and training open no tar.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from data.archive import ContentError
from data.audio import SAMPLE_RATE

# Chinese and Japanese write no spaces: there every character counts as a word.
_SPACELESS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\s{_SPACELESS}]+")

_MAX_SECONDS = 1e5

WORD_FIELDS = {
    "word_starts": pa.list_(pa.int32()),
    "word_ends": pa.list_(pa.int32()),
    "unspelled": pa.list_(pa.string()),
    "unaligned": pa.string(),
}


@dataclass(frozen=True)
class WordTime:
    """A word of the transcript, from `start` to `end` in samples at 16 kHz."""

    text: str
    start: int
    end: int
    score: float


def split_words(text: str) -> list[tuple[int, int]]:
    """Where each word of a transcript stands in it, as (first, past the last) character.

    Words are what whitespace separates, punctuation included; Chinese and Japanese characters
    stand for themselves. Thai and other scripts without spaces come phrase by phrase.
    """
    return [match.span() for match in _WORD.finditer(text)]


def words_record(words: list[WordTime]) -> dict[str, Any]:
    """The record of an aligned utterance."""
    return {
        "words": [
            {
                "text": word.text,
                "start": word.start / SAMPLE_RATE,
                "end": word.end / SAMPLE_RATE,
                "score": round(word.score, 4),
            }
            for word in words
        ]
    }


def parse_words(record: Mapping[str, Any]) -> list[WordTime]:
    """The words of a record; raises `ContentError` naming the word that is wrong."""
    found = record.get("words")
    if not isinstance(found, list):
        raise ContentError(f"'words' must be a list, but is {found!r:.40}")
    words = [_parse(raw, number) for number, raw in enumerate(found)]
    times = np.array([time for word in words for time in (word.start, word.end)])
    if len(words) and (times[0] < 0 or (np.diff(times) < 0).any()):
        number = int(np.flatnonzero(np.diff(times, prepend=0) < 0)[0]) // 2
        raise ContentError(f"word {number}: begins before the word ahead of it ends, or ends early")
    return words


def _parse(raw: Any, number: int) -> WordTime:
    kinds: dict[str, Any] = {"text": str, "start": float, "end": float, "score": float}
    for field, kind in kinds.items():
        value = raw.get(field) if isinstance(raw, dict) else None
        if not isinstance(value, (float, int) if kind is float else kind):
            raise ContentError(
                f"word {number}: {field!r} must be {kind.__name__}, but is {value!r:.40}"
            )
        if kind is float and not 0 <= value <= _MAX_SECONDS:  # nor NaN
            raise ContentError(
                f"word {number}: {field!r} must be from 0 to {_MAX_SECONDS:g}, but is {value!r:.40}"
            )
    start, end = (round(raw[edge] * SAMPLE_RATE) for edge in ("start", "end"))
    return WordTime(raw["text"], start, end, float(raw["score"]))


def word_columns(record: Mapping[str, Any]) -> dict[str, Any]:
    """The index columns of a record; raises as `parse_words` does."""
    words = parse_words(record)
    return {
        "word_starts": [word.start for word in words],
        "word_ends": [word.end for word in words],
        "unspelled": [word.text for word in words if word.score == 0],
        "unaligned": record.get("unaligned") or "",
    }
