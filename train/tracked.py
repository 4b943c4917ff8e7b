"""What the tracker holds, read back: beside `tracking.py`, the other file that imports MLflow."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from train.config import ConfigError

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


@dataclass(frozen=True)
class Run:
    """A finished or running run; times in milliseconds since 1970."""

    run_id: str
    experiment: str
    """Its number."""
    name: str
    status: str
    began: int
    ended: int | None
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, float]
    """Last value of each."""

    @property
    def stage(self) -> str:
        """`behave`, `train` or `evaluate`; empty for a run of others."""
        return self.tags.get("hearken.stage", "")


class Store:
    """A tracking database or server, read only.

    Args:
        uri: as `run.tracking_uri`.
    Raises:
        ConfigError: it is a database file that is not there (MLflow would make an empty one).
    """

    def __init__(self, uri: str):
        path = database(uri)
        if path is not None and not path.exists():
            raise ConfigError(f"--uri {uri}: {path} does not exist; name the run.tracking_uri")
        self.uri = uri
        self._files: dict[str, list[str]] = {}

    @cached_property
    def _client(self) -> Any:
        import mlflow

        return mlflow.MlflowClient(self.uri)

    @cached_property
    def _all(self) -> list[Run]:
        """All runs that are not deleted, the oldest first."""
        client = self._client
        self._experiments = {e.name: e.experiment_id for e in client.search_experiments()}
        found: list[Run] = []
        for experiment in self._experiments.values():
            token = None
            while True:
                page = client.search_runs([experiment], max_results=1000, page_token=token)
                for run in page:
                    found.append(_read(run))
                if not (token := page.token):
                    break
        return sorted(found, key=lambda run: run.began)

    def find(self, names: Sequence[str], experiment: str | None = None) -> list[Run]:
        """The runs that are named (by id, the beginning of one, or name), and an experiment's.

        Of training runs, their evaluations as well.

        Raises:
            ConfigError: a name fits none or, as the beginning of an id, several; none is found.
        """
        runs = self._all
        chosen: dict[str, Run] = {}
        for name in names:
            fitting = [r for r in runs if r.name == name]
            if not fitting:
                fitting = [r for r in runs if name and r.run_id.startswith(name)]
                if len(fitting) > 1:
                    raise ConfigError(f"{name}: {len(fitting)} runs begin so; give more of the id")
            if not fitting:
                known = ", ".join(f"{r.name} ({r.run_id[:8]})" for r in runs[-8:]) or "none"
                raise ConfigError(f"{self.uri} has no run {name!r}; the latest are {known}")
            chosen |= {r.run_id: r for r in fitting}
        if experiment is not None:
            if experiment not in self._experiments:
                known = ", ".join(sorted(self._experiments))
                raise ConfigError(f"{self.uri} has no experiment {experiment!r}; there are {known}")
            number = self._experiments[experiment]
            chosen |= {r.run_id: r for r in runs if r.experiment == number}
        trained = set(chosen)
        chosen |= {r.run_id: r for r in runs if r.tags.get("hearken.trained_by") in trained}
        if not chosen:
            raise ConfigError(f"{self.uri}: no runs to report; name some, or an --experiment")
        return sorted(chosen.values(), key=lambda run: run.began)

    def history(self, run: Run, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, in the order of steps."""
        found = self._client.get_metric_history(run.run_id, metric)
        return sorted((m.step, m.value) for m in found)

    def files(self, run: Run) -> list[str]:
        """Paths of all artifacts."""
        if run.run_id in self._files:
            return self._files[run.run_id]
        found: list[str] = []
        folders = [""]
        while folders:
            for entry in self._client.list_artifacts(run.run_id, folders.pop() or None):
                (folders if entry.is_dir else found).append(entry.path)
        self._files[run.run_id] = sorted(found)
        return self._files[run.run_id]

    def read(self, run: Run, path: str) -> bytes:
        """An artifact's contents."""
        with tempfile.TemporaryDirectory() as folder:
            return Path(self._client.download_artifacts(run.run_id, path, folder)).read_bytes()

    def table(self, run: Run, name: str) -> list[dict[str, Any]]:
        """The rows that `Tracker.table` wrote; none where there is no such table."""
        if f"{name}.json" not in self.files(run):
            return []
        tree = json.loads(self.read(run, f"{name}.json"))
        return [dict(zip(tree["columns"], row, strict=True)) for row in tree["data"]]


def database(uri: str) -> Path | None:
    """The file that an SQLite address names; none where it is a server's."""
    if not uri.startswith("sqlite:"):
        return None
    return Path(uri.partition("?")[0].removeprefix("sqlite:///"))


def _read(run: Any) -> Run:
    info, data = run.info, run.data
    return Run(
        info.run_id, info.experiment_id, info.run_name, info.status, info.start_time, info.end_time,
        dict(data.params), dict(data.tags), dict(data.metrics),
    )  # fmt: skip
