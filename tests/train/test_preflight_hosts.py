"""What `train.preflight` finds on two hosts, and on one whose other is not there."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hosts import PORT, Host, across
from tests.train.conftest import Workspace

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Task:
    """Rank `rank` of two, on a host of its own, as srun starts it."""

    workspace: Workspace
    hosts: tuple[Host, Host]
    rank: int
    port: str = PORT

    def start(self, log: str, shards: str, *args: str | Path) -> subprocess.Popen[bytes]:
        return self.hosts[self.rank].start(
            sys.executable, "train/preflight.py", self.workspace.config("not-ready"),
            "--set", f"data.shards=['{shards}']", *args, log=self.workspace.root / log,
            SLURM_STEP_ID="0", SLURM_NTASKS="2", SLURM_LOCALID="0", SLURM_PROCID=str(self.rank),
            SLURM_STEP_TASKS_PER_NODE="1(x2)", MASTER_ADDR=self.hosts[0].address,
            MASTER_PORT=self.port, GLOO_SOCKET_IFNAME="eth0",
        )  # fmt: skip


@pytest.fixture(scope="module")
def shards(workspace: Workspace) -> str:
    return str(workspace.root / "shards" / "train-*.tar")


@pytest.fixture(scope="module")
def lonely(workspace: Workspace, hosts: tuple[Host, Host], shards: str) -> subprocess.Popen[bytes]:
    """A rank whose other never comes: it waits while the others are asked."""
    hostlist = workspace.root / "hostlist"
    hostlist.write_text("node1 slots=1\nnode2 slots=1\n")
    task = Task(workspace, hosts, rank=0, port="29518")
    return task.start("lonely.log", shards, "--hostfile", hostlist)


def test_all_in_order(
    workspace: Workspace, hosts: tuple[Host, Host], one_each: Path,
    lonely: subprocess.Popen[bytes],
) -> None:  # fmt: skip
    config = workspace.config("ready")
    said = across(hosts, one_each, "train/preflight.py", config, "--hostfile", one_each)
    assert "2 ranks are ready" in said
    assert "node2" in said


def test_names_the_host_that_fails(
    workspace: Workspace, hosts: tuple[Host, Host], shards: str
) -> None:
    good = Task(workspace, hosts, rank=0).start("good.log", shards)
    # The second host has lost a shard: it sees another folder in its place.
    bad = Task(workspace, hosts, rank=1).start("bad.log", "/nowhere/train-*.tar")
    assert good.wait(timeout=100) == 2
    bad.wait(timeout=100)
    said = (workspace.root / "good.log").read_text()
    assert "node2: data.shards: " in said
    assert "node1" not in said


def test_names_the_host_that_is_not_there(
    workspace: Workspace, lonely: subprocess.Popen[bytes]
) -> None:
    assert lonely.wait(timeout=100) == 2
    said = (workspace.root / "lonely.log").read_text()
    assert "no report within 30 s from rank 1 on node2" in said
