"""The benchmark of prompt and of task generalisation (as MTBI, 2505.18644, asks for it).

Do instructions that training never worded so, and tasks that it never had, work from speech? Per
language, input and metric: tasks that were trained against tasks that were not, each with seen and
unseen wordings, averaged over tasks. Tasks differ in difficulty, so the text's figures stand
beside: `gap` is how much worse the input does than the text. A task that is held out altogether may
have unseen wordings alone; such tasks are averaged apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from data.tasks import WORDINGS
from train.metrics import interval, metric
from train.scores import Cell
from train.states import METRICS as STATES

Group = tuple[str, str, str, str]
"""Language, input, metric, and whether the tasks were trained (`yes`, `no`, `?`)."""
COLUMNS = ("seen", "unseen", "drop", "all", "gap")
_TRAINED = {True: "yes", False: "no", None: "?"}


def generalisation(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """Rows {language, input, metric, trained, wordings, tasks, column, value, low, high}.

    `column` is a wording as in the cells, or `gap`. `wordings` is what the tasks have: `both`,
    `seen` or `unseen`; those of one kind are averaged, so that the columns speak of the same tasks.
    """
    of: dict[tuple[Group, str], dict[str, Cell]] = defaultdict(dict)
    for cell in cells:
        row = cell.row
        group = (row["language"], row["input"], row["metric"], _TRAINED[row["trained"]])
        of[group, row["wording"]][row["task"]] = cell
    rows = []
    for group in sorted({group for group, _ in of}):
        language, source, name, trained = group
        text = of.get(((language, "text", name, trained), "all"), {})
        alike: dict[str, list[str]] = defaultdict(list)
        for task in sorted(of[group, "all"]):
            had = [wording for wording in WORDINGS if task in of[group, wording]]
            alike["both" if len(had) > 1 else had[0]].append(task)
        for wordings, tasks in alike.items():
            columns = {
                column: [of[group, column][t] for t in tasks]
                for column in COLUMNS[:-1]
                if tasks[0] in of[group, column]
            }
            if source != "text" and all(t in text for t in tasks):
                columns["gap"] = [_gap(text[t], of[group, "all"][t], name) for t in tasks]
            facts = {
                "language": language, "input": source, "metric": name, "trained": trained,
                "wordings": wordings, "tasks": len(tasks),
            }  # fmt: skip
            rows += [{**facts, "column": c, **_mean(cells)} for c, cells in columns.items()]
    return rows


def _gap(text: Cell, other: Cell, name: str) -> Cell:
    by = STATES[name] if name in STATES else metric(name)
    sign = 1.0 if by.higher_is_better else -1.0
    return Cell(
        {"value": sign * (text.row["value"] - other.row["value"])},
        sign * (text.draws - other.draws),
    )


def _mean(cells: list[Cell]) -> dict[str, float | None]:
    """The mean over tasks; their resamples are averaged one by one, as they were drawn."""
    value = float(np.mean([cell.row["value"] for cell in cells]))
    found = interval(value, np.mean([cell.draws for cell in cells], axis=0))
    return {"value": value, "low": found.low, "high": found.high}
