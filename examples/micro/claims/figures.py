"""One number out of one seed's results; each knows its name, its unit and which way is better."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from statistics import mean
from typing import Any

from examples.micro.claims.pieces import MEASURED
from examples.micro.claims.systems import RUNS, SYSTEMS, run_of
from train.tracking import history

TRANSLATION = ("translate_en", "translate_es", "translate_de")
UNDERSTANDING = ("sentiment", "what", "when", "summarise")
"""Tasks that no system is ever trained on, beside translation."""
QUESTIONS = ("who", "what", "where", "when")
SHORT = ("who", "where", "topic")
METRICS = dict.fromkeys(TRANSLATION, "bleu") | {"repeat": "wer"}
"""Of each task; all others are exact matches."""


@dataclass(frozen=True)
class Outcome:
    """The results of one system with one seed; `bounds` has those that know no adapter."""

    system: str
    seed: int
    input: str = "speech"

    @property
    def folder(self) -> Path:
        if self.input in ("text", "cascade", "none") and self.system == "bounds":
            return Path(RUNS) / "bounds"
        return Path(run_of(self.system, self.seed))

    @cached_property
    def _rows(self) -> dict[tuple[str, ...], float]:
        rows = _read(self.folder / "evaluation.json")
        return {
            tuple(row[n] for n in ("task", "metric", "wording", "language", "input")): row["value"]
            for row in rows
        }

    def score(
        self, task: str, metric: str = "", wording: str = "all", language: str = "all"
    ) -> float:
        """A row's value; of all languages that are spoken, or of one."""
        name = metric or METRICS.get(task, "exact")
        return self._rows[task, name, wording, language, self.input]

    def tasks(self, metric: str) -> list[str]:
        return sorted({key[0] for key in self._rows if key[1] == metric})

    @cached_property
    def answers(self) -> dict[tuple[str, str, str], str]:
        """(key, task, instruction) → what was said."""
        rows = _read(self.folder / "answers.json")
        return {
            (r["key"], r["task"], r["instruction"]): r["said"]
            for r in rows
            if r["input"] == self.input
        }

    @cached_property
    def measured(self) -> dict[str, float]:
        found: dict[str, float] = _read(MEASURED / f"{self.seed}.json")[self.system]
        return found

    @cached_property
    def losses(self) -> list[float]:
        """The training loss of every step."""
        tracker = _read(self.folder / "tracker.json")
        return history(tracker["uri"], tracker["run_id"], "train/loss")


def _read(path: Path) -> Any:
    return _parsed(path.absolute())


@cache
def _parsed(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Figure:
    name: str
    of: Callable[[Outcome], float]
    unit: str = "%"


def score(task: str) -> Figure:
    name = METRICS.get(task, "exact").replace("bleu", "BLEU").replace("wer", "WER")
    return Figure(f"{name}, {task}", lambda o: o.score(task))


def means(name: str, tasks: tuple[str, ...], wording: str = "all") -> Figure:
    """Mean of the tasks' scores; all of them better when higher."""
    return Figure(name, lambda o: mean(o.score(task, wording=wording) for task in tasks))


def _spoken(o: Outcome, task: str, language: str) -> float:
    return o.score(task, language=language)


WER = Figure("WER", lambda o: o.score("repeat", "wer"))
CER = Figure("CER", lambda o: o.score("repeat", "cer"))
BLEU = means("BLEU, mean of en, es, de", TRANSLATION)
SLU = means("exact, mean of sentiment, what, when, summarise", UNDERSTANDING)
UNHEARD = tuple(
    Figure(f"BLEU, {task} of {spoken} speech", partial(_spoken, task=task, language=spoken))
    for task, spoken in (("translate_en", "es"), ("translate_en", "de"), ("translate_de", "es"))
)
HEARD = Figure("WER of en speech", lambda o: o.score("repeat", "wer", language="en"))
FOREIGN = Figure(
    "WER, mean of es and de speech",
    lambda o: mean(o.score("repeat", "wer", language=spoken) for spoken in ("es", "de")),
)
QA = means("exact, mean of who, what, where, when", QUESTIONS)
OWN = means("exact, mean of who, where, topic", SHORT)
UNSEEN_WORDING = means(
    "score with unseen wordings, mean of who, where, topic, translation",
    (*SHORT, *TRANSLATION),
    "unseen",
)


def _drop(o: Outcome) -> float:
    tasks = [*TRANSLATION, *UNDERSTANDING, *SHORT]
    return mean(o.score(task, wording="drop") for task in tasks)


DROP = Figure("seen less unseen wording, mean over tasks", _drop, "points")


def _state(metric: str) -> Callable[[Outcome], float]:
    return lambda o: mean(o.score(task, metric) for task in o.tasks(metric))


MATCH = Figure("states nearest to their own instruction's", _state("instruction_match"))
INSTRUCTIONS = Figure("cosine of states under unlike tasks", _state("instruction_cosine"), "")
STATES = Figure("cosine of speech's and text's states", _state("state_cosine"), "")


def _share(of: list[bool]) -> float:
    return 100 * sum(of) / len(of)


def _copies(o: Outcome) -> float:
    """Answers to other tasks that are what the same adapter transcribes."""
    said = {key: text for (key, task, _), text in o.answers.items() if task == "repeat"}
    others = {k: text for k, text in o.answers.items() if k[1] != "repeat"}
    return _share([text == said[key] for (key, _, _), text in others.items()])


COPIES = Figure("answers to other tasks that are the transcription", _copies)


def _agreement(o: Outcome) -> float:
    text = Outcome("bounds", o.seed, "text").answers
    mine = {k: said for k, said in o.answers.items() if k[1] == "continue"}
    return _share([said == text[k] for k, said in mine.items()])


AGREEMENT = Figure("continuations that are the text's own", _agreement)


def _same_text(o: Outcome) -> float:
    """Answers to the written sentence that are the untrained LLM's, over all tasks."""
    mine, own = o.answers, Outcome("bounds", o.seed, "text").answers
    return _share([said == own[k] for k, said in mine.items()])


SAME_TEXT = Figure("answers to text that are the LLM's own", _same_text)


def _words(o: Outcome) -> float:
    said = [text.split() for (_, task, _), text in o.answers.items() if task == "continue"]
    return mean(map(len, said))


def _early(o: Outcome) -> float:
    """Continuations that stop where the targets were cut or before, though the text's go on."""
    text = Outcome("bounds", o.seed, "text").answers
    mine = {k: said for k, said in o.answers.items() if k[1] == "continue"}
    return _share([2 * len(said.split()) <= len(text[k].split()) for k, said in mine.items()])


WORDS = Figure("words of a continuation", _words, "words")
EARLY = Figure("continuations that stop by half of the text's", _early)
KL = Figure("KL(text‖speech)", lambda o: o.measured["kl"], "nats")
GAP = Figure("change of a label in a batch with the gap", lambda o: o.measured["gap"], "nats")
NO_GAP = Figure("change of a label in a packed batch", lambda o: o.measured["packed"], "nats")


def smoothed(losses: list[float], width: int = 10) -> list[float]:
    """Means of `width` steps up to each."""
    return [mean(losses[max(0, n + 1 - width) : n + 1]) for n in range(len(losses))]


def _steps(o: Outcome) -> float:
    """Steps until the smoothed loss is what the scratch run of the seed has half way."""
    scratch = smoothed(Outcome("cont", o.seed).losses)
    level = scratch[len(scratch) // 2]
    mine = smoothed(o.losses)
    return float(next((n for n, loss in enumerate(mine) if loss <= level), len(mine)) + 1)


STEPS_TO = Figure("steps to the loss that scratch has half way", _steps, "steps")


def _changed(o: Outcome) -> float:
    """Over all systems with this seed."""
    found = 0
    for system in SYSTEMS:
        facts = _read(Path(run_of(system.name, o.seed)) / "frozen.json")
        assert facts["tensors"] > 30, "the LLM's; the encoder is not there, its states are stored"
        assert (facts["before"] == facts["after"]) == (not facts["changed"])
        found += len(facts["changed"])
    return float(found)


CHANGED = Figure("frozen tensors with another digest after training", _changed, "tensors")
NOTHING = Figure("0", lambda o: 0.0, "tensors")
