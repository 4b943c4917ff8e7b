"""What each sample costs in LLM positions, and which of its targets an epoch takes."""

from typing import Protocol, TypeVar

import numpy as np
import pyarrow.compute as pc

from data.draws import TARGETS, draws
from data.prompts import Prompt
from data.shards import Overlay, ShardSet

Ints = TypeVar("Ints", int, np.ndarray)


class LengthRule(Protocol):
    """The model's arithmetic "samples -> encoder frames -> adapter slots", on ints or int64 [N]."""

    def frames(self, num_samples: Ints) -> Ints: ...

    def slots(self, num_samples: Ints) -> Ints: ...


class LengthTable:
    """LLM positions per sample: prompt, slots and target, without opening a tar.

    A sample with several targets takes one of them per epoch: the first is drawn from the seed,
    and each epoch takes the next, so that all have their turn.
    """

    def __init__(
        self, shards: ShardSet, targets: Overlay, prompt: Prompt, rule: LengthRule, *, seed: int
    ):
        per_target = targets.column("instruction").combine_chunks()
        counts = pc.list_value_length(per_target).to_numpy().astype(np.int64)
        self._starts = np.cumsum(counts) - counts
        self._counts = counts
        self._first = draws(len(shards), seed, 0, TARGETS) % counts.astype(np.uint64)
        self._slots = np.asarray(rule.slots(shards.num_samples), dtype=np.int64)
        self._target_tokens = _flat_ints(targets) + _prompt_tokens(per_target, prompt)

    def refused(self) -> dict[int, str]:
        """Samples that an adapter makes nothing of, with the reason."""
        short = np.flatnonzero(self._slots < 1)
        return dict.fromkeys(short.tolist(), "too short: the length rule gives it 0 adapter slots")

    def target_of(self, epoch: int) -> np.ndarray:
        """[N] int64: the number of the target that each sample takes in this epoch."""
        return (self._first.astype(np.int64) + epoch) % self._counts

    def tokens(self, epoch: int) -> np.ndarray:
        """[N] int64: LLM positions of each sample in this epoch."""
        return self._slots + self._target_tokens[self._starts + self.target_of(epoch)]


def _flat_ints(targets: Overlay) -> np.ndarray:
    """[targets] int64: answer tokens of all samples' targets, flat."""
    return targets.column("num_tokens").combine_chunks().flatten().to_numpy().astype(np.int64)


def _prompt_tokens(instructions_per_sample: object, prompt: Prompt) -> np.ndarray:
    """[targets] int64: prompt tokens of each target; every distinct instruction is read once."""
    coded = instructions_per_sample.flatten().dictionary_encode()  # type: ignore[attr-defined]
    lengths = [sum(map(len, prompt.parts(text))) for text in coded.dictionary.to_pylist()]
    return np.asarray(lengths, dtype=np.int64)[coded.indices.to_numpy()]
