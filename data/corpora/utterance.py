"""What a corpus reader yields."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class CorpusError(ValueError):
    """A corpus that does not lie on disk as expected; the message says where and what."""


@dataclass(frozen=True)
class Utterance:
    """One recording with its transcript; or, without `audio`, a text that is only read.

    `text` is normalised as the corpus's reader documents, `raw_text` as found; `language` and
    `split` are None where the corpus does not say; `extra` is kept in the shard's JSON. `span` is
    its part of a longer recording, from one second to another.
    """

    key: str
    audio: Path | None
    text: str
    raw_text: str
    language: str | None
    speaker: str | None
    split: str | None
    extra: dict[str, Any] = field(default_factory=dict)
    span: tuple[float, float] | None = None


@dataclass(frozen=True)
class Fault:
    """An entry that is no utterance; `where` names it (a key, or file and line)."""

    where: str
    reason: str
    split: str | None
