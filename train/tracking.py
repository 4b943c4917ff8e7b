"""MLflow, wrapped: the only file that imports it, and only rank 0 does.

One run whatever the number of ranks and restarts. Metrics are kept back and written in whole
steps, one transaction each time, and always before a checkpoint is committed. After a restart
the steps that the tracker already has are not written again: the resumed run computes the same
values, so the step axis has no gap and nothing twice.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

_VERSIONS = ("torch", "transformers", "deepspeed", "webdataset")
_PARAM_LENGTH = 6000
_BATCH = 1000
_FLUSH_SECONDS = 10.0
_STEP_METRIC = "train/loss"


class Tracker:
    """An MLflow run: new, or the one that `run_id` names."""

    def __init__(
        self,
        uri: str,
        experiment: str,
        name: str,
        *,
        run_id: str | None = None,
        params: dict[str, str] | None = None,
        tags: dict[str, str] | None = None,
    ):
        import mlflow

        mlflow.set_tracking_uri(uri)
        self._mlflow = mlflow
        self._client = mlflow.MlflowClient(uri)
        self.uri, self.experiment = uri, experiment
        mlflow.set_experiment(experiment)
        with _quiet():
            run = mlflow.start_run(run_id=run_id, run_name=name, tags=tags)
        self.run_id = run.info.run_id
        self._pending: list[tuple[int, dict[str, float], int]] = []
        self._flushed = time.monotonic()
        self._last = self._last_step() if run_id else -1
        if run_id is None and params:
            # A changed param raises on resume, so they are written once.
            mlflow.log_params({k: v[:_PARAM_LENGTH] for k, v in params.items()})

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One step's metrics, all of them at once; known steps are passed over."""
        if step <= self._last:
            return
        self._pending.append((step, metrics, int(time.time() * 1000)))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is pending; every transaction holds whole steps."""
        from mlflow.entities import Metric

        batch: list[Any] = []
        for step, metrics, at in [*self._pending, (-1, {}, 0)]:
            rows = [Metric(name, value, at, step) for name, value in metrics.items()]
            if batch and (step < 0 or len(batch) + len(rows) > _BATCH):
                self._client.log_batch(self.run_id, metrics=batch)
                batch = []
            batch += rows
        if self._pending:
            self._last = self._pending[-1][0]
        self._pending.clear()
        self._flushed = time.monotonic()

    def values(self, metrics: dict[str, float]) -> None:
        """Metrics without a step axis, such as an evaluation's results."""
        self._mlflow.log_metrics(metrics)

    def table(self, name: str, columns: dict[str, list[Any]]) -> None:
        """A table that MLflow shows (artifact `name`.json)."""
        self._mlflow.log_table(columns, f"{name}.json")

    def file(self, path: Path, folder: str) -> None:
        """A file as an artifact of the run."""
        self._mlflow.log_artifact(str(path), folder)

    def close(self, status: str = "FINISHED") -> None:
        """Write what is pending and end the run (`KILLED` or `FAILED` can be resumed)."""
        self.flush()
        with _quiet():
            self._mlflow.end_run(status)

    def _last_step(self) -> int:
        history = self._client.get_metric_history(self.run_id, _STEP_METRIC)
        return max((m.step for m in history), default=-1)


def history(uri: str, run_id: str, metric: str) -> list[float]:
    """A run's values of one metric, in the order of their steps."""
    import mlflow

    found = mlflow.MlflowClient(uri).get_metric_history(run_id, metric)
    return [m.value for m in sorted(found, key=lambda m: m.step)]


def run_tags(stage: str) -> dict[str, str]:
    """Where a run came from: stage, code revision, host, versions."""
    return {
        "hearken.stage": stage,
        "hearken.revision": revision(),
        "hearken.host": platform.node(),
        "hearken.versions": ", ".join(f"{name} {version(name)}" for name in _VERSIONS),
    }


def revision() -> str:
    """The checkout's commit, marked `+changes` where files differ from it; else `unknown`."""
    root = Path(__file__).parent
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


@contextmanager
def _quiet() -> Iterator[None]:
    """MLflow prints links of its server's pages on start and end, which a file store lacks."""
    with redirect_stdout(StringIO()):
        yield
