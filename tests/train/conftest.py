from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import hosts as nodes
from tests import tiny
from tests.hosts import Host
from tests.launch import launch
from train import checkpoint as ckpt

STEPS = 12


@dataclass(frozen=True)
class Workspace:
    """Tiny shards, models and targets; runs are made beside them."""

    root: Path

    def config(self, name: str, **changes: Any) -> Path:
        """A run of its own, with its own output and tracking database."""
        tree = tiny.config(self.root, **({"train__steps": STEPS} | changes))
        folder = self.root / name
        made = self.root / "tables.db"
        if made.exists() and not folder.with_suffix(".db").exists():
            shutil.copy(made, folder.with_suffix(".db"))  # a second sooner than MLflow makes them
        tree["run"] |= {
            "name": name, "output": str(folder), "tracking_uri": f"sqlite:///{folder}.db",
        }  # fmt: skip
        return tiny.write_config(self.root / f"{name}.yaml", tree)

    def curve(self, name: str, metric: str = "train/loss") -> list[tuple[int, float]]:
        """(step, value) of every point logged in the one training run of its database."""
        import mlflow  # absent where the tests marked gpu run

        client = mlflow.MlflowClient(f"sqlite:///{self.root / name}.db")
        (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
        training = "tags.`hearken.stage` = 'train'"
        (run,) = client.search_runs([experiment.experiment_id], training)
        history = client.get_metric_history(run.info.run_id, metric)
        return sorted((m.step, m.value) for m in history)

    def checkpoint(self, name: str) -> ckpt.Checkpoint:
        return ckpt.find(self.root / name)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Shards by `data.build`, targets by stage 1 on two ranks."""
    import mlflow

    root = tmp_path_factory.mktemp("workspace")
    tiny.shards(root)
    tiny.encoder(root / "encoder")
    tiny.llm(root / "llm")
    tiny.prompts(root / "prompts.yaml")
    here = Workspace(root)
    mlflow.MlflowClient(f"sqlite:///{root}/tables.db").search_experiments()
    launch("train/behave.py", here.config("targets-run"), ranks=2)
    return here


@pytest.fixture(scope="session")
def uninterrupted(workspace: Workspace) -> str:
    """The name of a two-rank run that nothing disturbed."""
    launch("train/main.py", workspace.config("uninterrupted", run__pictures=True), ranks=2)
    return "uninterrupted"


@pytest.fixture(scope="session")
def tasks(workspace: Workspace) -> Path:
    """A task file over the training shards: to repeat, to translate, and to choose."""
    rows = [json.loads(line) for line in (workspace.root / "corpus/train.jsonl").open()]
    path = workspace.root / "tasks.jsonl"
    with path.open("w") as out:
        for n, row in enumerate(rows[:10]):
            wording = {"wording": "seen", "instruction": "repeat this"}
            if n % 2:
                wording = {"wording": "unseen", "instruction": "repeat"}
            item = {"key": row["key"], "language": "en", "answer": row["text"], **wording}
            lines = [
                item | {"task": "repeat", "metric": ["wer", "cer"]},
                item | {"task": "translate", "metric": ["bleu", "chrf"]},
                item | {"task": "what", "answer": "cat", "metric": ["exact", "accuracy", "f1"],
                        "options": ["cat", "old dog"]},
            ]  # fmt: skip
            out.writelines(json.dumps(line) + "\n" for line in lines)
    return path


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    if reason := nodes.why_not():
        if "FORBIDDEN" in reason:
            pytest.skip(reason)
        pytest.fail(reason)
    with nodes.two_hosts(tmp_path_factory.mktemp("hosts")) as pair:
        yield pair


@pytest.fixture(scope="module")
def hostfile(hosts: tuple[Host, Host], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hostfile, with the environment of every node in a `.deepspeed_env` beside it."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "hostfile").write_text("".join(f"{host.name} slots=2\n" for host in hosts))
    (folder / "env").write_text("GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\nHF_HUB_OFFLINE=1\n")
    return folder / "hostfile"


@pytest.fixture(scope="module")
def one_each(hostfile: Path) -> Path:
    """The same hosts with one rank each: it takes half as long where the cores are two."""
    path = hostfile.with_name("one-each")
    path.write_text(hostfile.read_text().replace("slots=2", "slots=1"))
    return path
