"""What goes wrong on a cluster, done to a run. Each is a function of the run and its dice.

What it returns is what must be read in the run's log afterwards, or nothing. A fault that ends the
supervisor too (a scheduler's signal, its host's death, what a user must mend) is followed by
another start; all others are the run's own to survive.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from tests.chaos.cluster import Run
from train import checkpoint as ckpt

TRACKER_AWAY = 20.0
SHARDS_SLOW = 10.0
PATIENCE = 240.0
"""Seconds that a fault may take to show."""


def kill_rank(run: Run, dice: random.Random) -> str:
    _a_rank(run, dice).kill()
    return ""


def kill_node(run: Run, dice: random.Random) -> str:
    """All of the run on one host at once; on the first one its supervisor, too."""
    for process in run.node(dice.choice(run.cluster.hosts)):
        _quietly(process.kill)
    return ""


def kill_launcher(run: Run, dice: random.Random) -> str:
    """`deepspeed` itself; its ranks live on, and know nothing of it."""
    launcher, ranks = run.launcher(), run.ranks().values()
    assert launcher is not None
    launcher.kill()
    until(lambda: not any(r.is_running() for r in ranks), run, "its ranks leave the run")
    return ""


def terminate(run: Run, dice: random.Random) -> str:
    """A scheduler's SIGTERM: a checkpoint, and the exit status that says "resume me"."""
    run.supervisor().terminate()
    until(lambda: run.status() is not None, run, "SIGTERM ends the supervisor")
    assert run.status() == 75, run.status()
    return ""


def hang(run: Run, dice: random.Random) -> str:
    """A rank stands still; the watchdog must name it and end the job."""
    rank = dice.choice(sorted(run.ranks()))
    run.ranks()[rank].suspend()
    return f"rank {rank}"


def not_finite(run: Run, dice: random.Random) -> str:
    _tell(run, "nan", dice)
    until(lambda: run.status() is not None, run, "a loss that is no number ends the run")
    assert run.status() == 2, run.status()
    return "is not finite"


def out_of_memory(run: Run, dice: random.Random) -> str:
    _tell(run, "oom", dice)
    until(lambda: run.status() is not None, run, "want of memory ends the run")
    assert run.status() == 2, run.status()
    return "out of memory on rank"


def disk_full(run: Run, dice: random.Random) -> str:
    """No room for the next checkpoint, until the run has said so."""
    before = run.said().count("could not be written")
    ballast = run.cluster.disk / "ballast"
    try:
        with ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
    except OSError:
        pass  # full
    until(lambda: run.said().count("could not be written") > before, run, "a full disk is told of")
    ballast.unlink()
    return "make room"


def tracker_away(run: Run, dice: random.Random) -> str:
    """Training does not notice."""
    began = run.step()
    run.cluster.stop_tracker()
    time.sleep(TRACKER_AWAY)
    assert run.step() > began, "training waits for the tracker"
    run.cluster.start_tracker()
    return "training goes on"


def slow_shards(run: Run, dice: random.Random) -> str:
    """Nothing comes from the shards' server for a while."""
    flag = run.cluster.root / "shards/slow"
    flag.touch()
    time.sleep(SHARDS_SLOW)
    flag.unlink()
    return ""


def damaged_checkpoint(run: Run, dice: random.Random) -> str:
    """The newest checkpoint has other bytes when the run comes back."""
    _a_rank(run, dice).kill()
    until(lambda: not run.ranks(), run, "the others end, too")
    newest = run.folder / "checkpoints" / ckpt.name_of(
        max(ckpt.steps_of(run.folder / "checkpoints"))
    )  # fmt: skip
    path: Path = dice.choice(sorted(newest.glob("*.safetensors")))
    data = bytearray(path.read_bytes())
    data[dice.randrange(len(data) // 2, len(data))] ^= 0x10
    path.write_bytes(bytes(data))
    return newest.name


FAULTS: tuple[Callable[[Run, random.Random], str], ...] = (
    kill_rank, kill_node, kill_launcher, terminate, hang, not_finite, out_of_memory, disk_full,
    tracker_away, slow_shards, damaged_checkpoint,
)  # fmt: skip


def until(true: Callable[[], bool], run: Run, what: str, seconds: float = PATIENCE) -> None:
    """Wait for something that must come."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, (
            f"not within {seconds:g} s: {what}\n{run.said()[-4000:]}"
        )
        time.sleep(0.05)


def _a_rank(run: Run, dice: random.Random) -> psutil.Process:
    return dice.choice([process for _, process in sorted(run.ranks().items())])


def _tell(run: Run, what: str, dice: random.Random) -> None:
    (run.cluster.root / f"{what}-{dice.choice(sorted(run.ranks()))}").touch()


def _quietly(act: Callable[[], object]) -> None:
    with suppress(psutil.NoSuchProcess):
        act()
