"""Shards to batches: reads what the plan says, in the plan's order, from (epoch, step) on.

Workers take bins of the plan by number, so how many there are changes nothing but the speed, and
a start in the middle seeks there. Content faults skip the sample, named in its batch; a read that
the system refuses is tried again, with growing pauses, and then stops the run.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import Dataset

from data.archive import ContentError
from data.audio import SAMPLE_RATE, AudioError, decode
from data.augment import Augment, Augmenter
from data.collate import Batch, Clip, Sample, Skip, Word, collate, dummy_batch
from data.interleave import Interleave
from data.languages import LanguageLabels
from data.lengths import LengthRule, LengthTable
from data.plan import Plan, bins_of
from data.prompts import Document, Prompt, Text
from data.retry import retried
from data.shards import Overlay, ShardSet
from data.states import parse_states
from data.targets import Target, parse_targets
from data.workers import in_workers

Featurize = Callable[[np.ndarray], np.ndarray]
T = TypeVar("T")


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
    augmenter: Augmenter | None = None
    states: Overlay | None = None  # a frozen encoder's, in place of the audio
    workers: int = 0
    prefetch: int = 4  # batches that each worker keeps ready
    share: bool = False  # prompts that documents of a bin begin with are in it once
    reads: bool = False  # samples have what a teacher reads
    spells: bool = False  # samples have their transcript's tokens
    labels: LanguageLabels = field(default_factory=lambda: LanguageLabels(()))  # of clips
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
        augment: Augment | None = None,
        words: Overlay | None = None,
        interleave: Interleave | None = None,
        reads: bool = False,
        max_seconds: float | None = None,
    ) -> "Stream":
        """Derive the length table and the plan from the data, and stream by them.

        With `words` (word times) samples know where their words are, and `interleave` can put
        some of them as text; with `reads` they have what a teacher reads. Raises `AugmentError`
        where `augment` cannot be done to this data.
        """
        augmenter = Augmenter(augment, len(shards), seed) if augment else None
        if augmenter:  # that masks fit the features is known now, not in the first step
            augmenter.features(silent_clip(rule, featurize).features, 0, 0)
        lengths = LengthTable(
            shards, targets, prompt, rule, seed=seed, augmenter=augmenter, words=words,
            interleave=interleave, reads=reads, max_seconds=max_seconds,
        )  # fmt: skip
        plan = Plan(
            shards.shard_of,
            lengths.tokens,
            lengths.num_samples,
            seed=seed,
            tokens_per_bin=tokens_per_bin,
            seconds_per_bin=seconds_per_bin,
            bins_per_step=bins_per_step,
            window_shards=window_shards,
            refused=lengths.refused() | targets.lost | shards.lost,
        )
        return cls(
            shards,
            targets,
            prompt,
            rule,
            featurize,
            lengths,
            plan,
            augmenter,
            workers=workers,
            reads=reads,
        )

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
        batches = in_workers(reader, self.workers, self.prefetch)
        for _ in range(start_step, self.steps_in_epoch(epoch)):
            started = time.perf_counter()
            step = [next(batches) for _ in range(reader.per_step)]
            self.wait_seconds += time.perf_counter() - started
            yield step

    def alone(
        self, epoch: int, step: int, bins: Sequence[int], *, rank: int = 0, world: int = 1
    ) -> list[Batch]:
        """This rank's share of the samples of some of a step's bins, each a batch of its own.

        To find which of them is at fault. Dummies make it equally many for every rank.
        """
        reader = _BinReader(self, epoch, step, rank, world)
        planned = self.plan.step(epoch, step)
        each = [(n, planned[n][k : k + 1]) for n in bins for k in range(len(planned[n]))]
        mine = each[rank::world]
        mine += [(-1, planned[0][:0])] * (-(-len(each) // world) - len(mine))
        return [reader.read_bin(step, number, sample) for number, sample in mine]

    def read(self, i: int, target: int, epoch: int) -> Sample:
        """Sample i with the numbered one of its targets.

        Raises `ContentError` or `AudioError` where the stored bytes are at fault, `ReadError`
        where they cannot be read.
        """
        record = self._retried(lambda: self.targets.record(i), self.targets.shard_name(i), i)
        targets = parse_targets(record)
        if target >= len(targets):
            raise ContentError(f"has {len(targets)} targets, but its index says more")
        chosen = targets[target]
        if not chosen.ids:
            raise ContentError("stage 1's answer is empty, but its index says that it is not")
        planned = int(self.shards.num_samples[i])
        if not planned:
            return self._read_text(i, chosen)
        clip = self._heard(i, planned, epoch) if self.states is None else self._stored(i, planned)
        parts, words = self._words(i, epoch, clip)
        if parts:
            heard = self.prompt.with_parts(chosen.instruction, parts)
        else:
            heard = self.prompt.with_speech(chosen.instruction, clip.slots)
        answer = self.prompt.answer(chosen.ids, chosen.finished)
        text = (self.shards.texts[i].as_py() or "") if self.reads or self.spells else ""
        ids = tuple(self.prompt.encode(text)) if self.reads or self.spells else ()
        read = self.prompt.with_parts(chosen.instruction, (Text(ids),))
        return Sample(
            self.shards.key(i),
            (*heard, answer),
            clip,
            read=(*read, answer) if self.reads else None,
            transcript=ids if self.spells else (),
            words=words,
        )

    def _read_text(self, i: int, chosen: Target) -> Sample:
        """Sample i, which has no audio: its text stands where others have their slots."""
        text = Text(tuple(self.prompt.encode(self.shards.texts[i].as_py() or "")))
        answer = self.prompt.answer(chosen.ids, chosen.finished)
        document = (*self.prompt.with_parts(chosen.instruction, (text,)), answer)
        return Sample(self.shards.key(i), document, read=document if self.reads else None)

    def _words(self, i: int, epoch: int, clip: Clip) -> tuple[Document, tuple[Word, ...]]:
        """Sample i's input where it is interleaved, and its words where they are known."""
        table, interleaver = self.lengths.words, self.lengths.interleaver
        if table is None:
            return (), ()
        tokens = table.tokens(i)
        parts = interleaver.parts(i, epoch, tokens.ids) if interleaver else ()
        return parts, table.words(i, clip.samples, tokens)

    def _heard(self, i: int, planned: int, epoch: int) -> Clip:
        data = self._retried(lambda: self.shards.read(i, "flac"), self.shards.shard_name(i), i)
        wave = decode(data, max_seconds=planned / SAMPLE_RATE + 1)
        if len(wave) != planned:
            raise ContentError(f"{len(wave)} samples decoded, but its index says {planned}")
        if self.augmenter is None:
            return replace(make_clip(wave, self.rule, self.featurize), **self._said(i))
        clip = make_clip(self.augmenter.wave(wave, i, epoch), self.rule, self.featurize)
        features = self.augmenter.features(clip.features, i, epoch)
        return replace(clip, features=features, **self._said(i))

    def _stored(self, i: int, planned: int) -> Clip:
        assert self.states is not None
        states = self.states
        data = self._retried(lambda: states.read(i), states.shard_name(i), i)
        frames, slots = int(self.rule.frames(planned)), int(self.rule.slots(planned))
        return Clip(parse_states(data, frames), planned, frames, slots, **self._said(i))

    def _said(self, i: int) -> dict[str, Any]:
        language = self.shards.languages[i].as_py()
        return {"language": language, "label": self.labels(language)}

    def _retried(self, read: Callable[[], T], shard: str, i: int) -> T:
        return retried(read, lambda: f"{shard}: sample {self.shards.key(i)!r}")


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
        stream.lengths.tokens(epoch)  # what is interleaved is drawn here, for all workers

    def __len__(self) -> int:
        remaining = self._stream.steps_in_epoch(self._epoch) - self._start
        return max(0, remaining) * self.per_step

    def __getitem__(self, n: int) -> Batch:
        step = self._start + n // self.per_step
        mine = bins_of(self._rank, self._world, self._stream.plan.step(self._epoch, step))
        number, samples = mine[n % self.per_step]
        return self.read_bin(step, number, samples)

    def read_bin(self, step: int, number: int, samples: np.ndarray) -> Batch:
        stream = self._stream
        made, skipped = [], []
        for i in samples.tolist():
            try:
                made.append(stream.read(i, int(self._target_of[i]), self._epoch))
            except (ContentError, AudioError) as error:
                skipped.append(Skip(stream.shards.key(i), str(error)))
        where: dict[str, Any] = {"epoch": self._epoch, "step": step, "bin": number}
        if made and any(sample.clip for sample in made):
            return collate(made, share=stream.share, skipped=skipped, **where)
        silence = silent_clip(stream.rule, stream.featurize)
        if made:
            return collate(made, silence=silence, share=stream.share, skipped=skipped, **where)
        return dummy_batch(silence, skipped=skipped, **where)
