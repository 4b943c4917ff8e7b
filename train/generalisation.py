"""The benchmark of prompt and of task generalisation (as MTBI, 2505.18644, asks for it).

Do instructions that training never worded so, and tasks that it never had, work from speech? Per
language, input and metric: tasks that were trained against tasks that were not, each with seen and
unseen wordings, averaged over tasks. Tasks differ in difficulty, so the text's figures stand
beside: `gap` is how much worse the input does than the text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from train.metrics import interval, metric
from train.scores import Cell
from train.states import METRICS as STATES

Group = tuple[str, str, str, str]
"""Language, input, metric, and whether the tasks were trained (`yes`, `no`, `?`)."""
COLUMNS = ("seen", "unseen", "drop", "all", "gap")
_TRAINED = {True: "yes", False: "no", None: "?"}


def generalisation(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """Rows {language, input, metric, trained, tasks, column, value, low, high}.

    `column` is a wording as in the cells, or `gap`. Only tasks that have both wordings count, so
    that the columns speak of the same tasks.
    """
    of: dict[tuple[Group, str], dict[str, Cell]] = defaultdict(dict)
    for cell in cells:
        row = cell.row
        group = (row["language"], row["input"], row["metric"], _TRAINED[row["trained"]])
        of[group, row["wording"]][row["task"]] = cell
    rows = []
    for group in sorted({group for group, _ in of}):
        tasks = sorted(of[group, "drop"])
        columns = {name: [of[group, name][t] for t in tasks] for name in COLUMNS[:-1]}
        language, source, name, trained = group
        text = of.get(((language, "text", name, trained), "all"), {})
        if source != "text" and all(t in text for t in tasks):
            columns["gap"] = [_gap(text[t], of[group, "all"][t], name) for t in tasks]
        facts = {"language": language, "input": source, "metric": name, "trained": trained}
        for column, found in columns.items():
            if found:
                rows.append({**facts, "tasks": len(tasks), "column": column, **_mean(found)})
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
