"""Starts a run again until it is done, or until it fails three times at the same step.

    python -m train.supervise runs/blsp -- deepspeed train/main.py configs/blsp.yaml
    python -m train.supervise --ended 75 --job 17 -- configs/blsp.yaml

The step is the furthest that the run has ever trained, in all its stages: one that moves is not
given up. What ends with 2 is for the user to mend, and is not tried again. SIGTERM and Ctrl-C are
passed on, and are the end: to rank 0, where it is on this host, for the launcher would kill it 30 s
later, whatever it is writing.

The second form starts nothing. `configs/slurm.sbatch` asks it whether to queue the job again, of
the run that these arguments of train/main.py mean: by the same rule, over all starts of that job.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from data.convert import write_text
from train import config as cfg
from train.checkpoint import steps_of
from train.cli import arguments
from train.stopping import RESUMABLE

TRIES = 3
_MENDABLE = 2
_PAUSE = 5.0
"""Seconds before it is started again: what was killed may still be letting go of its port."""
_GRACE = 600.0
"""Seconds that ranks may take to end, once asked; whoever asked may kill sooner."""


_TAIL = 1 << 20
"""Bytes of a journal that are read; no line is nearly as long."""


def steps_trained(folders: Iterable[Path]) -> int:
    """The steps that were ever trained, of all runs in `folders` together.

    By their checkpoints, and by their metrics, which are written step by step: a run that is lost
    three times between two checkpoints has moved all the same.
    """
    return sum(
        max(steps_of(folder / "checkpoints")[-1:] + _journalled(folder / "metrics.jsonl"))
        for folder in folders
    )


def _journalled(path: Path) -> list[int]:
    """Steps that a journal of metrics has; what a kill left of a line is passed over."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            found = re.findall(rb'^\{"step": (\d+),.*\}$', file.read(), re.MULTILINE)
    except OSError:
        return [0]
    return [int(found[-1]) + 1 if found else 0]


def _ask_rank_0(folders: Iterable[Path]) -> bool:
    """SIGTERM to the process that has written itself down as the run's; whether it is on this host.

    All ranks stop after the same step, so one of them is enough.
    """
    for folder in folders:
        with suppress(OSError, ValueError, LookupError, TypeError, psutil.Error):
            claim = json.loads((folder / "owner.json").read_text())
            host, _, number = claim["name"].partition(", process ")
            process = psutil.Process(int(number))
            # Not one of later, nor of another container, that has the number now.
            same = process.create_time() < claim["at"] and host == socket.gethostname()
            if same and process.environ().get("RANK") == "0":
                process.terminate()
                return True
    return False


def verdict(status: int, failed: Sequence[int]) -> str | None:
    """Why a run that has ended so is not started again, as a message ends; None where it is.

    Args:
        failed: what `steps_trained` was, failure by failure, this one included.
    """
    if status == _MENDABLE:
        return "; mend it, this is not tried again"
    if list(failed[-TRIES:]) == list(failed[-1:]) * TRIES:
        return f", {TRIES} times in a row; given up"
    return None


class Supervisor:
    """Runs `command`, whose run writes to `folder`, or its stages to folders below it."""

    def __init__(
        self,
        folder: Path,
        command: Sequence[str],
        say: Callable[[str], object] = print,
        pause: float = _PAUSE,
    ):
        self._folder, self._command, self._say, self._pause = folder, list(command), say, pause
        self._child: subprocess.Popen[bytes] | None = None
        self._asked: int | None = None

    def run(self) -> int:
        """Until it is done, asked to stop, or given up; returns the last exit status."""
        failed: list[int] = []
        before = {n: signal.signal(n, self._stop) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            while True:
                status = self._once()
                if status == 0 or self._asked is not None:
                    return RESUMABLE if status else 0
                failed.append(steps_trained(self._folders()))
                at = f"exit status {status} after step {failed[-1]}"
                if end := verdict(status, failed):
                    self._say(f"supervisor: {at}{end}")
                    return status
                self._say(f"supervisor: {at}; starting it again")
                time.sleep(self._pause)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _once(self) -> int:
        # A session of its own, so that nothing of it is left when it has ended.
        self._child = subprocess.Popen(self._command, start_new_session=True)
        if self._asked is not None:  # between two starts
            self._pass_on(self._asked)
        status = self._child.wait()
        # The launcher dies of a signal at once, its ranks are writing a checkpoint.
        deadline = time.monotonic() + _GRACE
        while self._asked is not None and self._pass_on(0) and time.monotonic() < deadline:
            time.sleep(0.1)
        self._pass_on(signal.SIGKILL)
        return 128 - status if status < 0 else status

    def _stop(self, number: int, frame: FrameType | None) -> None:
        first, self._asked = self._asked is None, number
        # Asked again, it shall be sooner.
        if not (first and _ask_rank_0(self._folders())):
            self._pass_on(number)

    def _folders(self) -> list[Path]:
        """Of the run, and of its stages; other folders have nothing that is looked for."""
        return [self._folder, *self._folder.glob("*/")]

    def _pass_on(self, number: int) -> bool:
        """Signal all that was started; returns whether any of it is still there."""
        try:
            if self._child is not None:
                os.killpg(self._child.pid, number)
        except ProcessLookupError:
            return False
        return self._child is not None


def ended(status: int, job: str, rest: Sequence[str], say: Callable[[str], object] = print) -> int:
    """Whether a job is queued again that has ended so: 0, or the status that it is to end with.

    Args:
        rest: arguments of `train/main.py`, for its config.
    """
    args, _ = arguments("").parse_known_args(rest)
    try:
        folders = [config.run.output for config in cfg.load_stages(args.config, args.set)]
    except cfg.ConfigError as error:
        say(f"supervisor: exit status {status}, not queued again: {error}")
        return status
    path = folders[0] / "failed.json"
    failed = [*_failed(path, job), steps_trained(folders)]
    at = f"exit status {status} after step {failed[-1]}"
    end = verdict(status, failed)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"job": job, "steps": failed}) + "\n")
    except OSError as error:  # queued again uncounted, it might be so for ever
        end = end or f"; not queued again, for {path} could not be written ({error.strerror})"
    say(f"supervisor: {at}{end}" if end else f"supervisor: {at}; queueing it again")
    return status if end else 0


def _failed(path: Path, job: str) -> list[int]:
    """What `steps_trained` was at the failures of this job so far; another job's do not count."""
    with suppress(OSError, ValueError, LookupError, TypeError):  # none yet, or not ours
        known = json.loads(path.read_text())
        if known["job"] == job:
            return [int(step) for step in known["steps"]]
    return []


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ended", type=int, metavar="STATUS", help="of a Slurm job's start")
    parser.add_argument("--job", default="", help="with --ended: its number, whose starts count")
    parser.add_argument("folder", help="run.output of the run; with --ended, its config")
    parser.add_argument("command", nargs="*", help="what starts it, behind --")
    args = parser.parse_args(argv)
    if args.ended is not None:
        return ended(args.ended, args.job, [args.folder, *args.command])
    if not args.command:
        parser.error("what starts the run must stand behind --")
    return Supervisor(Path(args.folder), args.command).run()


if __name__ == "__main__":
    sys.exit(main())
