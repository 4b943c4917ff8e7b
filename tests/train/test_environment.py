"""Who this process is among the ranks, by whatever started it."""

from __future__ import annotations

import os

import pytest

from train.engine import environment

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing has been started by anyone; what is set is undone."""
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    return monkeypatch


@pytest.mark.parametrize("tasks", ["2(x2)", "2,2", "2(x1),2"])
def test_a_task_of_sruns(bare: pytest.MonkeyPatch, tasks: str) -> None:
    os.environ.update(
        SLURM_STEP_ID="0", SLURM_NTASKS="4", SLURM_PROCID="3", SLURM_LOCALID="1",
        SLURM_STEP_TASKS_PER_NODE=tasks, MASTER_ADDR="node1",
    )  # fmt: skip
    environment()
    assert [os.environ[name] for name in RANKS] == ["3", "4", "1", "2", "node1", "29500"]


def test_a_launchers_own_ranks_stay(bare: pytest.MonkeyPatch) -> None:
    os.environ.update(RANK="5", SLURM_STEP_ID="0", SLURM_PROCID="0", MASTER_ADDR="node1")
    environment()
    assert os.environ["RANK"] == "5"
    assert "WORLD_SIZE" not in os.environ


def test_alone(bare: pytest.MonkeyPatch) -> None:
    os.environ["SLURM_STEP_ID"] = "0"  # inside a job, but not by srun with an address
    environment()
    assert [os.environ[name] for name in RANKS[:3]] == ["0", "1", "0"]
    assert int(os.environ["MASTER_PORT"]) > 1023
