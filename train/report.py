"""What an evaluation leaves: tables in the terminal, JSON files, and a run in the tracker."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table

from data.shards import ShardSet
from train import checkpoint as ckpt
from train import config as cfg
from train.evaluation import Result
from train.generalisation import COLUMNS
from train.progress import console
from train.scores import Cell
from train.states import METRICS as STATES
from train.tracking import Tracker, run_tags


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def answer_rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Every answer beside its question, as `--answers` writes them."""
    return [
        {**r.item.row(), "input": r.input, "said": r.answer, "choice": r.choice} for r in results
    ]


def print_scores(rows: list[dict[str, Any]], kinds: tuple[str, ...]) -> None:
    """Tasks by inputs, all languages and wordings, with half the width of the speech's interval.

    What is measured of the LLM's states has a table of its own, of means over tasks.
    """
    answers: dict[tuple[str, ...], dict[str, dict[str, Any]]] = defaultdict(dict)
    states: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in rows:
        if r["language"] == "all" and r["wording"] == "all":
            if r["metric"] in STATES:
                states[r["metric"]][r["input"]].append(r["value"])
            else:
                answers[r["task"], r["metric"], str(r["count"])][r["input"]] = r
    table = Table(title="evaluation (all languages)")
    for name in ("task", "metric", "count", *kinds, "±"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for line, found in sorted(answers.items()):
        shown = [_figure(found[kind]["value"]) if kind in found else "" for kind in kinds]
        table.add_row(*line, *shown, _half(found.get(kinds[0])))
    console.print(table)
    if not states:
        return
    table = Table(title="the LLM's states at the end of the prompt (means over tasks)")
    for name in ("metric", *kinds):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for metric, values in states.items():
        means = [_figure(mean(values[kind])) if kind in values else "" for kind in kinds]
        table.add_row(metric, *means)
    console.print(table)


def print_generalisation(rows: list[dict[str, Any]]) -> None:
    """Trained and untrained tasks by seen and unseen wordings, from speech, all languages."""
    table = Table(title="prompt and task generalisation from speech (means over tasks)")
    for name in ("metric", "tasks trained", "tasks", *COLUMNS):
        table.add_column(name, justify="left" if name in ("metric", "tasks trained") else "right")
    lines: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = defaultdict(dict)
    for r in rows:
        if r["language"] == "all" and r["input"] == "speech" and r["metric"] not in STATES:
            lines[r["metric"], r["trained"], r["tasks"]][r["column"]] = r
    for (metric, trained, tasks), found in sorted(lines.items()):
        cells = [
            f"{_figure(found[c]['value'])} {_half(found[c])}" if c in found else "" for c in COLUMNS
        ]
        table.add_row(metric, trained, str(tasks), *(cell.strip() for cell in cells))
    if lines:
        console.print(table)


def _figure(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 2 else f"{value:.2f}"


def _half(row: dict[str, Any] | None) -> str:
    """Half the width of a row's interval."""
    if row is None or row["low"] is None:
        return ""
    return f"±{_figure((row['high'] - row['low']) / 2)}"


def track(
    config: cfg.Config,
    state: ckpt.State,
    cells: list[Cell],
    general: list[dict[str, Any]],
    results: list[Result],
    shards: ShardSet,
) -> str:
    """An evaluation run in the tracker, with metrics, tables and clips; returns its id."""
    tracker = Tracker(
        config.run.tracking_uri,
        config.run.experiment,
        f"{config.run.name}-evaluation",
        params=config.flat() | {"checkpoint.step": str(state.step)},
        tags=run_tags("evaluate") | {"hearken.trained_by": state.tracker_run},
    )
    rows = [cell.row for cell in cells]
    pooled = [r for r in rows if r["language"] == "all"]
    tracker.values(
        {
            f"eval/{r['input']}/{r['task']}_{r['metric']}": r["value"]
            for r in pooled
            if r["wording"] == "all"
        }
        | {
            f"drop/{r['input']}/{r['task']}_{r['metric']}": r["value"]
            for r in pooled
            if r["wording"] == "drop"
        }
    )
    _table(tracker, "evaluation", rows)
    _table(tracker, "generalisation", general)
    _samples(tracker, config, results, shards)
    tracker.close()
    return tracker.run_id


def _table(tracker: Tracker, name: str, rows: list[dict[str, Any]]) -> None:
    if rows:
        tracker.table(name, {column: [r[column] for r in rows] for column in rows[0]})


def _samples(tracker: Tracker, config: cfg.Config, results: list[Result], shards: ShardSet) -> None:
    """Some clips to listen to, spread over the set, and what was made of them."""
    wanted = config.evaluate.samples if config.evaluate else 0
    spoken = sorted((r for r in results if r.input == "speech"), key=lambda r: r.item.key)
    heard = sorted({r.item.key for r in spoken})
    keys = heard[:: max(1, len(heard) // max(1, wanted))][:wanted]
    index = {key: i for i, key in enumerate(shards.keys.to_pylist())}
    folder = config.run.output / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    for key in keys:
        path = folder / f"{key}.flac"
        path.write_bytes(shards.read(index[key], "flac"))
        tracker.file(path, "samples")
    shown = [
        {
            "audio": f"samples/{r.item.key}.flac",
            "transcript": shards.texts[index[r.item.key]].as_py(),
            "task": r.item.task,
            "instruction": r.item.instruction,
            "expected": r.item.answer,
            "answer": r.choice if r.answer is None else r.answer,
        }
        for r in spoken
        if r.item.key in set(keys)
    ]
    _table(tracker, "samples", shown)
