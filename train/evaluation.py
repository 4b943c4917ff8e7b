"""Ask a speech LLM the questions of a task file, with every kind of input.

`text` gives the LLM the transcript (upper bound), `cascade` the encoder's own transcript,
`shuffled` the audio of another utterance (floor), `none` no input at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data.audio import AudioError, decode
from data.shards import ShardSet
from data.tasks import Item
from train import config as cfg
from train.metrics import CHOICES
from train.model.respond import Question, Responder
from train.model.transcribe import Transcriber
from train.progress import Bar
from train.states import Measured, measure

_ANSWERS = 16  # at once, whose logits over the whole vocabulary are held at every token
Asked = tuple[Item, str, Question]


@dataclass(frozen=True)
class Result:
    """What the model said to a question about one kind of input."""

    item: Item
    input: str
    answer: str | None
    """What it generated; None where no metric of the item asks for it."""
    choice: str | None = None
    """The most probable option; None where no metric of the item is one of choices."""


def others(texts: Sequence[str], languages: Sequence[str]) -> list[int]:
    """For each utterance another one, whose audio is as natural and says something else.

    The next one of the same language with another transcript; failing that, of any language.
    Raises `ConfigError` where there is none.
    """

    def ahead(i: int) -> Iterator[int]:
        following = ((i + step) % len(texts) for step in range(1, len(texts)))
        return (j for j in following if texts[j] != texts[i])

    found = []
    for i in range(len(texts)):
        alike = (j for j in ahead(i) if languages[j] == languages[i])
        chosen = next(alike, None)
        if chosen is None:
            chosen = next(ahead(i), None)
        if chosen is None:
            raise cfg.ConfigError(
                "evaluate.inputs: 'shuffled' needs utterances that say different things, but all "
                f"{len(texts)} say {texts[i][:60]!r}; leave it out"
            )
        found.append(chosen)
    return found


class Evaluation:
    """The questions about some clips, answered with each of `evaluate.inputs`."""

    def __init__(
        self,
        config: cfg.Config,
        evaluate: cfg.Evaluate,
        responder: Responder,
        shards: ShardSet,
        items: dict[str, list[Item]],
        clips: list[int],
    ):
        """`clips`: indices into `shards` of all utterances that are asked about, on any rank."""
        self.evaluate, self.responder, self.shards, self.items = evaluate, responder, shards, items
        self.max_seconds = config.data.max_seconds
        self._texts = {i: shards.texts[i].as_py() for i in clips}
        self._other: dict[int, int] = {}
        if "shuffled" in evaluate.inputs:
            languages = [shards.languages[i].as_py() for i in clips]
            found = others(list(self._texts.values()), languages)
            self._other = {i: clips[j] for i, j in zip(clips, found, strict=True)}
        step = max(1, -(-len(clips) // evaluate.states)) if evaluate.states else len(clips) + 1
        self._measured = set(clips[::step]) if evaluate.states else set()
        self.transcriber = None
        if "cascade" in evaluate.inputs:
            encoder = config.model.encoder
            own = evaluate.recogniser is None
            self.transcriber = Transcriber(
                evaluate.recogniser or encoder.path,
                responder.device,
                encoder.languages if own else None,
                config.model.trust_remote_code,
            )

    def results(self, clips: list[int], shown: Bar) -> tuple[list[Result], list[Measured]]:
        """Answers to all questions about `clips`, and distances of states for some of them.

        They depend on `clips` alone, whichever rank they are asked on.
        """
        inputs = self._inputs(clips)
        asked: list[Asked] = [
            (item, kind, Question(item.instruction, inputs[i][kind]))
            for i in clips
            for item in self.items[self.shards.key(i)]
            for kind in self.evaluate.inputs
        ]
        free = [a for a in asked if set(a[0].metrics) - set(CHOICES)]
        closed = [a for a in asked if set(a[0].metrics) & set(CHOICES)]
        said, chosen = self._answers(free, shown), self._choices(closed)
        results = [
            Result(item, kind, said.get(_name(a)), chosen.get(_name(a)))
            for a in asked
            for item, kind, _ in (a,)
        ]
        shown.advance(len(asked) - len(free))
        return results, self._distances(clips, inputs)

    def _inputs(self, clips: list[int]) -> dict[int, dict[str, str | torch.Tensor]]:
        """Clip → kind of input → what the LLM gets."""
        wanted = dict.fromkeys([*clips, *(self._other[i] for i in clips if self._other)])
        waves = {i: self._wave(i) for i in wanted}
        spoken = {i: self.shards.languages[i].as_py() for i in wanted}
        listened = self.responder.listen(list(waves.values()), tuple(spoken.values()))
        slots = dict(zip(wanted, listened, strict=True))
        heard: list[str] = []
        if self.transcriber:
            heard = self.transcriber([waves[i] for i in clips], [spoken[i] for i in clips])
        made: dict[int, dict[str, str | torch.Tensor]] = {}
        for at, i in enumerate(clips):
            made[i] = {"speech": slots[i], "text": self._texts[i], "none": ""}
            if heard:
                made[i]["cascade"] = heard[at]
            if self._other:
                made[i]["shuffled"] = slots[self._other[i]]
        return made

    def _wave(self, i: int) -> np.ndarray:
        try:
            return decode(self.shards.read(i, "flac"), max_seconds=self.max_seconds)
        except AudioError as error:
            name = f"{self.shards.shard_name(i)}: {self.shards.key(i)!r}"
            raise AudioError(f"{name}: {error}; leave it out of the tasks") from None

    def _answers(self, asked: list[Asked], shown: Bar) -> dict[tuple[str, ...], str]:
        # Answers of like length end together, so little of a batch is spent on waiting.
        asked = sorted(asked, key=lambda a: (len(a[0].answer), *_name(a)))
        first, askings = _distinct(asked), Counter(map(_same, asked))
        names = list(first)
        size = max(1, self.evaluate.batch_size // self.evaluate.num_beams)
        of: dict[tuple, str] = {}
        for start in range(0, len(names), size):
            batch = names[start : start + size]
            answers = self.responder.answer(
                [first[name][2] for name in batch],
                max_new_tokens=self.evaluate.max_new_tokens,
                num_beams=self.evaluate.num_beams,
            )
            of |= zip(batch, answers, strict=True)
            shown.advance(sum(askings[name] for name in batch))
        return {_name(a): of[_same(a)] for a in asked}

    def _choices(self, asked: list[Asked]) -> dict[tuple[str, ...], str]:
        asked = sorted(asked, key=lambda a: (len(a[0].options), *_name(a)))
        first = _distinct(asked)
        of: dict[tuple, str] = {}
        names = list(first)
        while names:
            # As many questions as their options fill a batch, and at least one.
            take, rows = 0, 0
            while take < len(names) and (
                not take or rows + len(first[names[take]][0].options) <= self.evaluate.batch_size
            ):
                rows += len(first[names[take]][0].options)
                take += 1
            batch = [first[name] for name in names[:take]]
            options = [item.options for item, _, _ in batch]
            scores = self.responder.score([q for _, _, q in batch], options)
            for name, given, found in zip(names[:take], options, scores, strict=True):
                values = [score.by(self.evaluate.option_score) for score in found]
                of[name] = given[values.index(max(values))]
            names = names[take:]
        return {_name(a): of[_same(a)] for a in asked}

    def _distances(
        self, clips: list[int], inputs: dict[int, dict[str, str | torch.Tensor]]
    ) -> list[Measured]:
        """How far the states of each kind of input are from those of the text, and what the
        expected answers cost."""
        kinds = list(dict.fromkeys(["text", *self.evaluate.inputs]))
        found = []
        for i in clips:
            if i not in self._measured:
                continue
            items = self.items[self.shards.key(i)]
            asked = [
                (item, kind, Question(item.instruction, inputs[i][kind]))
                for kind in kinds
                for item in items
            ]
            size = self.evaluate.batch_size
            chunks = [asked[at : at + size] for at in range(0, len(asked), size)]
            states = torch.cat([self.responder.states([q for *_, q in c]) for c in chunks])
            by_kind = dict(zip(kinds, states.split(len(items)), strict=True))
            found += measure(items, by_kind)
            for at in range(0, len(asked), _ANSWERS):
                chunk = asked[at : at + _ANSWERS]
                scores = self.responder.score(
                    [q for *_, q in chunk], [(a.answer,) for a, *_ in chunk]
                )
                found += [
                    Measured(item, kind, "answer_loss", -score.by("mean"))
                    for (item, kind, _), (score,) in zip(chunk, scores, strict=True)
                ]
        return found


def _name(asked: Asked) -> tuple[str, ...]:
    item, kind, _ = asked
    return item.key, item.task, item.instruction, kind


def _same(asked: Asked) -> tuple:
    """Equal for questions that are one: all that are about the same text, or about none."""
    item, _, question = asked
    if isinstance(question.input, str):
        return question.instruction, question.input, item.options
    return _name(asked)


def _distinct(asked: list[Asked]) -> dict[tuple, Asked]:
    first: dict[tuple, Asked] = {}
    for a in asked:
        first.setdefault(_same(a), a)
    return first
