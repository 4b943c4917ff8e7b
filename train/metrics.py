"""Scores of answers against references by the field's own libraries, with bootstrap intervals.

Every metric splits into two parts: numbers per item [N, K], and a score of their sums [K]. So a
corpus score and its resamples are the same arithmetic, and a resample costs a row of a matrix
product. N items, K numbers, U utterances, B resamples. Scores are in percent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.metadata import version

import jiwer
import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

_SEED = 20260101
_BLOCK = 128

_LOWER = [jiwer.ToLowerCase(), jiwer.RemoveMultipleSpaces(), jiwer.Strip()]
NORMALISERS: dict[str, Callable[[str], str]] = {
    "lower": jiwer.Compose(_LOWER),
    "plain": jiwer.Compose([jiwer.ToLowerCase(), jiwer.RemovePunctuation(), *_LOWER[1:]]),
    "whisper": BasicTextNormalizer(),
}
"""How texts are made comparable: lower case and single spaces; the same without punctuation
(Unicode's P, deleted); Whisper's basic one, which also drops what stands in brackets and, in
scripts that write vowels as marks, the marks."""


class Metric(ABC):
    """One way to score a set of answers."""

    name: str
    scorer: str
    """What computed it: library, version, and what else decides the figure."""
    unit = 100.0
    higher_is_better = True

    @abstractmethod
    def statistics(self, answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """[N, K] numbers of each item, float64."""

    @abstractmethod
    def value(self, sums_BK: np.ndarray) -> np.ndarray:
        """[B] scores of summed statistics."""


class _Ratio(Metric):
    """Sum of the first number over the sum of the second."""

    def value(self, sums_BK: np.ndarray) -> np.ndarray:
        return self.unit * sums_BK[:, 0] / np.maximum(sums_BK[:, 1], 1)


class ErrorRate(_Ratio):
    """Word or character errors over the reference's words or characters (jiwer)."""

    higher_is_better = False

    def __init__(self, name: str, normaliser: str):
        self.name = name
        self.scorer = f"jiwer {version('jiwer')}, text: {normaliser}"
        self._plain = NORMALISERS[normaliser]
        self._align = jiwer.process_words if name == "wer" else jiwer.process_characters

    def statistics(self, answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
        found = []
        for answer, reference in zip(answers, references, strict=True):
            out = self._align(self._plain(reference), self._plain(answer))
            missed = out.substitutions + out.deletions
            found.append((missed + out.insertions, out.hits + missed))
        return np.array(found, dtype=np.float64).reshape(-1, 2)


class Exact(_Ratio):
    """Share of answers, or of chosen options, that are the reference as a whole."""

    def __init__(self, name: str, normaliser: str):
        self.name, self.scorer = name, f"whole answer, text: {normaliser}"
        self._plain = NORMALISERS[normaliser]

    def statistics(self, answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
        right = [self._plain(a) == self._plain(r) for a, r in zip(answers, references, strict=True)]
        return np.stack([np.array(right, np.float64), np.ones(len(right))], axis=1)


class TokenF1(_Ratio):
    """Mean over items of the F1 of an answer's words, as question answering is scored (SQuAD)."""

    name = "token_f1"

    def __init__(self, normaliser: str):
        self.scorer = f"words of answer and reference, text: {normaliser}"
        self._plain = NORMALISERS[normaliser]

    def statistics(self, answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
        found = []
        for answer, reference in zip(answers, references, strict=True):
            said, meant = (Counter(self._plain(t).split()) for t in (answer, reference))
            total = said.total() + meant.total()
            found.append(2 * (said & meant).total() / total if total else 1.0)
        return np.stack([np.array(found, np.float64), np.ones(len(found))], axis=1)


class MacroF1(Metric):
    """Mean of the labels' F1, over all labels that are a reference or an answer."""

    name = "f1"

    def __init__(self, normaliser: str):
        self.scorer = f"macro average over labels, text: {normaliser}"
        self._plain = NORMALISERS[normaliser]

    def statistics(self, answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
        said, meant = ([self._plain(t) for t in texts] for texts in (answers, references))
        labels = {label: i for i, label in enumerate(sorted({*said, *meant}))}
        # Per label: times right, times said, times meant.
        found = np.zeros((len(said), 3, len(labels)))
        for n, (a, r) in enumerate(zip(said, meant, strict=True)):
            found[n, 0, labels[a]] = a == r
            found[n, 1, labels[a]] = found[n, 2, labels[r]] = 1
        return found.reshape(len(said), 3 * len(labels))

    def value(self, sums_BK: np.ndarray) -> np.ndarray:
        right, said, meant = np.split(sums_BK, 3, axis=1)
        f1 = 2 * right / np.maximum(said + meant, 1)
        return self.unit * f1.sum(1) / np.maximum((said + meant > 0).sum(1), 1)


class SacreBleu(Metric):
    """A corpus metric of sacrebleu, which keeps statistics and score apart just as we do."""

    def __init__(self, name: str, metric: BLEU | CHRF):
        self.name, self._metric = name, metric
        metric.num_refs = 1  # else learnt with the first references, and the signature asks
        self.scorer = str(metric.get_signature())

    def statistics(self, answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
        found = self._metric._extract_corpus_statistics(answers, [references])
        return np.array(found, dtype=np.float64)

    def value(self, sums_BK: np.ndarray) -> np.ndarray:
        rows = np.rint(sums_BK).astype(int).tolist()
        return np.array([self._metric._compute_score_from_stats(row).score for row in rows])


class Mean(_Ratio):
    """Mean of numbers that are given, such as distances; not in percent."""

    unit = 1.0

    def __init__(self, name: str, scorer: str, higher_is_better: bool = True):
        self.name, self.scorer, self.higher_is_better = name, scorer, higher_is_better

    def statistics(self, answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
        raise TypeError(f"{self.name} is a mean of numbers, not a score of answers")

    @staticmethod
    def of(values: Sequence[float]) -> np.ndarray:
        """[N, 2] statistics of N numbers."""
        return np.stack([np.asarray(values, np.float64), np.ones(len(values))], axis=1)


_METRICS: dict[str, Callable[[str], Metric]] = {
    "wer": lambda normaliser: ErrorRate("wer", normaliser),
    "cer": lambda normaliser: ErrorRate("cer", normaliser),
    "exact": lambda normaliser: Exact("exact", normaliser),
    "accuracy": lambda normaliser: Exact("accuracy", normaliser),
    "f1": MacroF1,
    "token_f1": TokenF1,
    "bleu": lambda _: SacreBleu("bleu", BLEU()),
    "bleu_zh": lambda _: SacreBleu("bleu_zh", BLEU(tokenize="zh")),
    "bleu_char": lambda _: SacreBleu("bleu_char", BLEU(tokenize="char")),
    "chrf": lambda _: SacreBleu("chrf", CHRF()),
}
METRICS = tuple(_METRICS)
CHOICES = ("accuracy", "f1")
"""Metrics of the option that the model finds most probable; all others judge what it says."""


@cache
def metric(name: str, normaliser: str = "plain") -> Metric:
    """The metric of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in _METRICS:
        raise ValueError(f"unknown metric {name!r}; known are {', '.join(METRICS)}")
    return _METRICS[name](normaliser)


@dataclass(frozen=True)
class Score:
    """A value with its 95 % interval over utterances; [B] scores of the resamples in `draws`."""

    value: float
    low: float | None
    high: float | None
    draws: np.ndarray = field(repr=False, compare=False)


def score(by: Metric, statistics_NK: np.ndarray, keys: Sequence[str], resamples: int) -> Score:
    """Score of a set, resampled by utterance: questions about one utterance stand or fall together.

    Sets about the same utterances are resampled alike, so differences of their `draws` are paired.

    Args:
        keys: [N] utterance of each item.
        resamples: B; 0 gives no interval.
    """
    _, at = np.unique(np.asarray(keys), return_inverse=True)
    sums_UK = np.zeros((at.max() + 1, statistics_NK.shape[1]))
    np.add.at(sums_UK, at, statistics_NK)
    value = float(by.value(sums_UK.sum(0, keepdims=True))[0])
    counts_BU = _resampled(len(sums_UK), resamples)
    blocks = [
        by.value(counts_BU[b : b + _BLOCK].astype(np.float64) @ sums_UK)
        for b in range(0, resamples, _BLOCK)
    ]
    return interval(value, np.concatenate([np.empty(0), *blocks]))


def interval(value: float, draws: np.ndarray) -> Score:
    """A value with the central 95 % of its resamples."""
    if not len(draws):
        return Score(value, None, None, draws)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Score(value, float(low), float(high), draws)


@lru_cache(maxsize=8)
def _resampled(utterances: int, resamples: int) -> np.ndarray:
    """[B, U] uint16: how often each utterance is drawn."""
    rng = np.random.default_rng(_SEED)
    shares = np.full(utterances, 1 / utterances)
    return rng.multinomial(utterances, shares, size=resamples).astype(np.uint16)
