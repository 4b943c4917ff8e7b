"""From answers to rows: every task, language, input, wording and metric, with intervals.

A row is {task, language, input, wording, trained, metric, value, low, high, count, scorer}.
`language` is one or `all`. `wording` is `seen` or `unseen` in training, `all` for both together,
or `drop`: how much worse the unseen wording is than the seen one, whichever way the metric counts.
`low` and `high` bound the central 95 % of the resamples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from data.tasks import WORDINGS, Item
from train.evaluation import Result
from train.metrics import CHOICES, Mean, Metric, Score, interval, metric, score
from train.states import METRICS as STATES
from train.states import Measured

Key = tuple[str, str, str, str]
"""Task, language, input, metric."""


@dataclass(frozen=True)
class Cell:
    """A row, with the resamples behind its interval."""

    row: dict[str, Any]
    draws: np.ndarray = field(repr=False)


@dataclass
class _Group:
    """The scored items of one key."""

    by: Metric
    items: list[Item]
    statistics: np.ndarray
    """[N, K]"""

    def score(self, wording: str, resamples: int) -> tuple[Score, int] | None:
        rows = [n for n, i in enumerate(self.items) if wording in ("all", i.wording)]
        if not rows:
            return None
        keys = [self.items[n].key for n in rows]
        return score(self.by, self.statistics[rows], keys, resamples), len(rows)


def cells(
    results: list[Result],
    measured: list[Measured],
    *,
    normaliser: str,
    resamples: int,
    trained: Sequence[str],
) -> list[Cell]:
    """All rows, tasks by name; within one, the wordings stand side by side.

    Args:
        trained: the tasks that the checkpoint was trained on, as in `behave.tasks`; none where
            that is not known. What an item says itself counts more.
    """
    found = []
    for key, group in sorted(_groups(results, measured, normaliser).items()):
        scores = {w: group.score(w, resamples) for w in (*WORDINGS, "all")}
        if scores["seen"] and scores["unseen"]:
            scores["drop"] = _drop(scores["seen"], scores["unseen"], group.by)
        known = _known(key[0], group.items, trained)
        found += [
            Cell(_row(key, wording, known, group.by, *given), given[0].draws)
            for wording, given in scores.items()
            if given
        ]
    return found


def _known(task: str, items: list[Item], trained: Sequence[str]) -> bool | None:
    said = {item.trained for item in items}
    if len(said) == 1 and None not in said:
        return said.pop()
    patterns = [pattern for entry in trained for pattern in entry.split("|")]
    return any(fnmatchcase(task, pattern) for pattern in patterns) if patterns else None


def _groups(results: list[Result], measured: list[Measured], normaliser: str) -> dict[Key, _Group]:
    said: dict[Key, list[tuple[Item, str]]] = defaultdict(list)
    for r in results:
        for name in r.item.metrics:
            answer = r.choice if name in CHOICES else r.answer
            assert answer is not None, "every metric has what it judges"
            for key in _keys(r.item, r.input, name):
                said[key].append((r.item, answer))
    numbers: dict[Key, list[tuple[Item, float]]] = defaultdict(list)
    for m in measured:
        for key in _keys(m.item, m.input, m.metric):
            numbers[key].append((m.item, m.value))
    groups = {}
    for key, pairs in said.items():
        by, items = metric(key[3], normaliser), [item for item, _ in pairs]
        statistics = by.statistics([a for _, a in pairs], [item.answer for item in items])
        groups[key] = _Group(by, items, statistics)
    for key, values in numbers.items():
        statistics = Mean.of([value for _, value in values])
        groups[key] = _Group(STATES[key[3]], [item for item, _ in values], statistics)
    return groups


def _keys(item: Item, source: str, name: str) -> Iterable[Key]:
    return ((item.task, language, source, name) for language in (item.language, "all"))


def _drop(seen: tuple[Score, int], unseen: tuple[Score, int], by: Metric) -> tuple[Score, int]:
    sign = 1.0 if by.higher_is_better else -1.0
    (before, n), (after, m) = seen, unseen
    value = sign * (before.value - after.value)
    return interval(value, sign * (before.draws - after.draws)), min(n, m)


def _row(
    key: Key, wording: str, trained: bool | None, by: Metric, found: Score, count: int
) -> dict[str, Any]:
    task, language, source, name = key
    return {
        "task": task,
        "language": language,
        "input": source,
        "wording": wording,
        "trained": trained,
        "metric": name,
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "count": count,
        "scorer": by.scorer,
    }
