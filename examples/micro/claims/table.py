"""The claims, as inequalities between figures of systems.

Numbers are those of the list in docs/claims.md; `must` marks what has to hold, or the stack is
wrong somewhere. A comparison holds where Student's 95 % interval of the seeds' paired differences
lies on the claimed side, does not where it lies on the other, and is parity else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from examples.micro.claims import figures as f
from examples.micro.claims.figures import Figure, Outcome
from train.compare import over_seeds

Verdict = Literal["holds", "does not hold", "parity"]
FIXED = ("text", "cascade", "none")
"""What is asked without an adapter, and so the same for all seeds."""


@dataclass(frozen=True)
class Side:
    system: str
    """Or one of `FIXED`."""
    figure: Figure

    def values(self, seeds: Sequence[int]) -> list[float]:
        """One figure a seed."""
        if self.system in FIXED:
            return [self.figure.of(Outcome("bounds", seed, self.system)) for seed in seeds]
        name, _, source = self.system.partition("/")
        return [self.figure.of(Outcome(name, seed, source or "speech")) for seed in seeds]


@dataclass(frozen=True)
class Comparison:
    """left > right + margin, or left < right - margin."""

    left: Side
    sense: Literal[">", "<", "="]
    right: Side
    margin: float = 0.0
    """Below 0: no more than so much worse."""

    @property
    def says(self) -> str:
        a, b = self.left.figure.name, self.right.figure.name
        margin = f" {'+' if self.margin > 0 else '−'} {abs(self.margin):g}" if self.margin else ""
        if self.sense == "<" and self.margin:
            margin = margin.translate(str.maketrans("+−", "−+"))
        right = self.right.system if a == b else f"{self.right.system} ({b})"
        if self.right.figure is f.NOTHING:
            right = b
        return f"{a}: {self.left.system} {self.sense} {right}{margin}"


@dataclass(frozen=True)
class Claim:
    number: str
    source: str
    says: str
    comparisons: tuple[Comparison, ...]
    must: bool = False


@dataclass(frozen=True)
class Finding:
    comparison: Comparison
    seeds: tuple[int, ...]

    @cached_property
    def left(self) -> list[float]:
        return self.comparison.left.values(self.seeds)

    @cached_property
    def right(self) -> list[float]:
        return self.comparison.right.values(self.seeds)

    @property
    def differences(self) -> list[float]:
        """Above 0: on the claimed side."""
        sign = -1.0 if self.comparison.sense == "<" else 1.0
        pairs = zip(self.left, self.right, strict=True)
        return [sign * (a - b) - self.comparison.margin for a, b in pairs]

    @property
    def verdict(self) -> Verdict:
        _, low, high = over_seeds(self.differences)
        if self.comparison.sense == "=":
            return "holds" if not any(self.differences) else "does not hold"
        if low is None or high is None:  # one seed says nothing
            return "parity"
        return "holds" if low > 0 else "does not hold" if high < 0 else "parity"


def verdict(findings: Sequence[Finding]) -> Verdict:
    """Of a claim: all of its comparisons must hold."""
    found = {finding.verdict for finding in findings}
    return (
        "holds" if found == {"holds"} else "does not hold" if "does not hold" in found else "parity"
    )


def _c(left: str, sense: Any, right: str, figure: Figure, margin: float = 0.0) -> Comparison:
    return Comparison(Side(left, figure), sense, Side(right, figure), margin)


_ALL_TASKS = (*f.TRANSLATION, *f.UNDERSTANDING, "who", "where", "topic")
_FAR = 15.0  # points that "far" is at least
_ALIKE = 3.0  # points that pass for equal

CLAIMS = (
    Claim(
        "A", "must hold", "continuation training alone far exceeds an untrained adapter on every "
        "task, none of which it was trained on",
        (
            *(_c("cont", ">", "untrained", f.score(task), _FAR) for task in _ALL_TASKS),
            _c("cont", "<", "untrained", f.WER, _FAR),
        ),
        must=True,
    ),
    Claim(
        "B", "must hold", "text and cascade bound it on translation",
        (_c("text", ">", "cont", f.BLEU), _c("cascade", ">", "cont", f.BLEU)),
        must=True,
    ),
    Claim(
        "C", "must hold", "its agreement with the text's continuation exceeds an ASR-only "
        "adapter's",
        (_c("cont", ">", "asr", f.AGREEMENT),),
        must=True,
    ),
    Claim(
        "D", "must hold", "more utterances help each paper's recipe, at equal steps",
        tuple(
            comparison
            for name in ("cont", "asr", "multi")
            for comparison in (
                _c(name, "<", f"{name}_few", f.WER),
                _c(name, ">", f"{name}_few", f.BLEU),
                _c(name, ">", f"{name}_few", f.SLU),
            )
        ),
        must=True,
    ),
    Claim(
        "E", "must hold", "with few utterances multi-task imitation beats single-task on WER and "
        "on its own tasks",
        (
            _c("multi_few", "<", "cont_few", f.WER),
            _c("multi_few", ">", "cont_few", f.OWN),
            _c("multi_few", ">", "cont_few", f.BLEU),
        ),
        must=True,
    ),
    Claim(
        "F", "must hold", "no frozen parameter changes: the same digest before and after training "
        "(the LLM's; the encoder is not in these runs, its states are stored)",
        (Comparison(Side("all systems", f.CHANGED), "=", Side("text", f.NOTHING)),),
        must=True,
    ),
    Claim(
        "1", "BLSP", "continuation beats ASR on every task that neither is trained on",
        (
            _c("cont", ">", "asr", f.BLEU),
            *(
                _c("cont", ">", "asr", f.score(task))
                for task in ("sentiment", "topic", "summarise", *f.QUESTIONS)
            ),
        ),
    ),
    Claim(
        "2", "BLSP", "continuation obeys the instruction; the ASR adapter transcribes regardless",
        (_c("cont", ">", "asr", f.MATCH), _c("asr", ">", "cont", f.COPIES, 10.0)),
    ),
    Claim(
        "3", "BLSP", "under continuation the states of unlike instructions lie further apart, and "
        "those of speech nearer to text",
        (_c("cont", "<", "asr", f.INSTRUCTIONS), _c("cont", ">", "asr", f.STATES)),
    ),
    Claim(
        "4", "BLSP", "the price: WER of continuation over that of ASR over that of the encoder",
        (_c("cont", ">", "asr", f.WER), _c("asr", ">", "cascade", f.WER)),
    ),
    Claim(
        "5", "BLSP", "below the cascade on translation, not on intent",
        (
            _c("cont", "<", "cascade", f.BLEU),
            _c("cont", ">", "cascade", f.score("topic"), -_ALIKE),
            _c("cont", ">", "cascade", f.score("sentiment"), -_ALIKE),
        ),
    ),
    Claim(
        "8", "BLSP", "continuations of English speech alone carry over to languages that the "
        "adapter never heard: there, above shuffled audio",
        (
            *(_c("cont_en", ">", "cont_en/shuffled", figure) for figure in f.UNHEARD),
            _c("cont_en", "<", "cont_en/shuffled", f.FOREIGN),
        ),
    ),
    Claim(
        "9", "BLOOMZMMS", "MI beats T on translation and understanding; T beats MI on "
        "transcription",
        (
            _c("multi", ">", "asr", f.BLEU),
            _c("multi", ">", "asr", f.SLU),
            _c("asr", "<", "multi", f.CER),
        ),
    ),
    Claim(
        "10", "BLOOMZMMS", f"T + MI is MI's equal (within {_ALIKE:g} points) on translation and "
        "understanding, and T's on transcription",
        (
            _c("multi_repeat", ">", "multi", f.BLEU, -_ALIKE),
            _c("multi_repeat", ">", "multi", f.SLU, -_ALIKE),
            _c("multi_repeat", "<", "asr", f.CER, -_ALIKE),
        ),
    ),
    Claim(
        "7", "BLSP 2", "repeating beside other behaviours helps transcription, and costs nothing "
        "elsewhere (here beside multi-task)",
        (
            _c("multi_repeat", "<", "multi", f.CER),
            _c("multi_repeat", ">", "multi", f.BLEU, -_ALIKE),
            _c("multi_repeat", ">", "multi", f.SLU, -_ALIKE),
        ),
    ),
    Claim(
        "11", "BLOOMZMMS", "after embedding-CTC the cross entropy falls to a given loss in fewer "
        "steps",
        (_c("cont_ctc", "<", "cont", f.STEPS_TO),),
    ),
    Claim(
        "12", "MTBI", "multi-task imitation beats single-task, at equal utterances and steps: "
        "unseen wordings, and unseen tasks",
        (
            _c("multi_few", ">", "cont_few", f.UNSEEN_WORDING),
            _c("multi_few", ">", "cont_few", f.SLU),
        ),
    ),
    Claim(
        "13", "MTBI", "interleaving beats none at equal steps, and KL(text‖speech) falls faster",
        (
            _c("mixed_few", "<", "multi_few", f.WER),
            _c("mixed_few", ">", "multi_few", f.SLU),
            _c("mixed_few", "<", "multi_few", f.KL),
        ),
    ),
    Claim(
        "14", "MTBI", "seen to unseen wording costs a multi-task adapter less than an ASR one",
        (_c("multi", "<", "asr", f.DROP), _c("multi_few", "<", "asr_few", f.DROP)),
    ),
    Claim(
        "15", "BLSP-KD", "KL to the reading LLM: KD below CE; and scores no worse",
        (
            _c("kd", "<", "cont", f.KL),
            _c("kd", ">", "cont", f.BLEU),
            _c("kd", ">", "cont", f.SLU),
        ),
    ),
    Claim(
        "16", "AZeroS", "no instruction beats a fixed one, which beats ASR, on spoken questions",
        (_c("free", ">", "cont", f.QA), _c("cont", ">", "asr", f.QA)),
    ),
    Claim(
        "17", "all", "what the LLM answers to text is unchanged, to the last word",
        (
            Comparison(Side("cont/text", f.SAME_TEXT), "=", Side("text", f.SAME_TEXT)),
            Comparison(Side("cont/text", f.SLU), "=", Side("text", f.SLU)),
        ),
    ),
    Claim(
        "18", "BLSP's code", "an end of sequence on answers that were cut teaches to stop early",
        (_c("cut_ended", "<", "cut", f.WORDS), _c("cut_ended", ">", "cut", f.EARLY, 10.0)),
    ),
    Claim(
        "19", "BLSP's code", "a gap of positions makes an answer depend on the batch; packing does "
        "not",
        (Comparison(Side("cont", f.GAP), ">", Side("cont", f.NO_GAP)),),
    ),
)  # fmt: skip
