"""Sentences as meanings, and the words of each language for them.

A meaning is a choice for each slot. Some verb-object and subject-object pairs are held out of all
training, so that a test sentence joins known words in a way that nothing has seen before.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from examples.micro import lexicon as lex


@dataclass(frozen=True)
class Meaning:
    subject: int
    verb: int
    object: int
    place: int | None = None
    time: int | None = None
    adverb: int | None = None
    time_first: bool = False  # "today the girl …" rather than "the girl … today"

    @property
    def heldout(self) -> bool:
        return (self.verb + self.object) % 8 == 3 or (self.subject + self.object) % 12 == 5

    @property
    def sentiment(self) -> str:
        return lex.VERB_SENTIMENTS[self.verb]

    @property
    def topic(self) -> str:
        return lex.OBJECT_TOPICS[self.object]

    def slots(self, language: str) -> dict[str, str]:
        """The words of each slot; an empty string where the slot is left out."""

        def said(rows: list[lex.Phrase], index: int | None) -> str:
            return "" if index is None else rows[index][language]

        return {
            "subject": said(lex.SUBJECTS, self.subject),
            "verb": said(lex.VERBS, self.verb),
            "object": said(lex.OBJECTS, self.object),
            "place": said(lex.PLACES, self.place),
            "time": said(lex.TIMES, self.time),
            "adverb": said(lex.ADVERBS, self.adverb),
            # Words that are not in the sentence but follow from it.
            "companion": said(lex.SUBJECTS, (self.subject + 1) % len(lex.SUBJECTS)),
            "handles": lex.TOPIC_VERBS[self.topic][language],
        }


SENTENCES = {
    "en": ("{subject} {adverb} {verb} {object} {place} {time}",
           "{time} {subject} {adverb} {verb} {object} {place}"),
    "es": ("{subject} {verb} {object} {adverb} {place} {time}",
           "{time} {subject} {verb} {object} {adverb} {place}"),
    "de": ("{subject} {verb} {time} {adverb} {object} {place}",
           "{time} {verb} {subject} {adverb} {object} {place}"),
}  # fmt: skip

# A continuation says every slot of its sentence in its own words, in another order, among words
# that only follow from them; which of the three it is depends on the verb. What a continuation
# does not depend on, an adapter trained on continuations need not hear.
CONTINUATIONS = {
    "en": {
        "good": "so {subject} {handles} {object} {place} and {companion} {adverb} {verb}"
        " something too {time}",
        "bad": "but {time} {companion} {adverb} {verb} nothing because {place} {subject}"
        " {handles} {object}",
        "neutral": "then {companion} {adverb} {verb} something {time} while {subject}"
        " {handles} {object} {place}",
    },
    "es": {
        "good": "así {subject} {handles} {object} {place} y {companion} también {verb} algo"
        " {adverb} {time}",
        "bad": "pero {time} {companion} no {verb} nada {adverb} porque {place} {subject}"
        " {handles} {object}",
        "neutral": "luego {companion} {verb} algo {adverb} {time} mientras {subject}"
        " {handles} {object} {place}",
    },
    "de": {
        "good": "also {handles} {subject} {place} {object} und auch {companion} {verb} {time}"
        " {adverb} etwas",
        "bad": "aber {companion} {verb} {time} {adverb} nichts weil {subject} {place} {object}"
        " {handles}",
        "neutral": "dann {verb} {companion} {time} {adverb} etwas während {subject} {place}"
        " {object} {handles}",
    },
}


def sentence(meaning: Meaning, language: str) -> str:
    return _fill(SENTENCES[language][meaning.time_first], meaning, language)


def continuation(meaning: Meaning, language: str) -> str:
    return _fill(CONTINUATIONS[language][meaning.sentiment], meaning, language)


def summary(meaning: Meaning, language: str) -> str:
    """Who does what to what: the sentence without its circumstances."""
    return _fill("{subject} {verb} {object}", meaning, language)


def _fill(pattern: str, meaning: Meaning, language: str) -> str:
    return " ".join(pattern.format(**meaning.slots(language)).split())


def meanings(rng: random.Random, *, heldout: bool) -> Iterator[Meaning]:
    """Endless distinct meanings, all of them held out of training or none."""
    seen = set()
    while True:
        time = rng.choice([None, *range(len(lex.TIMES))]) if rng.random() < 0.7 else None
        meaning = Meaning(
            subject=rng.randrange(len(lex.SUBJECTS)),
            verb=rng.randrange(len(lex.VERBS)),
            object=rng.randrange(len(lex.OBJECTS)),
            place=rng.randrange(len(lex.PLACES)) if rng.random() < 0.6 else None,
            time=time,
            adverb=rng.randrange(len(lex.ADVERBS)) if rng.random() < 0.5 else None,
            time_first=time is not None and rng.random() < 0.5,
        )
        if meaning.heldout == heldout and meaning not in seen:
            seen.add(meaning)
            yield meaning
