"""A start that fails on one host ends on all of them, soon, and says who is missing."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.launch import ROOT, environment, free_port
from train.stopping import RESUMABLE


def meet(*ranks: int, size: int = 3, seconds: float = 8.0) -> list[tuple[int, str]]:
    """These ranks of `size` start together; exit status and lines of each."""
    where = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.meeting_alone", str(seconds)], cwd=ROOT, text=True,
            env=environment() | where | {"RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in ranks
    ]  # fmt: skip
    return [(process.wait(timeout=100), process.communicate()[0]) for process in started]


def test_all_come() -> None:
    for status, said in meet(0, 1, 2, seconds=60.0):
        assert status == 0, said
        assert said.endswith("all are there\n"), said


def test_rank_0_says_who_is_missing() -> None:
    (status, said), (other, _) = meet(0, 2)
    assert (status, other) == (RESUMABLE, RESUMABLE), said
    assert f"stopped: rank 1 did not come within 8 s (train.hang_seconds); there are ranks on " \
        f"{os.uname().nodename};" in said  # fmt: skip


def test_without_rank_0() -> None:
    ((status, said),) = meet(1)
    assert status == RESUMABLE
    assert "rank 1 did not reach rank 0 at 127.0.0.1:" in said
