"""The grammar: parallel, held out by combination, and continued with all that was said."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from itertools import islice

import pytest

from examples.micro import grammar
from examples.micro import lexicon as lex
from examples.micro.grammar import Meaning


def _some(heldout: bool, count: int = 2000) -> list[Meaning]:
    return list(islice(grammar.meanings(random.Random(0), heldout=heldout), count))


def _changes(meaning: Meaning) -> dict[str, Meaning]:
    """The meaning with one slot changed, for every slot and also with it left out."""
    tables = {
        "subject": lex.SUBJECTS, "verb": lex.VERBS, "object": lex.OBJECTS,
        "place": lex.PLACES, "time": lex.TIMES, "adverb": lex.ADVERBS,
    }  # fmt: skip
    changed = {}
    for slot, table in tables.items():
        value = getattr(meaning, slot)
        changed[slot] = replace(meaning, **{slot: 0 if value is None else (value + 1) % len(table)})
        if slot in ("place", "time", "adverb") and value is not None:
            changed[f"no {slot}"] = replace(meaning, **{slot: None})
    return changed


def test_no_pair_of_a_test_sentence_is_in_training() -> None:
    def is_heldout_pair(meaning: Meaning, slot: str) -> bool:
        return (getattr(meaning, slot), meaning.object) not in trained[slot]

    trained = {
        slot: {(getattr(m, slot), m.object) for m in _some(heldout=False, count=20_000)}
        for slot in ("subject", "verb")
    }
    for meaning in _some(heldout=True):
        assert is_heldout_pair(meaning, "subject") or is_heldout_pair(meaning, "verb")


def test_every_word_of_a_test_sentence_is_in_training() -> None:
    trained = {
        word
        for meaning in _some(heldout=False)
        for language in lex.LANGUAGES
        for word in grammar.sentence(meaning, language).split()
    }
    for meaning in _some(heldout=True):
        for language in lex.LANGUAGES:
            assert set(grammar.sentence(meaning, language).split()) <= trained


@pytest.mark.parametrize("language", lex.LANGUAGES)
def test_sentences_say_exactly_their_meaning(language: str) -> None:
    meanings = _some(heldout=False)
    assert len({grammar.sentence(meaning, language) for meaning in meanings}) == len(meanings)
    for meaning in meanings:
        said = grammar.sentence(meaning, language).split()
        slots = meaning.slots(language)
        expected = [slots[field.name] for field in fields(Meaning) if field.name in slots]
        assert sorted(said) == sorted(" ".join(expected).split())


@pytest.mark.parametrize("language", lex.LANGUAGES)
def test_continuation_depends_on_every_slot(language: str) -> None:
    for meaning in _some(heldout=False, count=300):
        before = grammar.continuation(meaning, language)
        for slot, changed in _changes(meaning).items():
            assert grammar.continuation(changed, language) != before, slot


@pytest.mark.parametrize("language", lex.LANGUAGES)
def test_continuation_mentions_the_words_of_the_sentence(language: str) -> None:
    for meaning in _some(heldout=False, count=300):
        continued = grammar.continuation(meaning, language).split()
        assert set(grammar.sentence(meaning, language).split()) <= set(continued)
        assert continued != grammar.sentence(meaning, language).split()


@pytest.mark.parametrize("language", lex.LANGUAGES)
def test_words_of_a_slot_are_told_apart(language: str) -> None:
    for table in (lex.SUBJECTS, lex.VERBS, lex.OBJECTS, lex.PLACES, lex.TIMES, lex.ADVERBS):
        last_words = [phrase[language].split()[-1] for phrase in table]
        assert len(set(last_words)) == len(table)


def test_time_may_come_first() -> None:
    meaning = Meaning(subject=0, verb=0, object=0, time=0, time_first=True)
    assert grammar.sentence(meaning, "en") == "today the girl finds the bread"
    assert grammar.sentence(meaning, "de") == "heute findet das mädchen das brot"
    plain = replace(meaning, time_first=False)
    assert grammar.sentence(plain, "es") == "la niña encuentra el pan hoy"
