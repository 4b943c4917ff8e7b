"""Which of stage 1's answers are worth learning: each rule gives a reason, none drops in silence.

A filtered target stays in its shard with its reason and is not trained. Only empty answers are
filtered always; what else is, the config says, since what is a fault depends on the task: a
translation repeats nothing, a spelling exercise does.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from data.templates import primary

# What chat models say instead of the task (BLSP-Emo filters the first two), in their own words.
REFUSALS = (
    "as an ai language model",
    "i'm sorry, but i",
    "i am sorry, but i",
    "as an ai assistant",
    "as a language model",
    "as a large language model",
    "i cannot assist with",
    "i can't assist with",
    "i'm unable to",
    "i am unable to",
    "lo siento, pero no puedo",
    "como modelo de lenguaje",
    "als ki-sprachmodell",
    "es tut mir leid, aber ich",
    "en tant que modèle de langage",
    "je suis désolé, mais je",
    "作为一个人工智能",
    "作为一个语言模型",
)
# Below this, a language is guessed from names and loan words.
_MIN_LETTERS = 20


class FilterError(ValueError):
    """Settings of the filters that cannot work; the message names the setting."""


@dataclass(frozen=True)
class Filters:
    """What is kept out of training.

    refusals               phrases that make an answer a refusal; True takes the built-in ones
    language               an answer is filtered where another language than its template says is
                           recognised with at least this probability (py3langid); answers of fewer
                           than 20 letters, and languages that it does not know, are not judged
    max_repeats            times that one n-gram of an answer's tokens may come
    repeat_ngram           tokens of that n-gram
    characters_per_second  bounds of the transcript's letters and digits over the clip's seconds;
                           beyond them, transcript and audio are not of each other
    """

    # A misspelt setting is an error in a config, too.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    refusals: bool | tuple[str, ...] = False
    language: float | None = None
    max_repeats: int | None = None
    repeat_ngram: int = 4
    characters_per_second: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.language is not None and not 0 < self.language <= 1:
            raise FilterError(f"language must be within 0 and 1, but is {self.language}")
        for name in ("max_repeats", "repeat_ngram"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise FilterError(f"{name} must be at least 1, but is {value}")
        bounds = self.characters_per_second
        if bounds is not None and not 0 <= bounds[0] < bounds[1]:
            raise FilterError(f"characters_per_second must be (low, high), but is {bounds}")

    def facts(self) -> dict[str, Any]:
        """The settings as JSON, for the targets' provenance."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
        }

    def utterance(self, text: str, seconds: float) -> str | None:
        """Why no target of this utterance is trained, or None."""
        if self.characters_per_second is None:
            return None
        low, high = self.characters_per_second
        rate = letters(text) / max(seconds, 1e-3)
        if low <= rate <= high:
            return None
        return f"speech rate: {rate:.1f} characters a second, expected {low:g} to {high:g}"

    def answer(self, ids: Sequence[int], text: str, heard: str, language: str) -> str | None:
        """Why an answer is not trained, or None.

        Args:
            ids: its tokens, without EOS. text: the same, decoded.
            heard: the transcript; what it says itself is no refusal when the answer repeats it.
            language: that the answer must be in, or "".
        """
        if not ids or not text.strip():  # special tokens and white space say nothing
            return "empty"
        return (
            self._refusal(text.casefold(), heard.casefold())
            or self._repetition(ids)
            or self._language(text, primary(language))
        )

    def _refusal(self, text: str, heard: str) -> str | None:
        phrases = REFUSALS if self.refusals is True else self.refusals or ()
        text, heard = text.replace("\u2019", "'"), heard.replace("\u2019", "'")
        for phrase in phrases:
            if phrase.casefold() in text and phrase.casefold() not in heard:
                return f"refusal: {phrase!r}"
        return None

    def _repetition(self, ids: Sequence[int]) -> str | None:
        if self.max_repeats is None:
            return None
        n = self.repeat_ngram
        grams = Counter(tuple(ids[at : at + n]) for at in range(len(ids) - n + 1))
        most = max(grams.values(), default=0)
        if most <= self.max_repeats:
            return None
        return f"repetition: {n} tokens come {most} times, expected {self.max_repeats} at most"

    def _language(self, text: str, expected: str) -> str | None:
        if self.language is None or not expected or letters(text) < _MIN_LETTERS:
            return None
        found, probability = _identifier().classify(text)
        if expected not in _identifier().labels or found == expected:
            return None
        if probability < self.language:
            return None
        return f"language: {found} ({probability:.2f}), expected {expected}"


def kind(reason: str) -> str:
    """A reason without its particulars, to count by."""
    return reason.partition(":")[0]


def letters(text: str) -> int:
    """Letters and digits of a text, in any script; marks that combine are not counted."""
    return sum(unicodedata.category(c)[0] in "LN" for c in text)


@cache
def _identifier() -> Any:
    """py3langid's 140 languages, with probabilities. Its model takes a second to load."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
