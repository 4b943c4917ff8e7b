"""A run has one owner: the start that came last."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.launch import start
from tests.train.conftest import Workspace
from train import owner
from train.owner import Owner
from train.stopping import RESUMABLE


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "_LOOK", 0.0)


def test_an_earlier_start_learns_of_a_later_one(tmp_path: Path) -> None:
    said: list[str] = []
    first = Owner(tmp_path, said.append)
    assert first.taken() is None
    assert not said
    second = Owner(tmp_path, said.append, wait=0.3)  # the first one holds on
    assert first.taken() == second.name
    assert second.taken() is None
    assert "waiting for an earlier start" in said[0]
    assert first.name in said[0]


def test_it_waits_as_long_as_the_earlier_one_lives(tmp_path: Path) -> None:
    left = tmp_path / "left"
    code = (
        "import time; from pathlib import Path; from train.owner import Owner\n"
        f"held = Owner(Path({str(tmp_path)!r})); print('mine', flush=True); time.sleep(2)\n"
        f"Path({str(left)!r}).touch()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"mine\n"
        Owner(tmp_path, lambda text: None, wait=60)
        assert left.exists()


def test_one_that_let_go_or_was_killed_is_not_waited_for(tmp_path: Path) -> None:
    said: list[str] = []
    Owner(tmp_path, said.append).close()
    began = time.monotonic()
    Owner(tmp_path, said.append, wait=60)
    assert not said
    assert time.monotonic() - began < 10


def test_other_ranks_wait_for_their_own_rank_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    took = []

    def waited() -> None:
        began = time.monotonic()
        owner.wait_for_owner(tmp_path, wait=30)
        took.append(time.monotonic() - began)

    waited()  # nobody has ever claimed it
    first = Owner(tmp_path)
    waited()
    assert max(took) < 5
    monkeypatch.setattr(owner, "_START", -1.0)  # so long ago that it is another start's
    rank = threading.Thread(target=waited)
    rank.start()
    rank.join(1.5)
    assert rank.is_alive()
    first.close()
    monkeypatch.setattr(owner, "_START", 60.0)
    Owner(tmp_path)
    rank.join(10)
    assert not rank.is_alive()


def test_a_file_that_is_away_takes_nothing(tmp_path: Path) -> None:
    first = Owner(tmp_path)
    (tmp_path / "owner.json").unlink()
    assert first.taken() is None


def test_who_cannot_claim_it_lets_the_other_ranks_go_on_to_the_meeting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Owner(tmp_path)
    first.close()

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(owner, "write_text", full)
    monkeypatch.setattr(owner, "_START", -1.0)  # the first one's claim is an earlier start's
    with pytest.raises(OSError, match="No space"):
        Owner(tmp_path)
    began = time.monotonic()
    owner.wait_for_owner(tmp_path, wait=30)
    assert time.monotonic() - began < 5


def until_a_checkpoint(folder: Path, log: Path) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/step-*")):
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)


@pytest.mark.slow
def test_ranks_whose_launcher_was_killed_leave_the_run_to_the_next_start(
    workspace: Workspace,
) -> None:
    config = workspace.config(
        "owned", train__schedule="constant", train__checkpoint_every=10, train__steps=100_000
    )
    folder = workspace.root / "owned"
    log = workspace.root / "owned.log"
    launcher = start("train/main.py", config, ranks=2, log=log)
    try:
        until_a_checkpoint(folder, log)
        launcher.kill()  # the launcher alone: its ranks know nothing of it
        launcher.wait()
        last = int(max(folder.glob("checkpoints/step-*")).name.split("-")[1])
        again = workspace.config(
            "owned",
            train__schedule="constant",
            train__checkpoint_every=10,
            train__steps=last + 200,
        )
        second = start("train/main.py", again, ranks=2, log=log.with_suffix(".2"))
        assert second.wait(timeout=240) == 0, log.with_suffix(".2").read_text()[-3000:]
    finally:
        subprocess.run(["pkill", "-9", "-f", str(config)], check=False)
    said = log.read_text()
    assert "was started once more" in said, said[-3000:]
    steps = [step for step, _ in workspace.curve("owned")]
    assert steps == list(range(steps[-1] + 1))


@pytest.mark.slow
def test_sigterm_to_the_one_process_that_has_the_run_ends_all_ranks(workspace: Workspace) -> None:
    config = workspace.config(
        "asked", train__schedule="constant", train__checkpoint_every=5, train__steps=100_000
    )
    folder, log = workspace.root / "asked", workspace.root / "asked.log"
    launcher = start("train/main.py", config, ranks=2, log=log)
    try:
        until_a_checkpoint(folder, log)
        claim = json.loads((folder / "owner.json").read_text())
        os.kill(int(claim["name"].split()[-1]), signal.SIGTERM)
        assert launcher.wait(timeout=120) == RESUMABLE, log.read_text()[-3000:]
    finally:
        subprocess.run(["pkill", "-9", "-f", str(config)], check=False)
    reached = workspace.checkpoint("asked").state.step
    assert log.read_text().count(f"stopped: SIGTERM after {reached} of 100000 steps") == 2
