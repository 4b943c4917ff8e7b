"""Starts a run again until it is done, or until it fails three times at the same step.

    python -m train.supervise runs/blsp -- deepspeed train/main.py configs/blsp.yaml

What ends with 2 is for the user to mend, and is not tried again. SIGTERM and Ctrl-C are passed on,
and are the end. On Slurm `configs/slurm.sbatch` queues the job again instead.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from train.checkpoint import steps_of
from train.stopping import RESUMABLE

TRIES = 3
_MENDABLE = 2
_PAUSE = 5.0
"""Seconds before it is started again: what was killed may still be letting go of its port."""
_GRACE = 600.0
"""Seconds that ranks may take to end, once asked; whoever asked may kill sooner."""


class Supervisor:
    """Runs `command`, whose run writes its checkpoints to `folder`/checkpoints."""

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
        failed: list[int] = []  # the steps that the newest checkpoints had, failure by failure
        before = {n: signal.signal(n, self._stop) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            while True:
                status = self._once()
                if status == 0 or self._asked is not None:
                    return RESUMABLE if status else 0
                failed.append(max(steps_of(self._folder / "checkpoints"), default=0))
                at = f"exit status {status} after step {failed[-1]}"
                if status == _MENDABLE:
                    self._say(f"supervisor: {at}; mend it, this is not tried again")
                    return status
                if failed[-TRIES:] == failed[-1:] * TRIES:
                    self._say(f"supervisor: {at}, {TRIES} times in a row; given up")
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
        self._asked = number
        self._pass_on(number)

    def _pass_on(self, number: int) -> bool:
        """Signal all that was started; returns whether any of it is still there."""
        try:
            if self._child is not None:
                os.killpg(self._child.pid, number)
        except ProcessLookupError:
            return False
        return self._child is not None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="run.output of the run")
    parser.add_argument("command", nargs="+", help="what starts it, behind --")
    args = parser.parse_args(argv)
    return Supervisor(args.folder, args.command).run()


if __name__ == "__main__":
    sys.exit(main())
