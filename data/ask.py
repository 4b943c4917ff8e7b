"""From a corpus with answers to a task file: what an evaluation asks about its utterances.

    python -m data.ask configs/sets/covost.yaml /corpora/cv-4 tasks.jsonl

A set file says which fields of an utterance are answers, and in which words they are asked for:

    corpus: covost                   a reader of `data.build`; `manifest` for any other set
    split: test                      of the corpus; left out, all of it
    limit: 1000                      at most so many utterances of a language; left out, all
    templates: prompts.yaml          wordings of tasks that give none themselves (`data.templates`)
    tasks:
      - task: translate_de
        answer: "{translation_de}"   fields of the utterance: key, text, language, speaker and
                                     whatever else its corpus has; without one it is not asked
        metric: [bleu, chrf]
        seen: ["Translate into German:"]       wordings that training had; fields may stand in them
        unseen: ["Say this in German:"]        and wordings that it had not
        map: {"0": "no", "1": "yes"}           what stands for an answer
        options: observed            the answers to choose from: a list, or all that occur
        trained: false               whether the task was trained, where the checkpoint cannot say

Each utterance is asked for each task once in a seen and once in an unseen wording, where there are
any; they take turns over the utterances, so that all are used equally often.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from data.corpora import READERS, CorpusError, Fault, Utterance, fleurs
from data.tasks import WORDINGS, Item, TaskError, write_items
from data.templates import Template, TemplateError, read_templates


@dataclass(frozen=True)
class Asked:
    """One task of a set file; the fields are the file's."""

    task: str
    answer: str
    metric: str | Sequence[str]
    seen: Sequence[str] = ()
    unseen: Sequence[str] = ()
    map: Mapping[str, str] | None = None
    options: Sequence[str] | Literal["observed"] = ()
    trained: bool | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric,) if isinstance(self.metric, str) else tuple(self.metric)


@dataclass(frozen=True)
class Set:
    """A set file."""

    corpus: str
    tasks: Sequence[Asked]
    split: str | None = None
    limit: int | None = None
    templates: Path | None = None


def load_set(path: Path) -> Set:
    """Read a set file.

    Raises:
        TaskError: it is missing, no YAML, or says what no set file can.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TaskError(f"set file {path} does not exist") from None
    except yaml.YAMLError as e:
        raise TaskError(f"set file {path} is not YAML: {' '.join(str(e).split())}") from None
    whole = _checked(tree, Set, str(path))
    if whole["corpus"] not in READERS:
        raise TaskError(f"{path}: corpus {whole['corpus']!r} is none of {sorted(READERS)}")
    if not isinstance(whole["tasks"], list) or not whole["tasks"]:
        raise TaskError(f"{path}: tasks must be a list, found {whole['tasks']!r}")
    templates = whole.get("templates")
    wordings = read_templates(Path(templates)) if templates else []
    tasks = []
    for row in whole["tasks"]:
        asked = Asked(**_checked(row, Asked, f"{path}: task"))
        fit = any(t.task == asked.task for t in wordings)
        if not (asked.seen or asked.unseen or fit):
            raise TaskError(f"{path}: task {asked.task!r} has no wording, seen or unseen")
        tasks.append(asked)
    return Set(**whole | {"tasks": tasks, "templates": Path(templates) if templates else None})


def _checked(row: Any, kind: type, where: str) -> dict[str, Any]:
    known = {f.name: f for f in fields(kind)}
    needed = ("corpus", "tasks") if kind is Set else ("task", "answer", "metric")
    if not isinstance(row, dict) or any(name not in row for name in needed):
        raise TaskError(f"{where} must have {', '.join(needed)}; found {row!r}")
    if unknown := set(row) - set(known):
        raise TaskError(f"{where}: unknown key {sorted(unknown)[0]!r}; known are {sorted(known)}")
    return row


def utterances(about: Set, root: Path) -> tuple[list[Utterance], list[Fault]]:
    """The utterances that a set asks about, in its corpus's order, and what could not be read."""
    found: list[Utterance] = []
    faults: list[Fault] = []
    for entry in READERS[about.corpus](root):
        if about.split is not None and entry.split != about.split:
            continue
        if isinstance(entry, Fault):
            faults.append(entry)
        else:
            found.append(entry)
    if about.corpus == "fleurs":
        found = fleurs.with_translations(found, root)
    if about.limit is not None:
        seen: Counter[str | None] = Counter()
        kept = []
        for utterance in found:
            seen[utterance.language] += 1
            if seen[utterance.language] <= about.limit:
                kept.append(utterance)
        found = kept
    return found, faults


def items(about: Set, found: Sequence[Utterance]) -> Iterator[Item]:
    """The questions, utterance by utterance."""
    templates = read_templates(about.templates) if about.templates else []
    answers = [[_answer(asked, u) for asked in about.tasks] for u in found]
    options = []
    for n, asked in enumerate(about.tasks):
        given = asked.options
        if given == "observed":
            given = sorted({answer for row in answers if (answer := row[n]) is not None})
        options.append(tuple(str(option) for option in given))
    turns: Counter[tuple[str, str | None]] = Counter()
    for utterance, row in zip(found, answers, strict=True):
        for asked, answer, choices in zip(about.tasks, row, options, strict=True):
            if answer is None:
                continue
            if choices and answer not in choices:
                raise TaskError(
                    f"task {asked.task!r}: the answer {answer!r} of {utterance.key!r} is none of "
                    f"its options {list(choices)}; add it, or map it"
                )
            turn = turns[asked.task, utterance.language]
            turns[asked.task, utterance.language] += 1
            for wording in WORDINGS:
                texts = _wordings(asked, wording, templates, utterance.language or "")
                if texts:
                    instruction = _filled(texts[turn % len(texts)], utterance)
                    yield Item(
                        utterance.key, asked.task, utterance.language or "", instruction, wording,
                        answer, asked.metrics, choices, asked.trained,
                    )  # fmt: skip


def _answer(asked: Asked, utterance: Utterance) -> str | None:
    """The answer that an utterance has for a task; None where a field of it is missing or empty."""
    try:
        answer = asked.answer.format_map(_fields_of(utterance)).strip()
    except KeyError:
        return None
    if asked.map is not None:
        known = {str(key): str(value) for key, value in asked.map.items()}
        if answer and answer not in known:
            raise TaskError(
                f"task {asked.task!r}: its map has nothing for {answer!r} of {utterance.key!r}"
            )
        answer = known.get(answer, "")
    return answer or None


def _wordings(
    asked: Asked, wording: str, templates: Sequence[Template], language: str
) -> Sequence[str]:
    if asked.seen or asked.unseen:
        return asked.seen if wording == "seen" else asked.unseen
    return [
        t.instruction
        for t in templates
        if t.task == asked.task and t.heldout == (wording == "unseen") and t.fits(language)
    ]


def _filled(instruction: str, utterance: Utterance) -> str:
    """The instruction with the utterance's fields; `{input}` stays, it is the prompt's own."""
    try:
        return instruction.format_map(_fields_of(utterance) | {"input": "{input}"})
    except (KeyError, IndexError, ValueError) as e:
        raise TaskError(
            f"instruction {instruction!r} does not fit {utterance.key!r}: no field {e}"
        ) from None


def _fields_of(utterance: Utterance) -> dict[str, Any]:
    own = {name: getattr(utterance, name) for name in ("key", "text", "language", "speaker")}
    return {**utterance.extra, **own}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.ask",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("set", type=Path, help="set file, as in configs/sets/")
    parser.add_argument("source", type=Path, help="the corpus, as data.build takes it")
    parser.add_argument("out", type=Path, help="task file to write (.jsonl)")
    parser.add_argument("--limit", type=int, help="in place of the set file's")
    args = parser.parse_args(argv)
    try:
        about = load_set(args.set)
        if args.limit is not None:
            about = replace(about, limit=args.limit)
        found, faults = utterances(about, args.source)
        count = write_items(args.out, items(about, found))
    except (TaskError, CorpusError, TemplateError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for fault in faults[:5]:
        print(f"left out: {fault.where}: {fault.reason}", file=sys.stderr)
    print(f"{count} questions about {len(found)} utterances; {len(faults)} entries left out")
    return 0 if count else 2


if __name__ == "__main__":
    sys.exit(main())
