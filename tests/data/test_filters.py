"""Filters: what each one finds, and what it must leave alone."""

from pathlib import Path

import pytest

from data.archive import ContentError
from data.filters import REFUSALS, FilterError, Filters, kind, letters
from data.shards import Overlay, write_overlay
from data.targets import parse_targets
from tests.data import made

ENGLISH = "the old woman walks slowly over the wooden bridge in the rain"
GERMAN = "die alte Frau geht langsam im Regen über die hölzerne Brücke"
WORDS = list(range(40))


def reason(filters: Filters, text: str, heard: str = "", language: str = "", ids=None) -> str:
    found = filters.answer(
        WORDS[: len(text.split())] if ids is None else ids, text, heard, language
    )
    return kind(found or "")


def test_without_settings_only_the_empty_are_filtered() -> None:
    assert reason(Filters(), "", ids=[]) == "empty"
    assert reason(Filters(), " \n", ids=[5, 6]) == "empty"  # white space, special tokens
    assert reason(Filters(), "As an AI language model, I", language="sw", ids=[1] * 90) == ""
    assert Filters().utterance("x" * 1000, 0.1) is None


@pytest.mark.parametrize("phrase", REFUSALS)
def test_refusals(phrase: str) -> None:
    assert reason(Filters(refusals=True), f"Well, {phrase.upper()} cannot") == "refusal"


def test_a_refusal_that_was_heard_is_an_answer() -> None:
    filters = Filters(refusals=True)
    said = "I’m sorry, but I am late"
    assert reason(filters, said) == "refusal"
    assert reason(filters, said, heard="she said i'm sorry, but i am late") == ""
    assert reason(Filters(refusals=("nope",)), "I'm sorry, but I") == ""
    assert reason(Filters(refusals=("nope",)), "Nope.") == "refusal"


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        ([7] * 6, ""),  # the one 4-gram three times
        ([7] * 7, "repetition"),
        ([1, 2, 3, 4] * 3, ""),
        ([1, 2, 3, 4] * 4, "repetition"),
        (list(range(500)), ""),
        ([1, 2], ""),
    ],
)
def test_repetition(ids: list[int], found: str) -> None:
    assert reason(Filters(max_repeats=3, repeat_ngram=4), "x", ids=ids) == found


@pytest.mark.parametrize(
    ("text", "expected", "found"),
    [
        (ENGLISH, "en", ""),
        (ENGLISH, "en_us", ""),
        (ENGLISH, "de", "language"),
        (GERMAN, "de", ""),
        (GERMAN, "en", "language"),
        (GERMAN, "", ""),  # any language will do
        (GERMAN, "xx", ""),  # not known, so not judged
        ("das ist gut", "en", ""),  # too short to be judged
        ("老太太在雨中慢慢地走过那座古老的木桥，然后她停下来看着下面的河水", "zh", ""),
        ("老太太在雨中慢慢地走过那座古老的木桥，然后她停下来看着下面的河水", "en", "language"),
    ],
)
def test_language(text: str, expected: str, found: str) -> None:
    assert reason(Filters(language=0.4), text, language=expected) == found


def test_speech_rate() -> None:
    filters = Filters(characters_per_second=(2, 30))
    assert filters.utterance("ten letters" * 3, 1.5) is None  # 20 a second
    assert kind(filters.utterance("ten letters" * 3, 0.9) or "") == "speech rate"
    assert kind(filters.utterance("a", 9.0) or "") == "speech rate"
    assert kind(filters.utterance("a", 0.0) or "") == "speech rate"
    assert letters("Ça va? 12 नमस्ते") == 4 + 2 + len("नमस्ते".translate({0x94D: None, 0x947: None}))


def test_a_filtered_target_is_kept_but_has_nothing_to_train(tmp_path: Path) -> None:
    base = made.shards(tmp_path / "s", [3])
    fates: tuple[dict, ...] = ({}, {"filtered": "refusal: 'nope'"}, {})
    records = [
        (key, {"targets": [made.target(tokens=4) | fate, made.target(tokens=2)]})
        for key, fate in zip(base.keys.to_pylist(), fates, strict=True)
    ]
    write_overlay(tmp_path / "t" / "targets-000000.tar", records, base=base)
    overlay = Overlay.open(tmp_path / "t", base)
    assert overlay.column("num_tokens").to_pylist() == [[5, 3], [0, 3], [5, 3]]
    assert parse_targets(overlay.record(1))[0].filtered == "refusal: 'nope'"
    assert parse_targets(overlay.record(0))[0].filtered == ""
    with pytest.raises(ContentError, match="'filtered' must be str"):
        parse_targets({"targets": [made.target() | {"filtered": True}]})


@pytest.mark.parametrize(
    "wrong",
    [
        {"language": 0},
        {"max_repeats": 0},
        {"repeat_ngram": 0},
        {"characters_per_second": (5, 5)},
        {"characters_per_second": (9, 1)},
    ],
)
def test_wrong_settings(wrong: dict) -> None:
    with pytest.raises(FilterError, match=next(iter(wrong))):
        Filters(**wrong)
