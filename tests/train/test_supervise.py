"""A run that is started again until it is done, or given up."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.archive import drafted
from tests import tiny
from tests.launch import ROOT, command, environment
from train import supervise
from train.cli import guarded
from train.stopping import RESUMABLE
from train.supervise import Supervisor, ended


def supervised(folder: Path, script: str) -> tuple[int, list[str]]:
    """What becomes of a shell script whose working directory is `folder`."""
    said: list[str] = []
    command = ["sh", "-c", f"cd {folder}; n=$(cat n 2>/dev/null || echo 0); {script}"]
    return Supervisor(folder, command, said.append, pause=0.0).run(), said


_NEXT = "n=$((n + 1)); echo $n > n; "  # the number of this start


def test_it_goes_on_until_it_is_done(tmp_path: Path) -> None:
    # Five failures, none of them at the same step three times in a row, then a good end.
    script = _NEXT + "mkdir -p checkpoints/step-0000000$((n / 2)); [ $n -gt 5 ] || kill -9 $$"
    status, said = supervised(tmp_path, script)
    assert status == 0
    assert [line.split(";")[0].split(" after ")[1] for line in said] == [
        "step 0", "step 1", "step 1", "step 2", "step 2",
    ]  # fmt: skip
    assert all("exit status 137" in line for line in said)


def journalled(step: int) -> str:
    """Shell: one more line of metrics, and what a kill leaves of the next."""
    line = json.dumps({"step": step, "at": 1, "metrics": {"train/loss": 1.0}})
    return f"printf '\\n%s\\n%s' '{line}' '{line[:9]}9' >> metrics.jsonl; "


def test_a_run_that_moves_between_two_checkpoints_is_not_given_up(tmp_path: Path) -> None:
    # In the second start nothing is journalled: it does not come to where the first one was.
    script = _NEXT + "mkdir -p checkpoints/step-00000100; case $n in "
    script += f"1) {journalled(130)};; 2) ;; 3) {journalled(170)};; 4) ;; 5) exit 0;; esac; "
    script = script.replace("; ;;", ";;") + "exit 137"
    status, said = supervised(tmp_path, script)
    assert status == 0
    assert [line.split(";")[0].split(" after ")[1] for line in said] == [
        "step 131", "step 131", "step 171", "step 171",
    ]  # fmt: skip


def test_stages_have_folders_of_their_own(tmp_path: Path) -> None:
    script = _NEXT + "mkdir -p ctc ce/checkpoints; case $n in "
    script += "1) mkdir -p ctc/checkpoints/step-00000002;; 2) cd ctc; " + journalled(6)
    script += ";; 3) mkdir ce/checkpoints/step-00000002;; 4) cd ce; " + journalled(3)
    script += ";; *) exit 0;; esac; exit 137"
    status, said = supervised(tmp_path, script.replace("; ;;", ";;"))
    assert status == 0, said
    assert [int(line.split(";")[0].split(" step ")[1]) for line in said] == [2, 7, 9, 11]


def test_three_failures_at_one_step_are_enough(tmp_path: Path) -> None:
    script = _NEXT + "[ $n -gt 1 ] && mkdir -p checkpoints/step-00000004; exit 75"
    status, said = supervised(tmp_path, script)
    assert status == 75
    assert (tmp_path / "n").read_text() == "4\n"
    assert said[-1] == "supervisor: exit status 75 after step 4, 3 times in a row; given up"


def test_what_is_to_be_mended_is_not_tried_again(tmp_path: Path) -> None:
    status, said = supervised(tmp_path, _NEXT + "exit 2")
    assert status == 2
    assert (tmp_path / "n").read_text() == "1\n"
    assert len(said) == 1


@pytest.fixture
def staged(tmp_path: Path) -> list[str]:
    """Arguments of train/main.py for a run of two stages."""
    tree = tiny.config(tmp_path) | {"stages": [{"name": "ctc"}, {"name": "ce"}]}
    path = tiny.write_config(tmp_path / "staged.yaml", tree)
    return [str(path), "--set", "train.lr=0.5", "--profile", "2"]


def test_a_job_is_queued_again_by_the_same_rule(tmp_path: Path, staged: list[str]) -> None:
    said: list[str] = []

    def again(status: int, job: str = "17") -> bool:
        found = ended(status, job, staged, said.append)
        assert found in (0, status)
        return found == 0

    assert [again(75), again(1)] == [True, True]
    for stage in ("ctc", "ce"):  # it moves
        (tmp_path / "run" / stage / "checkpoints/step-00000002").mkdir(parents=True)
        assert [again(137), again(75)] == [True, True]
    assert not again(75)
    assert said[-1] == "supervisor: exit status 75 after step 4, 3 times in a row; given up"
    assert again(75, job="18")  # someone has looked at it
    assert not again(2, job="18")
    assert said[-1] == "supervisor: exit status 2 after step 4; mend it, this is not tried again"


def test_a_job_that_cannot_be_counted_is_not_queued_again(
    tmp_path: Path, staged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    said: list[str] = []
    monkeypatch.setattr(supervise, "write_text", full)
    assert ended(75, "17", staged, said.append) == 75
    assert "run/ctc/failed.json could not be written (No space left on device)" in said[0]
    assert ended(75, "17", [str(tmp_path / "none.yaml")], said.append) == 75
    assert "does not exist" in said[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_is_the_end(tmp_path: Path, number: int) -> None:
    script = f"trap 'echo stopped > {tmp_path}/said; exit 75' TERM INT; touch {tmp_path}/up; "
    script += "while :; do sleep 0.05; done"
    process = subprocess.Popen(
        [sys.executable, "-m", "train.supervise", str(tmp_path), "--", "sh", "-c", script],
        cwd=ROOT,
    )
    wait_for(tmp_path / "up")
    os.kill(process.pid, number)
    assert process.wait(30) == 75
    assert (tmp_path / "said").read_text() == "stopped\n"


_LAUNCHER = """
import os, signal, subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=os.environ | {"RANK": "0"})
def end(number, frame):  # as DeepSpeed's: ask, wait a while, kill
    rank.terminate()
    time.sleep(1)
    rank.kill()
    sys.exit(1)
signal.signal(signal.SIGTERM, end)
sys.exit(rank.wait())
"""
_RANK = """
import signal, sys, time
from pathlib import Path
from train.owner import Owner
def end(number, frame):
    Path({folder!r}, "asked").touch()
    time.sleep(3)
    Path({folder!r}, "written").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, end)
owner = Owner(Path({folder!r}, "ctc"))
Path({folder!r}, "up").touch()
time.sleep(60)
"""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


@pytest.mark.parametrize("patient", [True, False])
def test_rank_0_may_write_for_longer_than_the_launcher_waits(tmp_path: Path, patient: bool) -> None:
    rank = _RANK.format(folder=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-m", "train.supervise", str(tmp_path), "--", sys.executable, "-c",
         _LAUNCHER, rank],
        cwd=ROOT,
    )  # fmt: skip
    wait_for(tmp_path / "up")
    process.terminate()
    wait_for(tmp_path / "asked")
    if not patient:  # as a scheduler or a user that asks once more
        process.terminate()
    assert process.wait(30) == 75
    assert (tmp_path / "written").exists() is patient


@pytest.mark.slow
def test_the_rank_that_knows_why_decides_the_exit_status() -> None:
    done = subprocess.run(
        command("tests/train/leaving_on_ranks.py", ranks=2),
        cwd=ROOT, env=environment(), text=True, timeout=120,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert "error on rank 1: mend this" in done.stdout
    assert done.returncode == 2, done.stdout[-4000:]


def test_a_full_disk_is_mended_and_gone_on_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        with drafted(tmp_path / "owner.json"):
            raise OSError(errno.ENOSPC, "No space left on device")

    assert guarded(full) == RESUMABLE
    said = capsys.readouterr().err
    assert f"stopped: {tmp_path}/owner.json could not be written: No space left on device" in said
    assert "make room" in said

    def broken() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        guarded(broken)
