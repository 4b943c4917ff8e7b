"""A run that is started again until it is done, or given up."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.archive import drafted
from tests.launch import ROOT, command, environment
from train.cli import guarded
from train.stopping import RESUMABLE
from train.supervise import Supervisor


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_is_the_end(tmp_path: Path, number: int) -> None:
    script = f"trap 'echo stopped > {tmp_path}/said; exit 75' TERM INT; touch {tmp_path}/up; "
    script += "while :; do sleep 0.05; done"
    process = subprocess.Popen(
        [sys.executable, "-m", "train.supervise", str(tmp_path), "--", "sh", "-c", script],
        cwd=ROOT,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, number)
    assert process.wait(30) == 75
    assert (tmp_path / "said").read_text() == "stopped\n"


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
