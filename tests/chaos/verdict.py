"""Whether a run that was hit is the run that was not: weights, data and metrics."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import mlflow
import torch

from data.shards import ShardSet
from tests.chaos.cluster import Run
from train import checkpoint as ckpt


def differences(hit: Run, quiet: Run) -> Iterator[str]:
    """One line for everything that is not as it should be."""
    one, other = (ckpt.find(run.folder) for run in (hit, quiet))
    if one.state.step != other.state.step:
        yield f"the run ended at step {one.state.step}, not {other.state.step}"
    for kind in ("weights", "moments"):
        found, expected = getattr(one, kind), getattr(other, kind)
        if found.keys() != expected.keys():
            yield f"other {kind}: {sorted(found.keys() ^ expected.keys())}"
        changed = [name for name in expected if not torch.equal(found[name], expected[name])]
        if changed:
            yield f"{len(changed)} of {len(expected)} {kind} differ, {changed[0]} among them"
    yield from _ledger(hit, quiet)
    yield from _metrics(hit, quiet)


def _lines(run: Run) -> list[dict[str, Any]]:
    lines = (run.folder / "ledger.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def _ledger(hit: Run, quiet: Run) -> Iterator[str]:
    found, expected = _lines(hit), _lines(quiet)
    if found != expected:
        yield "the ledger is not the uninterrupted run's"
    root = hit.cluster.root / "shards"
    corpus = Counter(
        shards.key(i)
        for shards in (ShardSet.open(str(root / "*.tar")),)
        for i in range(len(shards))
    )
    epochs = {line["epoch"] for line in found}
    for epoch in sorted(epochs)[:-1]:  # the last one is cut where the run ends
        trained = Counter(key for line in found if line["epoch"] == epoch for key in line["keys"])
        if trained != corpus:
            yield f"epoch {epoch} did not train the corpus, each sample once"
    if len(epochs) < 2:
        yield "no whole epoch was trained"


def _metrics(hit: Run, quiet: Run) -> Iterator[str]:
    curves = []
    client = mlflow.MlflowClient(hit.cluster.database)
    for run in (hit, quiet):
        (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
        named = f"tags.mlflow.runName = '{run.name}'"
        runs = client.search_runs([experiment.experiment_id], named)
        if len(runs) != 1:
            yield f"{run.name} has {len(runs)} runs in the tracker, not one"
            return
        history = client.get_metric_history(runs[0].info.run_id, "train/loss")
        curves.append(sorted((m.step, m.value) for m in history))
        if [step for step, _ in curves[-1]] != list(range(run.steps)):
            yield f"{run.name}: the tracker's steps are not 0 to {run.steps - 1}, each once"
        if runs[0].info.status != "FINISHED":
            yield f"{run.name} is {runs[0].info.status} in the tracker"
    if curves[0] != curves[1]:
        yield "the loss curve is not the uninterrupted run's"
