"""Task files: what an evaluation asks about each utterance, one JSON object a line.

    {"key", "task", "language", "instruction", "wording", "answer", "metric"}

`key` is an utterance of the evaluation shards, `wording` is `seen` or `unseen` in training, and
`metric` one name or a list of them. Optional: `options`, the answers to choose from, which the
metrics of choices need; `trained`, whether the task was trained, where the checkpoint cannot say.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORDINGS = ("seen", "unseen")
_TEXTS = ("key", "task", "language", "instruction", "wording", "answer")
_OPTIONAL = ("options", "trained")


class TaskError(ValueError):
    """A task file is missing, malformed, or about other utterances."""


@dataclass(frozen=True)
class Item:
    """One question about one utterance."""

    key: str
    task: str
    language: str
    instruction: str
    wording: str
    answer: str
    metrics: tuple[str, ...]
    options: tuple[str, ...] = ()
    trained: bool | None = None

    def row(self) -> dict[str, Any]:
        """Its line of a task file."""
        row = {name: getattr(self, name) for name in _TEXTS}
        row["metric"] = self.metrics[0] if len(self.metrics) == 1 else list(self.metrics)
        if self.options:
            row["options"] = list(self.options)
        return row if self.trained is None else row | {"trained": self.trained}


def load_items(path: Path, known: set[str]) -> list[Item]:
    """Items of a task file, each about one of the `known` keys.

    Raises:
        TaskError: the file is missing, or a line is malformed, about an unknown key, or the same
            question as one before it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise TaskError(f"task file {path} does not exist") from None
    items: dict[tuple[str, ...], Item] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = parse(json.loads(line))
        except ValueError as e:
            raise TaskError(f"{path}:{number}: {e}: {line[:100]}") from None
        if item.key not in known:
            raise TaskError(f"{path}:{number}: {item.key!r} is in none of the evaluation's shards")
        asked = (item.key, item.task, item.instruction)
        if asked in items:
            raise TaskError(f"{path}:{number}: asks {asked} again")
        items[asked] = item
    if not items:
        raise TaskError(f"task file {path} asks nothing")
    return list(items.values())


def parse(row: Any) -> Item:
    """The item of a line; raises `ValueError` saying what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError("not a task row, an object is expected")
    for name in (*_TEXTS, "metric"):
        if name not in row:
            raise ValueError(f"no field {name!r}, found {sorted(row)}")
    if unknown := set(row) - {*_TEXTS, "metric", *_OPTIONAL}:
        raise ValueError(f"unknown field {sorted(unknown)[0]!r}")
    for name in _TEXTS:
        if not isinstance(row[name], str):
            raise ValueError(f"{name!r} must be a string, but is {row[name]!r}")
    if row["wording"] not in WORDINGS:
        raise ValueError(f"'wording' must be one of {WORDINGS}, but is {row['wording']!r}")
    metrics = [row["metric"]] if isinstance(row["metric"], str) else row["metric"]
    options, trained = row.get("options", []), row.get("trained")
    for name, value in (("metric", metrics), ("options", options)):
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise ValueError(f"{name!r} must be a list of strings, but is {value!r}")
        if len(set(value)) != len(value):
            raise ValueError(f"{name!r} has one twice: {value}")
    if not metrics:
        raise ValueError("'metric' is empty")
    if options and row["answer"] not in options:
        raise ValueError(f"the answer {row['answer']!r} is none of its options")
    if trained is not None and not isinstance(trained, bool):
        raise ValueError(f"'trained' must be true or false, but is {trained!r}")
    texts: dict[str, str] = {name: row[name] for name in _TEXTS}
    return Item(**texts, metrics=tuple(metrics), options=tuple(options), trained=trained)


def write_items(path: Path, items: Iterable[Item]) -> int:
    """Write a task file; returns how many items it has."""
    lines = [json.dumps(item.row(), ensure_ascii=False) + "\n" for item in items]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)
