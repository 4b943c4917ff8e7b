"""What an evaluation leaves: tables in the terminal, JSON files, and a run in the tracker.

As a command, one self-contained HTML page that compares runs, with plots and samples:

    python -m train.report micro-blsp --out report.html
    python -m train.report 5f8c1a 09d2e7 --uri http://tracker:5000
    python -m train.report --experiment micro

A run is named by its name, its id or the beginning of that; the evaluations of a training run come
along by themselves.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from data.shards import ShardSet
from train import checkpoint as ckpt
from train import config as cfg
from train.cli import guarded
from train.evaluation import Result
from train.generalisation import COLUMNS
from train.pictures import losses
from train.progress import console
from train.scores import Cell
from train.states import METRICS as STATES
from train.tracking import Tracker, Used, parent, run_tags


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def answer_rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Every answer beside its question, as `--answers` writes them."""
    return [
        {**r.item.row(), "input": r.input, "said": r.answer, "choice": r.choice} for r in results
    ]


def overview(rows: list[dict[str, Any]], kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    """A row for each task and metric, with the score of each input: all languages and wordings.

    `±` is half the width of the first input's interval, None where it has none.
    """
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for r in rows:
        if r["language"] == r["wording"] == "all" and r["metric"] not in STATES:
            found[r["task"], r["metric"]][r["input"]] = r
    return [
        {"task": task, "metric": name, "count": next(iter(scored.values()))["count"]}
        | {kind: scored[kind]["value"] if kind in scored else None for kind in kinds}
        | {"±": _half(scored.get(kinds[0]))}
        for (task, name), scored in sorted(found.items())
    ]


def print_scores(rows: list[dict[str, Any]], kinds: tuple[str, ...]) -> None:
    """Tasks by inputs, and what is measured inside the LLM, as means over tasks."""
    table = Table(title="evaluation (all languages)")
    for name in ("task", "metric", "count", *kinds, "±"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for row in overview(rows, kinds):
        scores = [_figure(row[kind]) for kind in kinds]
        table.add_row(row["task"], row["metric"], str(row["count"]), *scores, _plus_minus(row["±"]))
    console.print(table)
    states: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in rows:
        if r["language"] == r["wording"] == "all" and r["metric"] in STATES:
            states[r["metric"]][r["input"]].append(r["value"])
    if not states:
        return
    table = Table(title="inside the LLM (means over tasks)")
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
    lines: dict[tuple[str, str, str, int], dict[str, dict[str, Any]]] = defaultdict(dict)
    for r in rows:
        if r["language"] == "all" and r["input"] == "speech" and r["metric"] not in STATES:
            lines[r["metric"], r["trained"], r["wordings"], r["tasks"]][r["column"]] = r
    for (metric, trained, _, tasks), found in sorted(lines.items()):
        cells = [
            f"{_figure(found[c]['value'])} {_plus_minus(_half(found[c]))}" if c in found else ""
            for c in COLUMNS
        ]
        table.add_row(metric, trained, str(tasks), *(cell.strip() for cell in cells))
    if lines:
        console.print(table)


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if abs(value) >= 2 else f"{value:.2f}"


def _half(row: dict[str, Any] | None) -> float | None:
    """Half the width of a row's interval."""
    if row is None or row["low"] is None:
        return None
    half: float = (row["high"] - row["low"]) / 2
    return half


def _plus_minus(half: float | None) -> str:
    return "" if half is None else f"±{_figure(half)}"


def track(
    config: cfg.Config,
    state: ckpt.State,
    cells: list[Cell],
    general: list[dict[str, Any]],
    results: list[Result],
    shards: ShardSet,
    pictures: Iterable[tuple[str, Figure]] = (),
) -> str:
    """An evaluation run in the tracker: metrics, tables, clips, pictures; returns its id."""
    tracker = Tracker(
        config.run.tracking_uri,
        config.run.experiment,
        f"{config.run.name}-evaluation",
        params=config.flat() | {"checkpoint.step": str(state.step)},
        tags=run_tags("evaluate") | parent(config, state, "hearken.trained_by"),
    )
    tracker.data(Used.of("evaluation", "evaluation", shards))
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
    kinds = config.evaluate.inputs if config.evaluate else ()
    _table(tracker, "scores", overview(rows, kinds) if kinds else [])
    _table(tracker, "evaluation", rows)
    _table(tracker, "generalisation", general)
    _samples(tracker, config, results, shards)
    if (by_task := losses(rows)) is not None:
        tracker.picture("loss_by_task", by_task)
    for name, figure in pictures:
        tracker.picture(name, figure)
    tracker.close()
    return tracker.run_id


def _table(tracker: Tracker, name: str, rows: list[dict[str, Any]]) -> None:
    if rows:
        tracker.table(name, {column: [r[column] for r in rows] for column in rows[0]})


def sampled(config: cfg.Config, results: Iterable[Result]) -> list[str]:
    """The keys of some clips, spread over the set."""
    wanted = config.evaluate.samples if config.evaluate else 0
    heard = sorted({r.item.key for r in results if r.input == "speech"})
    return heard[:: max(1, len(heard) // max(1, wanted))][:wanted]


def _samples(tracker: Tracker, config: cfg.Config, results: list[Result], shards: ShardSet) -> None:
    """Some clips to listen to, and what was made of them."""
    spoken = sorted((r for r in results if r.input == "speech"), key=lambda r: r.item.key)
    keys = sampled(config, results)
    index = {key: i for i, key in enumerate(shards.keys.to_pylist())}
    folder = config.run.output / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    names = {key: f"{n:02d}-{Path(key).name}.flac" for n, key in enumerate(keys)}
    for key, name in names.items():
        path = folder / name
        path.write_bytes(shards.read(index[key], "flac"))
        tracker.file(path, "samples")
    shown = [
        {
            "audio": f"samples/{names[r.item.key]}",
            "transcript": shards.texts[index[r.item.key]].as_py(),
            "task": r.item.task,
            "instruction": r.item.instruction,
            "expected": r.item.answer,
            "answer": r.choice if r.answer is None else r.answer,
        }
        for r in spoken
        if r.item.key in names
    ]
    _table(tracker, "samples", shown)


def main(argv: list[str] | None = None) -> None:
    # Not above: evaluation, which writes what this reads, has no use for plots.
    from train.page import Page
    from train.tracked import Store

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUN_ID", help="names or ids, as MLflow has them"
    )
    parser.add_argument("--experiment", help="all runs of this one, too")
    parser.add_argument(
        "--uri", default=cfg.Run.model_fields["tracking_uri"].default,
        help="of the tracker (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="(%(default)s)")
    parser.add_argument("--samples", type=int, default=6, help="clips to hear (%(default)s)")
    args = parser.parse_args(argv)
    store = Store(args.uri)
    runs = store.find(args.runs, args.experiment)
    page = Page(store, runs, args.samples)
    names = [run.name for run in runs if run.stage != "evaluate"] or [run.name for run in runs]
    html = page.html(args.experiment or ", ".join(dict.fromkeys(names)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(html, encoding="utf-8")
    console.print(f"{len(runs)} runs in {args.out} ({len(html) / 1e6:.1f} MB)")


if __name__ == "__main__":
    sys.exit(guarded(main))
