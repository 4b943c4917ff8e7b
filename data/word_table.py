"""The words of a corpus: when each is spoken, and which tokens write it.

N samples, M words of all of them, one sample's after another.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from data.archive import ShardError
from data.collate import Word
from data.prompts import Prompt, Spelling
from data.shards import Overlay, ShardSet
from data.words import split_words

if TYPE_CHECKING:
    from data.lengths import LengthRule

_BATCH = 4096  # transcripts that are tokenised at once


class WordTable:
    """Times and tokens of all words, from the indexes alone.

    first       [N + 1] int64: sample i has the words first[i] .. first[i + 1] - 1; none where it
                is not aligned
    token_ends  [M] int32: tokens of the transcript up to this word's end; -1 where a token
                belongs to the next word, too
    """

    def __init__(
        self,
        shards: ShardSet,
        words: Overlay,
        prompt: Prompt,
        rule: "LengthRule",
        num_samples: Callable[[int], np.ndarray],
    ):
        """`num_samples` gives the [N] lengths of the samples in an epoch.

        Raises `ShardError` where a sample has word times, but of other words than its
        transcript's.
        """
        starts = words.column("word_starts").combine_chunks()
        counts = pc.list_value_length(starts).to_numpy()
        self.first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._starts = starts.flatten().to_numpy()
        self._ends = words.column("word_ends").combine_chunks().flatten().to_numpy()
        self._of = np.repeat(np.arange(len(counts)), counts)
        self._shards, self._words, self._written = shards, words, shards.num_samples
        self._prompt, self._rule, self._num_samples = prompt, rule, num_samples
        self.token_ends = self._tokenize()

    def slot_ends(self, epoch: int) -> np.ndarray:
        """[M] int64: slots of the clip up to the pause behind each word; its last has them all.

        A pause between two words is shared between them, half and half.
        """
        heard = self._num_samples(epoch)
        slots = np.asarray(self._rule.slots(heard), dtype=np.int64)[self._of]
        pauses = (self._ends.astype(np.int64) + np.append(self._starts[1:], 0)) // 2
        before = self._slots_before(pauses, heard[self._of], self._written[self._of])
        ends = np.minimum(before, slots)
        last = self.first[1:][np.diff(self.first) > 0] - 1
        ends[last] = slots[last]
        return ends

    def words(self, i: int, samples: int, tokens: Spelling) -> tuple[Word, ...]:
        """Sample i's words as slots and `tokens`, in a clip that is played in `samples` samples.

        A word has the slots from its start to its end; a short one may lie between two slots and
        have none. Words that share a token come as one.
        """
        own = slice(int(self.first[i]), int(self.first[i + 1]))
        slots = int(self._rule.slots(samples))
        starts, ends = (
            np.minimum(self._slots_before(times[own], samples, int(self._written[i])), slots)
            for times in (self._starts, self._ends)
        )
        made: list[Word] = []
        first = token = 0
        for last in np.flatnonzero(tokens.word_ends >= 0).tolist():
            stop = int(tokens.word_ends[last])
            slot = int(starts[first])
            made.append(Word(slot, int(ends[last]) - slot, tuple(tokens.ids[token:stop])))
            first, token = last + 1, stop
        return tuple(made)

    def tokens(self, i: int) -> Spelling:
        """Sample i's transcript; empty where it is not aligned."""
        if self.first[i] == self.first[i + 1]:
            return Spelling([], np.empty(0, np.int64))
        text = self._shards.texts[i].as_py()
        return self._prompt.encode_words([text], [split_words(text)])[0]

    def _slots_before(
        self, times: np.ndarray, heard: np.ndarray | int, written: np.ndarray | int
    ) -> np.ndarray:
        """Slots before `times` of recordings of `written` samples, played in `heard` samples."""
        before = self._rule.slots_before(times.astype(np.int64) * heard // written)
        return np.asarray(before, dtype=np.int64)

    def _tokenize(self) -> np.ndarray:
        aligned = np.flatnonzero(np.diff(self.first))
        ends = np.empty(len(self._starts), dtype=np.int32)
        for start in range(0, len(aligned), _BATCH):
            batch = aligned[start : start + _BATCH]
            texts = self._shards.texts.take(batch).to_pylist()
            words = [split_words(text) for text in texts]
            for i, spans in zip(batch.tolist(), words, strict=True):
                if len(spans) != self.first[i + 1] - self.first[i]:
                    raise ShardError(
                        f"{self._words.shard_name(i)}: {self.first[i + 1] - self.first[i]} word "
                        f"times for the {len(spans)} words of {self._shards.key(i)!r}; run "
                        "data.align again"
                    )
            found = self._prompt.encode_words(texts, words)
            ends[self.first[batch[0]] : self.first[batch[-1] + 1]] = np.concatenate(
                [own.word_ends for own in found]
            )
        return ends
