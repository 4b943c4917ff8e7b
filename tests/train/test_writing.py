"""Checkpoints in the background: what a step waits for, and what becomes of a full disk."""

from __future__ import annotations

import resource
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.launch import launch
from tests.ranks import Solo
from tests.train.conftest import STEPS, Workspace
from tests.train.test_checkpoint import state
from train import checkpoint as ckpt
from train.writing import Checkpoints


class Live:
    """Weights that training goes on changing, on one rank that writes them."""

    def __init__(self, folder: Path):
        self.weights = torch.zeros(5000)
        self.checkpoints = Checkpoints(Solo(), folder, 2, lambda: None)  # type: ignore[arg-type]

    def save(self, step: int, before: threading.Event | None = None) -> None:
        self.weights.fill_(step)
        self.checkpoints.save(
            state(step),
            lambda: ({"w": self.weights.clone()}, {"exp_avg/w": self.weights.clone()}),
            [],
            before.wait if before else lambda: None,
        )


def test_a_step_does_not_wait_for_the_disk_and_one_at_a_time_is_written(tmp_path: Path) -> None:
    live, disk = Live(tmp_path), threading.Event()
    live.save(1, disk)  # returns though nothing can be written
    live.weights.fill_(99)
    assert ckpt.newest(tmp_path) is None
    second = threading.Thread(target=live.save, args=(2,))
    second.start()
    second.join(0.2)
    assert second.is_alive()  # waits for the first
    disk.set()
    second.join()
    live.checkpoints.written()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000001", "step-00000002"]
    for step in (1, 2):
        found = ckpt.load(tmp_path / ckpt.name_of(step))
        assert torch.equal(found.weights["w"], torch.full((5000,), float(step)))


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_cannot_be_written_is_said_once_and_leaves_the_one_before(tmp_path: Path) -> None:
    live = Live(tmp_path)
    live.save(1)
    live.checkpoints.written()
    with files_no_larger_than(8192):
        live.save(2)
        live.checkpoints.writer.wait()
    with pytest.raises(ckpt.WriteError, match=r"step-00000002 could not be written \(.+\)$"):
        live.save(3)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]  # not even in part
    found = ckpt.newest(tmp_path)
    assert found is not None
    assert found.state.step == 1


@pytest.mark.slow
def test_a_full_disk_stops_the_run_resumably(workspace: Workspace, uninterrupted: str) -> None:
    config = workspace.config("full")
    folder = workspace.root / "full" / "checkpoints"
    folder.mkdir(parents=True)
    size = sum(f.stat().st_size for f in workspace.checkpoint(uninterrupted).path.iterdir())
    limit = f"size={int(2.5 * size)}"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", limit, "none", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"NO FILE SYSTEM MAY BE MOUNTED HERE, no full disk is tested: {mounted.stderr}")
    try:
        said = launch("train/main.py", config, ranks=2, fails=True)
        (line,) = [line for line in said.splitlines() if "could not be written" in line]
        assert line.startswith("stopped: checkpoint ")
        assert "Traceback" not in said
        reached = workspace.checkpoint("full").state.step
        assert 0 < reached < STEPS
        subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)
        said = launch("train/main.py", config, ranks=2)
        assert f"from {folder / ckpt.name_of(reached)}" in said
        assert workspace.curve("full") == workspace.curve(uninterrupted)
        one, other = workspace.checkpoint("full"), workspace.checkpoint(uninterrupted)
        for name, weight in one.weights.items():
            assert torch.equal(weight, other.weights[name]), name
    finally:
        # Lazily: tensors that were read from there are maps of its files.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
