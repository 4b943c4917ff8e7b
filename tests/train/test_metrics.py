"""Scores against the libraries' own corpus functions, and their intervals."""

from __future__ import annotations

import jiwer
import numpy as np
import pytest
import sacrebleu
from sklearn.metrics import f1_score

from train.metrics import METRICS, Mean, _resampled, metric, score

REFERENCES = [
    "The old dog sees a new house.",
    "there is a green bird, well",
    "a cat finds the red house today",
    "the dog likes the cat",
]
ANSWERS = [
    "the old dog sees the house",
    "there is a green bird well!",
    "a cat finds a a red house",
    "",
]
KEYS = ["a", "b", "c", "d"]


def value(name: str, answers: list[str], references: list[str], normaliser: str = "plain") -> float:
    by = metric(name, normaliser)
    return score(by, by.statistics(answers, references), list("abcdefgh"[: len(answers)]), 0).value


def plain(texts: list[str]) -> list[str]:
    out = jiwer.Compose([jiwer.ToLowerCase(), jiwer.RemovePunctuation()])(texts)
    return [" ".join(text.split()) for text in out]


@pytest.mark.parametrize("name", ["wer", "cer"])
def test_error_rates_are_jiwers(name: str) -> None:
    truth = getattr(jiwer, name)(plain(REFERENCES), plain(ANSWERS))
    assert value(name, ANSWERS, REFERENCES) == pytest.approx(100 * truth)
    assert value(name, ANSWERS, REFERENCES) < value(name, ANSWERS, REFERENCES, "lower")
    assert value(name, REFERENCES, REFERENCES) == 0


def test_insertions_before_an_empty_reference_count() -> None:
    assert value("wer", ["a b", "the dog"], ["", "the dog"]) == 100.0


@pytest.mark.parametrize("name", ["bleu", "bleu_zh", "bleu_char", "chrf"])
def test_translation_scores_are_sacrebleus(name: str) -> None:
    if name == "chrf":
        truth = sacrebleu.corpus_chrf(ANSWERS, [REFERENCES]).score
    else:
        tokenize = {"bleu": "13a", "bleu_zh": "zh", "bleu_char": "char"}[name]
        truth = sacrebleu.corpus_bleu(ANSWERS, [REFERENCES], tokenize=tokenize).score
        assert f"tok:{tokenize}" in metric(name).scorer
    assert value(name, ANSWERS, REFERENCES) == pytest.approx(truth)
    assert "version:" in metric(name).scorer


def test_macro_f1_is_scikit_learns_and_differs_from_accuracy() -> None:
    meant = [*list("aaaaab"), "c"]
    said = [*list("aaaaaa"), "d"]
    truth = 100 * f1_score(meant, said, average="macro", zero_division=0)
    assert value("f1", said, meant) == pytest.approx(truth)
    assert value("accuracy", said, meant) == pytest.approx(500 / 7)


def test_token_f1_counts_words_as_often_as_they_stand() -> None:
    assert value("token_f1", ["the the cat"], ["The cat."]) == pytest.approx(80)
    assert value("token_f1", ["", "cat"], ["", "dog"]) == pytest.approx(50)


def test_exact_compares_what_the_normaliser_leaves() -> None:
    assert value("exact", ["The  cat!", "dog"], ["the cat", "a dog"]) == 50
    assert value("exact", ["The  cat!", "dog"], ["the cat", "a dog"], "lower") == 0


def test_every_metric_has_a_figure_and_says_what_made_it() -> None:
    for name in METRICS:
        by = metric(name)
        found = score(by, by.statistics(ANSWERS, REFERENCES), KEYS, 200)
        assert found.low is not None
        assert found.high is not None
        assert found.low <= found.value <= found.high, name
        assert by.scorer
    with pytest.raises(ValueError, match="unknown metric 'rouge'; known are wer"):
        metric("rouge")


def test_the_interval_covers_the_mean_of_a_sample() -> None:
    # Of 95 % intervals from 200 sets of 100 items, some 190 hold the true mean; fewer than 175 or
    # all of them would each have a probability below 1e-4 if they were what they claim to be.
    rng = np.random.default_rng(0)
    by = Mean("share", "test")
    keys = [str(n) for n in range(100)]
    held = 0
    for _ in range(200):
        found = score(by, Mean.of((rng.random(100) < 0.3).astype(float)), keys, 300)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.3 <= found.high
    assert 175 <= held < 200


def test_resampling_is_by_utterance_and_seeded() -> None:
    by = Mean("share", "test")
    values = [1.0, 0.0] * 20
    alone = score(by, Mean.of(values), [str(n) for n in range(40)], 500)
    _resampled.cache_clear()
    again = score(by, Mean.of(values), [str(n) for n in range(40)], 500)
    assert (alone.low, alone.high) == (again.low, again.high)
    # Each utterance answered twice, alike: no more evidence than half of the items.
    doubled = score(by, Mean.of(np.repeat(values[:20], 2)), [str(n // 2) for n in range(40)], 500)
    halved = score(by, Mean.of(values[:20]), [f"{n:02d}" for n in range(20)], 500)
    assert np.ptp([alone.low, alone.high]) < 0.9 * np.ptp([doubled.low, doubled.high])
    assert np.ptp([doubled.low, doubled.high]) == pytest.approx(
        np.ptp([halved.low, halved.high]), rel=0.15
    )


def test_differences_of_sets_about_the_same_utterances_are_paired() -> None:
    by = Mean("share", "test")
    rng = np.random.default_rng(1)
    before = rng.random(60)
    after = before - 0.1
    keys = [str(n) for n in range(60)]
    draws = score(by, Mean.of(before), keys, 300).draws - score(by, Mean.of(after), keys, 300).draws
    assert np.ptp(draws) < 1e-9
