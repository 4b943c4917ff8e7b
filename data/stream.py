"""Shards to batches: reads what the plan says, in the plan's order, from (epoch, step) on.

Workers take bins of the plan by number, so how many there are changes nothing but the speed, and
a start in the middle seeks there. Content faults skip the sample, named in its batch; a read that
the system refuses is tried again, with growing pauses, and then stops the run.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.archive import ContentError
from data.audio import SAMPLE_RATE, AudioError, decode
from data.collate import Batch, Clip, Skip, collate, dummy_batch
from data.lengths import LengthRule, LengthTable
from data.plan import Plan, bins_of
from data.prompts import Document, Prompt
from data.shards import Overlay, ShardSet
from data.targets import parse_targets

Featurize = Callable[[np.ndarray], np.ndarray]
T = TypeVar("T")
_RETRY_PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds


@dataclass
class Stream:
    """This data, cut into global steps; `steps` reads one rank's share of them.

    `featurize` turns a float32 [S] waveform into the encoder's float32 [..., length] input; it
    runs in worker processes, so it must pickle, as must the prompt's tokenizer and the rule.
    """

    shards: ShardSet
    targets: Overlay
    prompt: Prompt
    rule: LengthRule
    featurize: Featurize
    lengths: LengthTable
    plan: Plan
    workers: int = 0
    prefetch: int = 4  # batches that each worker keeps ready
    wait_seconds: float = field(default=0.0, init=False)  # spent waiting for data so far

    @classmethod
    def build(
        cls,
        shards: ShardSet,
        targets: Overlay,
        prompt: Prompt,
        rule: LengthRule,
        featurize: Featurize,
        *,
        seed: int,
        tokens_per_bin: int,
        seconds_per_bin: float,
        bins_per_step: int,
        window_shards: int = 16,
        workers: int = 0,
    ) -> "Stream":
        """Derive the length table and the plan from the data, and stream by them."""
        lengths = LengthTable(shards, targets, prompt, rule, seed=seed)
        plan = Plan(
            shards.shard_of,
            lengths.tokens,
            shards.num_samples,
            seed=seed,
            tokens_per_bin=tokens_per_bin,
            seconds_per_bin=seconds_per_bin,
            bins_per_step=bins_per_step,
            window_shards=window_shards,
            refused=lengths.refused(),
        )
        return cls(shards, targets, prompt, rule, featurize, lengths, plan, workers)

    def steps_in_epoch(self, epoch: int) -> int:
        """Global steps of this epoch."""
        return self.plan.steps_in_epoch(epoch)

    def skipped(self, epoch: int) -> list[Skip]:
        """Samples that this epoch's plan leaves out: too long for a bin, too short for a slot."""
        return [Skip(self.shards.key(i), reason) for i, reason in self.plan.skipped(epoch)]

    def steps(
        self, epoch: int, start_step: int = 0, *, rank: int = 0, world: int = 1
    ) -> Iterator[list[Batch]]:
        """For each global step from `start_step` on, this rank's batches.

        Every rank gets ceil(bins_per_step / world) batches in every step, dummies of weight 0
        where there is no bin.
        """
        reader = _BinReader(self, epoch, start_step, rank, world)
        loader: DataLoader = DataLoader(
            reader,
            batch_size=None,
            shuffle=False,
            num_workers=self.workers,
            prefetch_factor=self.prefetch if self.workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        batches = iter(loader)
        for _ in range(start_step, self.steps_in_epoch(epoch)):
            started = time.perf_counter()
            step = [next(batches) for _ in range(reader.per_step)]
            self.wait_seconds += time.perf_counter() - started
            yield step

    def read(self, i: int, target: int) -> tuple[Document, Clip]:
        """Sample i with the numbered one of its targets, as a document and its clip.

        Raises `ContentError` or `AudioError` where the stored bytes are at fault, `OSError` where
        they cannot be read.
        """
        record = _retried(lambda: self.targets.record(i), self.targets.shard_name(i), i, self)
        targets = parse_targets(record)
        if target >= len(targets):
            raise ContentError(f"has {len(targets)} targets, but its index says more")
        chosen = targets[target]
        planned = int(self.shards.num_samples[i])
        data = _retried(lambda: self.shards.read(i, "flac"), self.shards.shard_name(i), i, self)
        wave = decode(data, max_seconds=planned / SAMPLE_RATE + 1)
        if len(wave) != planned:
            raise ContentError(f"{len(wave)} samples decoded, but its index says {planned}")
        clip = make_clip(wave, self.rule, self.featurize)
        heard = self.prompt.with_speech(chosen.instruction, clip.slots)
        return (*heard, self.prompt.answer(chosen.ids, chosen.finished)), clip


def make_clip(wave: np.ndarray, rule: LengthRule, featurize: Featurize) -> Clip:
    """A float32 [S] waveform with its features and lengths."""
    samples = len(wave)
    return Clip(featurize(wave), samples, int(rule.frames(samples)), int(rule.slots(samples)))


def silent_clip(rule: LengthRule, featurize: Featurize) -> Clip:
    """A short clip of silence, long enough for an adapter slot."""
    samples = SAMPLE_RATE // 4
    while rule.slots(samples) < 1:
        samples *= 2
    return make_clip(np.zeros(samples, np.float32), rule, featurize)


class _BinReader(Dataset):
    """Item n is batch n of one rank, counted from the step that it starts at."""

    def __init__(self, stream: Stream, epoch: int, start_step: int, rank: int, world: int):
        self.per_step = -(-stream.plan.bins_per_step // world)
        self._stream = stream
        self._epoch, self._start, self._rank, self._world = epoch, start_step, rank, world
        self._target_of = stream.lengths.target_of(epoch)

    def __len__(self) -> int:
        remaining = self._stream.steps_in_epoch(self._epoch) - self._start
        return max(0, remaining) * self.per_step

    def __getitem__(self, n: int) -> Batch:
        step = self._start + n // self.per_step
        mine = bins_of(self._rank, self._world, self._stream.plan.step(self._epoch, step))
        number, samples = mine[n % self.per_step]
        return self._read_bin(step, number, samples)

    def _read_bin(self, step: int, number: int, samples: np.ndarray) -> Batch:
        stream = self._stream
        documents, clips, keys, skipped = [], [], [], []
        for i in samples.tolist():
            try:
                document, clip = stream.read(i, int(self._target_of[i]))
            except (ContentError, AudioError) as error:
                skipped.append(Skip(stream.shards.key(i), str(error)))
                continue
            documents.append(document)
            clips.append(clip)
            keys.append(stream.shards.key(i))
        where = {"epoch": self._epoch, "step": step, "bin": number}
        if documents:
            return collate(documents, clips, keys=keys, skipped=skipped, **where)
        return dummy_batch(silent_clip(stream.rule, stream.featurize), skipped=skipped, **where)


def _retried(read: Callable[[], T], shard: str, i: int, stream: Stream) -> T:
    """`read()`, tried again after pauses where the system refuses it."""
    for pause in (*_RETRY_PAUSES, None):
        try:
            return read()
        except OSError as error:
            if pause is None:
                raise OSError(
                    f"{shard}: sample {stream.shards.key(i)!r} could not be read in "
                    f"{len(_RETRY_PAUSES) + 1} tries: {error}"
                ) from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")
