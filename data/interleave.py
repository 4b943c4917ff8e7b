"""Interleaving: an utterance partly heard and partly read (MTBI, 2505.18644).

Its words are cut into spans; each is kept as the slots that speak it, or replaced by the tokens
that write it. The encoder hears the whole utterance all the same, and the answer stays as it is.
The paper does not say how it cuts; this way is ours. What is drawn for a sample follows from
(seed, epoch, its words' numbers) alone, so that a resume, or another number of ranks or workers,
repeats it exactly.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from data.draws import INTERLEAVED, SPANS, draws
from data.prompts import Document, Speech, Text
from data.word_table import WordTable


class InterleaveError(ValueError):
    """Settings of interleaving that cannot work; the message names the setting."""


@dataclass(frozen=True)
class Interleave:
    """How utterances are cut.

    span_words   words of a span, from the least to the most; an utterance's last may have fewer
    order        spans `alternate` between speech and text, the first being either; or each is
                 drawn, `random`
    text_share   the probability of text, where `random`
    pure_speech  share of the samples that are heard as they are

    Samples that are not aligned, or that would turn out all speech or all text (with fewer words
    than make two spans, say), are heard as they are, too.
    """

    # A misspelt setting is an error in a config, too.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    span_words: tuple[int, int] = (3, 10)
    order: Literal["alternate", "random"] = "alternate"
    text_share: float = 0.5
    pure_speech: float = 0.5

    def __post_init__(self) -> None:
        low, high = self.span_words
        if not 1 <= low <= high:
            raise InterleaveError(
                f"span_words must be (least, most), at least 1, but is {self.span_words}"
            )
        for name in ("text_share", "pure_speech"):
            if not 0 <= getattr(self, name) <= 1:
                raise InterleaveError(
                    f"{name} must be within 0 and 1, but is {getattr(self, name)}"
                )


@dataclass(frozen=True)
class _Spans:
    """The spans of an epoch's interleaved samples, one sample's after another.

    first      [N + 1] int64: sample i has the spans first[i] .. first[i + 1] - 1; none where it
               is heard as it is
    is_text    [spans] bool
    slots      [spans, 2] int64: of the clip, from, to
    tokens     [spans, 2] int64: of the transcript, from, to
    positions  [N] int64: LLM positions of a sample's spans
    """

    first: np.ndarray
    is_text: np.ndarray
    slots: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray


class Interleaver:
    """Cuts the samples of a run as an `Interleave` says."""

    def __init__(self, settings: Interleave, words: WordTable, seed: int):
        self.settings = settings
        self._words = words
        self._seed = seed
        # No span ends within a token: it goes on to the next word's end where that can be.
        may_end = np.append(words.token_ends >= 0, True)
        may_begin = np.append(True, may_end[:-1])
        may_begin[words.first] = True
        here = np.where(may_begin, np.arange(len(may_begin)), len(may_begin))
        self._next_cut = np.minimum.accumulate(here[::-1])[::-1]
        self._epoch = -1
        self._spans: _Spans | None = None

    def positions(self, epoch: int, slots: np.ndarray) -> np.ndarray:
        """[N] int64: LLM positions of each sample's input, of `slots` [N] where all is heard."""
        spans = self._in(epoch)
        return np.where(np.diff(spans.first) > 0, spans.positions, slots)

    def parts(self, i: int, epoch: int, ids: list[int]) -> Document:
        """Sample i's input in this epoch, `ids` being its transcript's tokens.

        Empty where it is heard as it is.
        """
        spans = self._in(epoch)
        made: list[Text | Speech] = []
        for n in range(int(spans.first[i]), int(spans.first[i + 1])):
            a, b = (spans.tokens if spans.is_text[n] else spans.slots)[n].tolist()
            made.append(Text(tuple(ids[a:b])) if spans.is_text[n] else Speech(a, b - a))
        return tuple(made)

    def _in(self, epoch: int) -> _Spans:
        if self._spans is None or epoch != self._epoch:
            self._epoch, self._spans = epoch, self._draw(epoch)
        return self._spans

    def _draw(self, epoch: int) -> _Spans:
        words, settings = self._words, self.settings
        count = len(words.first) - 1
        coins = draws(count, self._seed, epoch, INTERLEAVED)
        random = draws(len(words.token_ends), self._seed, epoch, SPANS)
        chosen = (_uniform(coins) >= settings.pure_speech) & (np.diff(words.first) > 0)
        sample, start, stop, number = self._cut(np.flatnonzero(chosen), random)
        if settings.order == "alternate":
            is_text = (number + (coins[sample] & np.uint64(1)).astype(np.int64)) % 2 == 1
        else:
            is_text = _uniform(random[start]) < settings.text_share
        begins = start == words.first[sample]
        slots, tokens = (
            np.stack([np.where(begins, 0, ends[start - 1]), ends[stop - 1]], axis=1).astype(
                np.int64
            )
            for ends in (words.slot_ends(epoch), words.token_ends)
        )
        num_slots, num_tokens = (np.diff(edges, axis=1)[:, 0] for edges in (slots, tokens))
        # What has no slot of its own would be lost as speech, and what has no token, as text.
        is_text = (is_text | (num_slots == 0)) & (num_tokens > 0)
        heard = np.bincount(sample[~is_text], num_slots[~is_text], minlength=count)
        read = np.bincount(sample[is_text], minlength=count)
        kept = ((heard > 0) & (read > 0))[sample]
        sample, is_text = sample[kept], is_text[kept]
        cost = np.where(is_text, num_tokens[kept], num_slots[kept])
        return _Spans(
            first=np.searchsorted(sample, np.arange(count + 1)),
            is_text=is_text,
            slots=slots[kept],
            tokens=tokens[kept],
            positions=np.bincount(sample, cost, minlength=count).astype(np.int64),
        )

    def _cut(
        self, chosen: np.ndarray, random: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The spans of the `chosen` samples in order.

        [spans] int64 each: its sample, its first word and the one past its last (of all M), and
        its number in the sample.
        """
        low, high = self.settings.span_words
        at, end = self._words.first[chosen], self._words.first[chosen + 1]
        found = [np.empty((4, 0), dtype=np.int64)]
        while len(chosen):
            length = low + (random[at] % np.uint64(high - low + 1)).astype(np.int64)
            stop = self._next_cut[np.minimum(at + length, end)]
            found.append(np.stack([chosen, at, stop, np.full(len(at), len(found) - 1)]))
            left = stop < end
            chosen, at, end = chosen[left], stop[left], end[left]
        spans = np.concatenate(found, axis=1)
        sample, start, stop, number = spans[:, np.argsort(spans[1])]
        return sample, start, stop, number


def _uniform(raw: np.ndarray) -> np.ndarray:
    """uint64 draws as floats in [0, 1)."""
    return (raw >> np.uint64(11)) * 2.0**-53
