"""What each sample costs in LLM positions, and which of its targets an epoch takes."""

from typing import Protocol, TypeVar

import numpy as np
import pyarrow.compute as pc

from data.archive import ShardError
from data.audio import SAMPLE_RATE
from data.augment import Augmenter
from data.draws import TARGETS, draws
from data.interleave import Interleave, Interleaver
from data.prompts import Prompt
from data.shards import Overlay, ShardSet
from data.word_table import WordTable

Ints = TypeVar("Ints", int, np.ndarray)


class LengthRule(Protocol):
    """The model's arithmetic "samples -> encoder frames -> adapter slots", on ints or int64 [N].

    `slots_before` counts the slots that stand for what is heard before a sample; a clip that
    ends has at most its `slots` of them.
    """

    def frames(self, num_samples: Ints) -> Ints: ...

    def slots(self, num_samples: Ints) -> Ints: ...

    def slots_before(self, sample: Ints) -> Ints: ...


class LengthTable:
    """LLM positions per sample: prompt, slots or text, and target, without opening a tar.

    A sample without audio is read, and costs the tokens of its text; so is, with `reads`, every
    transcript by a teacher (`losses.kl`), and a sample then costs the longer of the two documents.

    What is longer than `max_seconds` is refused, as is what fills no slot.

    A sample with several targets takes one of them per epoch: the first is drawn from the seed,
    and each epoch takes the next, so that all have their turn; empty answers have none. Its
    length at 16 kHz follows the speed that the epoch plays it at. `words` knows where the words
    are, and `interleaver` which of them the epoch has as text, where these were asked for.
    """

    def __init__(
        self,
        shards: ShardSet,
        targets: Overlay,
        prompt: Prompt,
        rule: LengthRule,
        *,
        seed: int,
        augmenter: Augmenter | None = None,
        words: Overlay | None = None,
        interleave: Interleave | None = None,
        reads: bool = False,
        max_seconds: float | None = None,
    ):
        """Raises `ValueError` where `interleave` has no `words` to go by."""
        per_target = targets.column("instruction").combine_chunks()
        written = pc.list_value_length(per_target).to_numpy().astype(np.int64)
        answer_tokens = _flat_ints(targets)
        counted = pc.list_value_length(targets.column("num_tokens").combine_chunks())
        if not np.array_equal(counted.to_numpy(), written):
            i = int(np.flatnonzero(counted.to_numpy() != written)[0])
            raise ShardError(
                f"{targets.shard_name(i)}: its index has {counted[i]} counts of tokens for "
                f"{written[i]} instructions of {shards.key(i)!r}; make the targets again"
            )
        of_sample = np.repeat(np.arange(len(written)), written)
        answered = np.flatnonzero(answer_tokens)
        self._counts = np.bincount(of_sample[answered], minlength=len(written))
        self._starts = np.cumsum(self._counts) - self._counts
        self._first = draws(len(shards), seed, 0, TARGETS) % np.maximum(1, self._counts).astype(
            np.uint64
        )
        # Of the answered targets, sample by sample: which one of its record, and what it costs.
        self._numbers = answered - (np.cumsum(written) - written)[of_sample[answered]]
        self._target_tokens = (answer_tokens + _prompt_tokens(per_target, prompt))[answered]
        self._written_samples = shards.num_samples
        self._reads, self._max_seconds = reads, max_seconds
        self._text_tokens = _text_tokens(shards, prompt, reads)
        self._rule = rule
        self._augmenter = augmenter
        self.words = WordTable(shards, words, prompt, rule, self.num_samples) if words else None
        if interleave and self.words is None:
            raise ValueError("interleaving needs word times; make them by data.align")
        self.interleaver = Interleaver(interleave, self.words, seed) if interleave else None  # type: ignore[arg-type]

    def refused(self) -> dict[int, str]:
        """Samples that no epoch can use, with the reason."""
        fastest, at_speed = self._written_samples, ""
        if self._augmenter and max(self._augmenter.augment.speeds) > 1:
            fastest = self._augmenter.shortest(self._written_samples)
            at_speed = f" at speed {max(self._augmenter.augment.speeds):g}"
        short = np.flatnonzero((self._rule.slots(fastest) < 1) & (self._written_samples > 0))
        empty = np.flatnonzero(self._counts == 0)
        seconds, most = self._written_samples / SAMPLE_RATE, self._max_seconds
        long = np.flatnonzero(seconds > most).tolist() if most is not None else []
        return (
            dict.fromkeys(empty.tolist(), "stage 1 left nothing to train: empty or filtered")
            | dict.fromkeys(
                short.tolist(), f"too short: the length rule gives it 0 adapter slots{at_speed}"
            )
            | {i: f"too long: {seconds[i]:.1f} s, over max_seconds of {most:g}" for i in long}
        )

    def target_of(self, epoch: int) -> np.ndarray:
        """[N] int64: the number of the target that each sample takes in this epoch."""
        return np.append(self._numbers, 0)[self._turn(epoch)]

    def num_samples(self, epoch: int) -> np.ndarray:
        """[N] int64: each sample's length at 16 kHz as this epoch plays it."""
        if self._augmenter is None:
            return self._written_samples
        return self._augmenter.num_samples(self._written_samples, epoch)

    def tokens(self, epoch: int) -> np.ndarray:
        """[N] int64: LLM positions of each sample in this epoch; refused ones cost their slots."""
        heard = np.asarray(self._rule.slots(self.num_samples(epoch)), dtype=np.int64)
        given = np.where(self._written_samples > 0, heard, self._text_tokens)
        if self.interleaver:
            given = self.interleaver.positions(epoch, given)
        if self._reads:
            given = np.maximum(given, self._text_tokens)
        return given + np.append(self._target_tokens, 0)[self._turn(epoch)]

    def _turn(self, epoch: int) -> np.ndarray:
        """[N] int64: which of the answered targets, or one past them for a sample without any."""
        turn = self._starts + (self._first.astype(np.int64) + epoch) % np.maximum(1, self._counts)
        return np.where(self._counts > 0, turn, len(self._numbers))


def _text_tokens(shards: ShardSet, prompt: Prompt, reads: bool) -> np.ndarray:
    """[N] int64: tokens of the texts that some document has, 0 for the others.

    With `reads` that is all of them, which takes a second for some ten thousand.
    """
    found = np.zeros(len(shards), dtype=np.int64)
    read = np.arange(len(shards)) if reads else np.flatnonzero(shards.num_samples == 0)
    if len(read):
        found[read] = prompt.count([text or "" for text in shards.texts.take(read).to_pylist()])
    return found


def _flat_ints(targets: Overlay) -> np.ndarray:
    """[targets] int64: answer tokens of all samples' targets, flat."""
    return targets.column("num_tokens").combine_chunks().flatten().to_numpy().astype(np.int64)


def _prompt_tokens(instructions_per_sample: object, prompt: Prompt) -> np.ndarray:
    """[targets] int64: prompt tokens of each target; every distinct instruction is read once."""
    coded = instructions_per_sample.flatten().dictionary_encode()  # type: ignore[attr-defined]
    try:
        lengths = [sum(map(len, prompt.parts(text))) for text in coded.dictionary.to_pylist()]
    except ValueError as error:
        raise ShardError(f"the targets do not fit the prompt: {error}") from None
    return np.asarray(lengths, dtype=np.int64)[coded.indices.to_numpy()]
