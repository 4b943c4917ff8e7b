"""Runs of the tracker as one page of HTML that needs nothing beside it: to keep, or to send."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

from train.metrics import METRICS, metric
from train.states import METRICS as STATES
from train.tracked import Run, Store

COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf")
_BOUNDS = ("text", "cascade", "shuffled", "none")
_NOT_CURVES = ("eval", "drop")  # values without a step axis: they are in the table of scores
_POINTS = 400  # of a curve
_NOISY = 4  # a curve whose ups and downs add up to so many times its range is smoothed
_PICTURE_BYTES = 4_000_000


class Page:
    """The page of `runs`, whose evaluations show `samples` clips."""

    def __init__(self, store: Store, runs: Sequence[Run], samples: int = 6):
        self._store, self.runs, self._samples = store, list(runs), samples
        self.labels = _labels(self.runs)
        self._colour = {r.run_id: COLOURS[n % len(COLOURS)] for n, r in enumerate(self.runs)}

    def html(self, title: str) -> str:
        template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        made = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        return made.from_string(template).render(
            title=title,
            source=f"python -m train.report, from {self._store.uri}",
            runs=[self._row(run) for run in self.runs],
            differences=[self._differences(stage) for stage in self._stages()],
            scores=self._scores(),
            plots=self._plots(),
            pictures=self._pictures(),
            samples=self._heard(),
        )

    def _stages(self) -> list[str]:
        return list(dict.fromkeys(run.stage for run in self.runs))

    def _of(self, stage: str) -> list[Run]:
        return [run for run in self.runs if run.stage == stage]

    def _row(self, run: Run) -> dict[str, str]:
        names = {r.run_id: self.labels[r.run_id] for r in self.runs}
        of = next((run.tags[t] for t in ("hearken.trained_by", "hearken.begun_from",
                                         "mlflow.parentRunId") if t in run.tags), "")  # fmt: skip
        took = timedelta(seconds=round((run.ended - run.began) / 1000)) if run.ended else ""
        return {
            "label": self.labels[run.run_id],
            "colour": self._colour[run.run_id],
            "stage": run.stage,
            "status": run.status,
            "began": f"{datetime.fromtimestamp(run.began / 1000, UTC):%Y-%m-%d %H:%M}",
            "took": str(took),
            "code": _short(run.tags.get("hearken.revision", "")),
            "host": run.tags.get("hearken.host", ""),
            "of": names.get(of, of[:8]),
            "id": run.run_id[:8],
        }

    def _differences(self, stage: str) -> dict[str, Any]:
        """Params and our own tags of one stage's runs, those that differ apart from the others."""
        runs = self._of(stage)
        settings = [
            run.params | {k: v for k, v in run.tags.items() if k.startswith("hearken.")}
            for run in runs
        ]
        names = sorted({name for own in settings for name in own} - {"hearken.stage"})
        rows = [(name, [own.get(name) for own in settings]) for name in names]
        return {
            "stage": stage or "others",
            "labels": [self.labels[run.run_id] for run in runs],
            "rows": [(name, values) for name, values in rows if len(set(values)) > 1],
            "same": [(name, values[0]) for name, values in rows if len(set(values)) == 1],
        }

    def _scores(self) -> dict[str, Any] | None:
        """Tasks and metrics by runs, from speech; and the bounds of the first run with any.

        None where nothing was evaluated.
        """
        runs, tables, lacking = [], [], []
        for run in self._of("evaluate"):
            rows = [
                row
                for row in self._store.table(run, "evaluation")
                if row["language"] == row["wording"] == "all"
            ]
            if rows:
                runs.append(run)
                tables.append({(r["task"], r["metric"], r["input"]): r for r in rows})
            else:
                lacking.append(self.labels[run.run_id])
        if not runs and not lacking:
            return None
        asked = sorted({key[:2] for table in tables for key in table})
        shown = []
        for task, name in asked:
            higher = _higher_is_better(name)
            cells = [table.get((task, name, "speech")) for table in tables]
            values = [cell["value"] for cell in cells if cell]
            best = (max if higher else min)(values) if len(values) > 1 else None
            bounds = [
                next((t[task, name, k] for t in tables if (task, name, k) in t), None)
                for k in _BOUNDS
            ]
            shown.append(
                {
                    "task": task,
                    "metric": name,
                    "higher": higher,
                    "cells": [
                        {"text": _score(c), "best": c is not None and c["value"] == best}
                        for c in cells
                    ],
                    "bounds": [_score(row, interval=False) for row in bounds],
                }
            )
        labels = [self.labels[run.run_id] for run in runs]
        return {"labels": labels, "kinds": _BOUNDS, "rows": shown, "lacking": lacking}

    def _plots(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """By prefix: every metric with a step axis, all runs in one picture."""
        curves: dict[str, list[tuple[Run, list[tuple[int, float]]]]] = defaultdict(list)
        for run in self.runs:
            for name in run.metrics:
                if name.partition("/")[0] not in _NOT_CURVES:
                    points = self._store.history(run, name)
                    if len({step for step, _ in points}) > 1:
                        curves[name].append((run, points))
        grouped: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for name in sorted(curves, key=lambda name: (not name.startswith("train/"), name)):
            grouped[name.partition("/")[0]].append((name, self._plot(name, curves[name])))
        return list(grouped.items())

    def _plot(self, name: str, curves: list[tuple[Run, list[tuple[int, float]]]]) -> str:
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        axes = figure.subplots()
        for run, points in curves:
            steps, values = np.array(points, dtype=np.float64).T
            every = -(-len(steps) // _POINTS)
            colour = self._colour[run.run_id]
            smooth = values
            if np.abs(np.diff(values)).sum() > _NOISY * np.ptp(values):
                axes.plot(steps[::every], values[::every], color=colour, alpha=0.25, linewidth=0.8)
                smooth = _running_mean(values, len(values) // 25)
            axes.plot(steps[::every], smooth[::every], color=colour, linewidth=1.4,
                      label=self.labels[run.run_id])  # fmt: skip
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend(fontsize=7)
        held = io.BytesIO()
        figure.savefig(held, format="png", dpi=110, metadata={"Software": None})
        return _base64(held.getvalue())

    def _pictures(self) -> list[tuple[str, str, str]]:
        """Pictures that the runs themselves have left."""
        found = []
        for run in self.runs:
            for path in self._store.files(run):
                if path.endswith(".png"):
                    raw = self._store.read(run, path)
                    if len(raw) <= _PICTURE_BYTES:
                        found.append((self.labels[run.run_id], path, _base64(raw)))
        return found

    def _heard(self) -> list[dict[str, Any]]:
        """Clips to listen to, and what each evaluation answered about them."""
        clips: dict[str, dict[str, Any]] = {}
        runs = self._of("evaluate")
        for run in runs:
            for row in self._store.table(run, "samples"):
                clip = clips.setdefault(
                    row["audio"], {"transcript": row["transcript"], "run": run, "asked": {}}
                )
                asked = (row["task"], row["instruction"], row["expected"])
                clip["asked"].setdefault(asked, {})[run.run_id] = row["answer"]
        shown = []
        for path, clip in list(clips.items())[: self._samples]:
            having = [r for r in runs if any(r.run_id in a for a in clip["asked"].values())]
            shown.append(
                {
                    "transcript": clip["transcript"],
                    "audio": _base64(self._store.read(clip["run"], path)),
                    "labels": [self.labels[r.run_id] for r in having],
                    "questions": [
                        {
                            "task": task,
                            "instruction": instruction,
                            "expected": expected,
                            "answers": [answers.get(r.run_id) for r in having],
                        }
                        for (task, instruction, expected), answers in clip["asked"].items()
                    ],
                }
            )
        return shown


def _labels(runs: Sequence[Run]) -> dict[str, str]:
    """A name for each run: where others have the same, with that of the run it evaluates, or some
    of its id."""
    own = {run.run_id: run.name for run in runs}
    names = list(own.values())
    labels = {}
    for run in runs:
        of = own.get(run.tags.get("hearken.trained_by", ""))
        longer = f"{run.name} of {of}" if of else f"{run.name} ({run.run_id[:6]})"
        labels[run.run_id] = run.name if names.count(run.name) == 1 else longer
    # Two evaluations of one run.
    made = list(labels.values())
    return {
        number: label if made.count(label) == 1 else f"{label} ({number[:6]})"
        for number, label in labels.items()
    }


def _higher_is_better(name: str) -> bool:
    known = STATES[name] if name in STATES else metric(name) if name in METRICS else None
    return known is None or known.higher_is_better


def _score(row: dict[str, Any] | None, interval: bool = True) -> str:
    if row is None:
        return ""
    digits = 2 if abs(row["value"]) < 2 else 1
    text = f"{row['value']:.{digits}f}"
    if interval and row["low"] is not None:
        text += f" ± {(row['high'] - row['low']) / 2:.{digits}f}"
    return text


def _short(revision: str) -> str:
    commit, plus, changes = revision.partition("+")
    return commit[:9] + plus + changes


def _running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """Means over `half` values to either side, fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
