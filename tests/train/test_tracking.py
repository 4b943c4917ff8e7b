"""The journal of metrics, and a tracker that goes away and comes back."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import mlflow
import pytest

from tests.launch import environment, free_port, start
from tests.train.conftest import Workspace
from train.config import ConfigError
from train.journal import Entry, Journal
from train.sending import Sender
from train.tracking import StepTracker, Tracker, Used


def test_a_journal_goes_on_after_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    journal = Journal(path)
    assert journal.last == -1
    for step in range(3):
        journal.append(step, {"a": step / 2, "b": float("nan")})
    journal.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 3, "at": 1, "met')
    journal = Journal(path)
    assert journal.last == 2
    assert path.read_bytes() == whole
    journal.append(3, {"a": 9.0})
    found = list(journal.entries())
    assert [e.step for e in found] == [0, 1, 2, 3]
    assert [e.metrics["a"] for e in found] == [0.0, 0.5, 1.0, 9.0]
    assert list(journal.entries(found[1].end)) == found[2:]
    path.write_bytes(b'{"step": 0')
    assert Journal(path).last == -1
    assert path.read_bytes() == b""


class Away:
    """A receiver that fails when it is told to, before it took the steps or after."""

    def __init__(self, faults: Sequence[str]):
        self.steps: list[int] = []
        self.ended = ""
        self._faults = list(faults)

    def last_step(self) -> int:
        self._fail("asked")
        return max(self.steps, default=-1)

    def receive(self, entries: Sequence[Entry]) -> None:
        self._fail("before")
        self.steps += [entry.step for entry in entries]
        self._fail("after")  # the answer is lost, the steps are not

    def end(self, status: str) -> None:
        self.ended = status

    def _fail(self, when: str) -> None:
        if self._faults and self._faults[0] == when:
            raise ConnectionError(self._faults.pop(0))


@pytest.mark.parametrize("faults", [[], ["asked", "before", "after"], ["after", "asked", "after"]])
def test_whatever_fails_every_step_arrives_once(tmp_path: Path, faults: list[str]) -> None:
    journal, receiver = Journal(tmp_path / "metrics.jsonl"), Away(faults)
    for step in range(5):
        journal.append(step, {f"metric{n}": 1.0 for n in range(400)})  # two steps a delivery
    said: list[str] = []
    sender = Sender(journal, receiver, said.append)
    for step in range(5, 9):
        journal.append(step, {"metric": 1.0})
    assert sender.close("FINISHED", 30)
    assert receiver.steps == list(range(9))
    assert receiver.ended == "FINISHED"
    assert len(said) == (2 if faults else 0), said


def points(uri: str, run_id: str) -> list[tuple[int, float]]:
    history = mlflow.MlflowClient(uri).get_metric_history(run_id, "train/loss")
    return [(m.step, m.value) for m in history]


@pytest.mark.slow
def test_a_database_that_is_locked_costs_nothing(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db?timeout=0.1"
    said: list[str] = []
    journal = tmp_path / "metrics.jsonl"
    mlflow.MlflowClient(uri).search_experiments()  # what it starts for good is none of ours
    others = set(threading.enumerate())
    tracker = StepTracker(uri, "e", "r", journal=journal, say=said.append)
    lock = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    for step in range(5):
        tracker.log(step, {"train/loss": float(step)})
    tracker.close(seconds=3)
    assert "does not have all metrics" in said[-1]
    # What was given up asks no more: it would undo what the next one does.
    for thread in set(threading.enumerate()) - others:
        thread.join(120)  # MLflow tries for some 20 s by itself
        assert not thread.is_alive(), thread.name
    lock.execute("ROLLBACK")
    assert points(uri, tracker.run_id) == []
    # The same command again: three of the steps are computed anew, two more come.
    tracker = StepTracker(uri, "e", "r", journal=journal, say=said.append, run_id=tracker.run_id)
    for step in range(2, 7):
        tracker.log(step, {"train/loss": float(step)})
    tracker.close()
    assert points(uri, tracker.run_id) == [(step, float(step)) for step in range(7)]
    assert mlflow.MlflowClient(uri).get_run(tracker.run_id).info.status == "FINISHED"


def test_a_new_run_on_a_server_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    uri = f"http://me:hunter2@127.0.0.1:{free_port()}"
    with pytest.raises(ConfigError, match=r"run\.tracking_uri: http://\*\*\*@127") as raised:
        Tracker(uri, "e", "r")
    assert "hunter2" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_secrets_do_not_reach_the_tracker(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    params = {"data.shards": '["https://me:hunter2@host/x.tar?sig=hunter2"]', "n": "1"}
    tracker = Tracker(uri, "e", "r", params=params)
    tracker.close()
    found = mlflow.MlflowClient(uri).get_run(tracker.run_id).data.params
    assert found == {"data.shards": '["https://***@host/x.tar?***"]', "n": "1"}


def test_a_run_is_found_by_the_digest_of_its_data(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = StepTracker(uri, "e", "r", journal=tmp_path / "metrics.jsonl")
    for name, digest in (("training", "7" * 64), ("validation", "8" * 64)):
        tracker.data(Used(name, name, digest, ["a.tar"], {"utterances": 1.0}))
    tracker.close()
    client = mlflow.MlflowClient(uri)
    (experiment,) = [e.experiment_id for e in client.search_experiments() if e.name == "e"]
    (found,) = client.search_runs([experiment], f"tags.`hearken.data` = '{'7' * 64}'")
    assert found.info.run_id == tracker.run_id
    assert len(found.inputs.dataset_inputs) == 2


class Server:
    """`mlflow server`, which can be killed and started again on the same port."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.database = f"sqlite:///{folder}/mlflow.db"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            Path(sys.executable).parent / "mlflow", "server", "--host", "127.0.0.1", "--workers",
            "1", "--port", str(self.port), "--backend-store-uri", self.database,
            "--artifacts-destination", self.folder,
        ]  # fmt: skip
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment(), start_new_session=True
            )

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    made.start()
    yield made
    made.kill()


@pytest.mark.slow
def test_a_server_that_is_killed_and_comes_back_has_every_step_once(
    workspace: Workspace, server: Server
) -> None:
    log, folder = workspace.root / "outage.log", workspace.root / "outage" / "checkpoints"

    def logged() -> list[int]:
        found = [e.experiment_id for e in client.search_experiments() if e.name == "tiny"]
        runs = client.search_runs(found) if found else []
        return [
            m.step for r in runs for m in client.get_metric_history(r.info.run_id, "train/loss")
        ]

    def reached() -> int:
        return max((int(path.name[5:]) for path in folder.glob("step-*")), default=0)

    def until(done: Callable[[], object]) -> None:
        deadline = time.monotonic() + 120
        while not done():
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.1)

    until(lambda: "startup complete" in (server.folder / "server.log").read_text())
    client = mlflow.MlflowClient(server.database)  # not before: both would make the tables
    config = workspace.config("outage", train__schedule="constant", train__checkpoint_every=5)
    process = start(
        "train/main.py", config, "--set", f"run.tracking_uri={server.uri}", "--set",
        "train.steps=9999", ranks=2, log=log,
    )  # fmt: skip
    try:
        until(logged)
        server.kill()
        until(lambda: "the tracker does not answer, training goes on" in log.read_text())
        gone = len(logged())
        until(lambda: reached() > gone + 10)  # which no step waited for
        server.start()
        until(lambda: "the tracker answers again" in log.read_text())
        os.killpg(process.pid, signal.SIGTERM)
        until(lambda: log.read_text().count("stopped: SIGTERM after") == 2)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert sorted(logged()) == list(range(reached()))
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.status == "KILLED"
