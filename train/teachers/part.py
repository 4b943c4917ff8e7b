"""One target shard: what is asked about its utterances, in which batches, and what is recorded.

All of it is a function of the shards and the configuration alone, so it is the same on any rank,
any number of ranks and after any restart.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.archive import ShardError
from data.audio import SAMPLE_RATE
from data.filters import Filters, kind
from data.prompts import Prompt
from data.retry import retried
from data.shards import ShardSet
from data.templates import Choice, Template
from train.model.generate import Answer

UNFITTING = "no wording"


@dataclass(frozen=True)
class Ask:
    """One target to make: of which utterance, by which wording."""

    key: str
    text: str
    language: str
    task: str
    template: Template | None
    """None where no wording of the task fits the utterance's language."""
    filtered: str
    """Why the LLM need not be asked, or ""."""
    given: str = ""
    """The answer, where the template says that it is not the LLM's."""

    @property
    def by_llm(self) -> bool:
        return bool(self.template and self.template.answer == "llm" and not self.filtered)


@dataclass(frozen=True)
class Question:
    """What the LLM is asked: ask `number` of a part, as token ids and as the same text."""

    part: str
    number: int
    ids: tuple[int, ...]
    text: str
    address: str
    """Names this target among all, whatever shard it stands in: seeds its random numbers."""

    def uniforms(self, count: int) -> np.ndarray:
        """[count] float64 in [0, 1): this target's own random numbers."""
        return (self._raw(count) >> np.uint64(11)) * 2.0**-53

    def seed(self) -> int:
        """A seed of 31 bits, which is what servers take."""
        return int(self._raw(1)[0] >> np.uint64(33))

    def _raw(self, count: int) -> np.ndarray:
        digest = hashlib.blake2b(self.address.encode(), digest_size=16).digest()
        return np.random.Philox(key=int.from_bytes(digest, "big")).random_raw(count)


class Part:
    """The asks about utterances `items`, in their order; `path` is the target shard's tar."""

    def __init__(
        self,
        path: Path,
        shards: ShardSet,
        items: range,
        choice: Choice,
        prompt: Prompt,
        filters: Filters,
        seed: int,
        batch_size: int,
    ):
        self.path, self.name = path, path.stem
        self._prompt, self._filters, self._seed = prompt, filters, seed
        columns = (shards.keys, shards.languages, shards.texts)
        keys, languages, texts = (c[items.start : items.stop].to_pylist() for c in columns)
        seconds = shards.num_samples[items.start : items.stop] / SAMPLE_RATE
        self.asks: list[Ask] = []
        rows = zip(items, keys, languages, texts, seconds, strict=True)
        for number, key, language, text, length in rows:
            fault = filters.utterance(text, float(length)) or "" if length else ""
            for task, template in choice.of(key, language):
                unfit = f"{UNFITTING}: none of {task!r} fits language {language!r}"
                filtered = fault if template else unfit
                given = text
                if template and template.answer == "output":
                    given = _output(shards, number, template)
                self.asks.append(Ask(key, text, language, task, template, filtered, given))
        self.questions = {n: self._question(n) for n, ask in enumerate(self.asks) if ask.by_llm}
        by_length = sorted(self.questions.values(), key=lambda q: (len(q.ids), q.number))
        self.batches = [
            by_length[at : at + batch_size] for at in range(0, len(by_length), batch_size)
        ]

    def _question(self, number: int) -> Question:
        ask = self.asks[number]
        assert ask.template is not None
        before, after = self._prompt.halves(ask.template.instruction)
        return Question(
            self.name,
            number,
            tuple(self._prompt.with_text(ask.template.instruction, ask.text)),
            before + ask.text + after,
            f"{self._seed}/{ask.key}/{ask.task}/{ask.template.name}",
        )

    def records(
        self, answers: Mapping[int, Answer], decoded: Mapping[int, str]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """(key, record) of each utterance, from the answers to all questions and their text."""
        targets: dict[str, list[dict[str, Any]]] = {}
        for number, ask in enumerate(self.asks):
            found = targets.setdefault(ask.key, [])
            found.append(self._target(ask, answers.get(number), decoded.get(number, "")))
        for key, found in targets.items():
            yield key, {"targets": found}

    def _target(self, ask: Ask, answer: Answer | None, text: str) -> dict[str, Any]:
        filtered = ask.filtered
        if ask.template is None or filtered:
            answer, text = Answer((), False), ""
        elif answer is None:  # the target is given; no rule about answers applies to it
            answer, text = Answer(tuple(self._prompt.encode(ask.given)), True), ask.given
            filtered = "" if answer.ids else "empty"
        else:
            own = ask.template.answer_language
            language = ask.language if own == "*" else own
            filtered = self._filters.answer(answer.ids, text, ask.text, language) or ""
        target = {
            "instruction": ask.template.instruction if ask.template else "",
            "template": ask.template.name if ask.template else "",
            "task": ask.template.task if ask.template else ask.task,
            "ids": list(answer.ids),
            "text": text,
            "finished": answer.finished,
        }
        return target | ({"filtered": filtered} if filtered else {})


def _output(shards: ShardSet, i: int, template: Template) -> str:
    """Sample i's own answer; raises `ShardError` where its row has none."""
    output = retried(lambda: shards.read_json(i), lambda: shards.shard_name(i)).get("output")
    if not isinstance(output, str):
        raise ShardError(
            f"{shards.shard_name(i)}: {shards.key(i)!r} has no `output`, with which template "
            f"{template.name!r} answers; build the shards by `data.build instructions`"
        )
    return output


def summary(records: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Counts of a target shard, for its index: targets by fate, and by task."""
    targets = [target for _, record in records for target in record["targets"]]
    trained = [t for t in targets if "filtered" not in t]
    return {
        "utterances": len(records),
        "targets": len(trained),
        "unfinished": sum(not t["finished"] for t in trained),
        "tasks": dict(sorted(Counter(t["task"] for t in trained).items())),
        "filtered": dict(
            sorted(Counter(kind(t["filtered"]) for t in targets if "filtered" in t).items())
        ),
    }
