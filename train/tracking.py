"""MLflow, wrapped: the only file that imports it, and only rank 0 does.

A training run is one MLflow run whatever the number of ranks, restarts and outages. Its metrics
are journalled beside the checkpoints (`train.journal`) and sent from there (`train.sending`). After
a restart the steps that the journal already has are not written again: the resumed run computes the
same values, so the step axis has no gap and nothing twice.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.audio import SAMPLE_RATE
from data.remote import shown
from data.secrets import redacted
from train import config as cfg
from train.config import ConfigError
from train.journal import Entry, Journal
from train.sending import Sender
from train.tracked import database

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from data.shards import ShardSet
    from train import checkpoint as ckpt

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

DATA = "hearken.data"
"""Tag of a run that trains or evaluates: the digest of the shards that it does it on."""
TARGETS = "hearken.targets"
"""Tag of stage 1 and of the runs that train on what it made: the hash of how that was made."""
_VERSIONS = ("torch", "transformers", "deepspeed", "webdataset")
_PARAM_LENGTH = 6000
_STEP_METRIC = "train/loss"


@dataclass(frozen=True)
class Used:
    """Data that a run has used: its shards, the digest of their indexes, and how much it is."""

    name: str
    context: str
    """What for: `training`, `validation` or `evaluation`."""
    digest: str
    addresses: Sequence[str]
    facts: dict[str, float]

    @classmethod
    def of(cls, name: str, context: str, shards: ShardSet) -> Used:
        hours = float(shards.num_samples.sum()) / SAMPLE_RATE / 3600
        facts = {"utterances": len(shards), "hours": round(hours, 3)}
        return cls(name, context, shards.digest, shards.addresses, facts)


class Tracker:
    """An MLflow run: new, or the one that `run_id` names.

    Raises:
        ConfigError: a new run is wanted, and the tracker does not answer.
    """

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
        # What MLflow does by itself is to try for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        import mlflow

        mlflow.set_tracking_uri(uri)
        self.uri, self.experiment = uri, experiment
        self._client = mlflow.MlflowClient(uri)
        if run_id is None:
            try:
                run_id = self._create(name, params or {}, tags or {})
            except Exception as error:  # MLflow's many, and those of its libraries
                reason = redacted(" ".join(str(error).split())[:300])
                raise ConfigError(
                    f"run.tracking_uri: {redacted(uri)} does not take a new run ({reason}); start "
                    "the server, or name another"
                ) from None
        self.run_id = run_id

    def _create(self, name: str, params: dict[str, str], tags: dict[str, str]) -> str:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking.context.registry import resolve_tags

        found = self._client.get_experiment_by_name(self.experiment)
        if found is None:
            with suppress(MlflowException):  # another run may just have made it
                self._client.create_experiment(self.experiment)
            found = self._client.get_experiment_by_name(self.experiment)
        if found is None:
            raise MlflowException(f"experiment {self.experiment!r} cannot be made")
        run = self._client.create_run(found.experiment_id, tags=resolve_tags(tags), run_name=name)
        rows = [Param(k, redacted(v)[:_PARAM_LENGTH]) for k, v in params.items()]
        for at in range(0, len(rows), 100):
            self._client.log_batch(run.info.run_id, params=rows[at : at + 100])
        run_id: str = run.info.run_id
        return run_id

    def values(self, metrics: dict[str, float]) -> None:
        """Metrics without a step axis, such as an evaluation's results."""
        self._log([(0, int(time.time() * 1000), metrics)])

    def table(self, name: str, columns: dict[str, list[Any]]) -> None:
        """A table that MLflow shows (artifact `name`.json)."""
        self._client.log_table(self.run_id, columns, f"{name}.json")

    def file(self, path: Path, folder: str) -> None:
        """A file as an artifact of the run."""
        self._client.log_artifact(self.run_id, str(path), folder)

    def tag(self, name: str, value: str) -> None:
        """A tag of the run, which MLflow can search for."""
        self._client.set_tag(self.run_id, name, value)

    def picture(self, name: str, figure: Figure) -> None:
        """A picture that MLflow shows (artifact pictures/`name`.png)."""
        self._client.log_figure(self.run_id, figure, f"pictures/{name}.png")

    def data(self, used: Used) -> None:
        """A set of data that the run has used, as MLflow lists it beside the run.

        Its whole digest is a tag as well, but for data that a training run is validated on.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        found = Dataset(
            used.name,
            used.digest[:36],  # all that MLflow keeps
            "webdataset",
            redacted(json.dumps({"shards": [shown(a) for a in used.addresses]})),
            profile=json.dumps(used.facts),
        )
        tags = [InputTag("mlflow.data.context", used.context)]
        self._client.log_inputs(self.run_id, [DatasetInput(found, tags)])
        if used.context != "validation":
            self._client.set_tag(self.run_id, DATA, used.digest)

    def model(self, folder: Path, name: str, step: int) -> str:
        """An MLflow model that the run has made, with all its files; returns its address.

        `mlflow.pyfunc.log_model` would write the weights a second time to send them, and end the
        run anew.
        """
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        run = self._client.get_run(self.run_id)
        made = self._client.create_logged_model(
            run.info.experiment_id,
            re.sub(r"[/:.%\"']", "-", name),  # what MLflow takes in no model's name
            source_run_id=self.run_id,
            params=run.data.params,
        )
        status = LoggedModelStatus.FAILED
        try:
            self._client.log_outputs(self.run_id, [LoggedModelOutput(made.model_id, step)])
            self._client.log_model_artifacts(made.model_id, str(folder))
            status = LoggedModelStatus.READY
        finally:
            self._client.finalize_logged_model(made.model_id, status)
        return f"models:/{made.model_id}"

    def close(self, status: str = "FINISHED") -> None:
        """End the run (`KILLED` or `FAILED` can be resumed)."""
        self._client.set_terminated(self.run_id, status)

    def _log(self, rows: Sequence[tuple[int, int, dict[str, float]]]) -> None:
        """(step, time in ms, metrics): all of them in one transaction, up to 1,000 metrics."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, at, step) for step, at, each in rows for name, value in each.items()
        ]
        for first in range(0, len(metrics), 1000):
            self._client.log_batch(self.run_id, metrics=metrics[first : first + 1000])


class StepTracker(Tracker):
    """A training run, whose tracker may go away and come back; it is opened without it, too.

    Args:
        journal: where the steps are kept; they are sent by a thread, at its own pace.
    """

    def __init__(
        self,
        *args: Any,
        journal: Path,
        say: Callable[[str], object] = print,
        run_id: str | None = None,
        **settings: Any,
    ):
        super().__init__(*args, run_id=run_id, **settings)
        if run_id is None:
            journal.unlink(missing_ok=True)  # another run's
        self._journal = Journal(journal)
        self._say = say
        self._sender = Sender(self._journal, self, say)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One step's metrics, all of them at once; known steps are passed over."""
        if step > self._journal.last:
            self._journal.append(step, metrics)

    def sync(self) -> None:
        """Have what was logged on the disk."""
        self._journal.sync()

    # Where the tracker is away, these are said to be missing there.

    def file(self, path: Path, folder: str) -> None:
        self._offer(str(path), lambda: super(StepTracker, self).file(path, folder))

    def tag(self, name: str, value: str) -> None:
        self._offer(f"tag {name}", lambda: super(StepTracker, self).tag(name, value))

    def picture(self, name: str, figure: Figure) -> None:
        self._offer(f"picture {name}", lambda: super(StepTracker, self).picture(name, figure))

    def data(self, used: Used) -> None:
        self._offer(f"data {used.name}", lambda: super(StepTracker, self).data(used))

    def _offer(self, what: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # MLflow's many, and those of its libraries
            reason = redacted(" ".join(str(error).split())[:300])
            self._say(f"the tracker did not take {what} ({type(error).__name__}: {reason})")

    def close(self, status: str = "FINISHED", seconds: float = 60.0) -> None:
        """Send what is left and end the run, but wait for the tracker no longer than `seconds`."""
        # What a full disk does not take came after the last checkpoint, and will come again.
        with suppress(OSError):
            self._journal.sync()
        if not self._sender.close(status, seconds):
            self._say(
                f"the tracker does not have all metrics of this run yet; they are in "
                f"{self._journal.path}, and the same command sends them once it answers"
            )

    # What the sender's thread calls:

    def last_step(self) -> int:
        self._client.update_run(self.run_id, status="RUNNING")
        history = self._client.get_metric_history(self.run_id, _STEP_METRIC)
        return max((m.step for m in history), default=-1)

    def receive(self, entries: Sequence[Entry]) -> None:
        self._log([(e.step, e.at, e.metrics) for e in entries])

    def end(self, status: str) -> None:
        self._client.set_terminated(self.run_id, status)


def history(uri: str, run_id: str, metric: str) -> list[float]:
    """A run's values of one metric, in the order of their steps."""
    import mlflow

    found = mlflow.MlflowClient(uri).get_metric_history(run_id, metric)
    return [m.value for m in sorted(found, key=lambda m: m.step)]


def log_model(of: ckpt.State, folder: Path) -> str:
    """Send an MLflow model to the run that trained it, as `Tracker.model`; returns its address.

    Raises:
        ConfigError: the checkpoint's tracker does not answer, has no such run, or refuses.
    """
    about = of.config["run"]
    uri = about["tracking_uri"]
    try:
        path = database(uri)
        if path is not None and not path.exists():  # MLflow would make an empty one
            raise FileNotFoundError(f"{path} does not exist")
        tracker = Tracker(uri, about["experiment"], about["name"], run_id=of.tracker_run)
        return tracker.model(folder, about["name"], of.step)
    except Exception as error:  # MLflow's many, and those of its libraries
        reason = redacted(" ".join(str(error).split())[:300])
        raise ConfigError(
            f"{folder} is written, but run.tracking_uri {redacted(uri)} did not take it as a model "
            f"of run {of.tracker_run} ({reason}); once it does, export again to new folders"
        ) from None


def run_tags(stage: str) -> dict[str, str]:
    """Where a run came from: stage, code revision, host, versions."""
    return {
        "hearken.stage": stage,
        "hearken.revision": revision(),
        "hearken.host": platform.node(),
        "hearken.versions": ", ".join(f"{name} {version(name)}" for name in _VERSIONS),
    }


def parent(config: cfg.Config, of: ckpt.State, tag: str) -> dict[str, str]:
    """Tags that name the run of a checkpoint: `tag`, and MLflow's own if that run is in the same
    tracker, so that its pages show the one below the other."""
    tags = {tag: of.tracker_run}
    if of.config["run"]["tracking_uri"] == redacted(config.run.tracking_uri):
        tags["mlflow.parentRunId"] = of.tracker_run
    return tags


@cache
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
