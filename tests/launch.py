"""The real launcher, as a user would run it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def command(script: str, *args: str | Path, ranks: int) -> list[str]:
    """`deepspeed` on this machine's CPU with `ranks` processes."""
    launcher = Path(sys.executable).parent / "deepspeed"
    return [
        str(launcher), "--num_accelerators", str(ranks), "--master_port", str(free_port()),
        script, *map(str, args),
    ]  # fmt: skip


def environment() -> dict[str, str]:
    # One thread a rank: bit-exact comparisons hold for one number of threads.
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def launch(
    script: str, *args: str | Path, ranks: int, fails: bool = False, timeout: float = 300
) -> str:
    """Run to the end and return what it printed; `fails` says which end is expected."""
    done = subprocess.run(
        command(script, *args, ranks=ranks),
        cwd=ROOT, env=environment(), text=True, timeout=timeout,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stdout[-6000:]
    return done.stdout


def start(script: str, *args: str | Path, ranks: int, log: Path) -> subprocess.Popen[bytes]:
    """Start in a session of its own, so that all of it can be killed at once."""
    with log.open("wb") as out:
        return subprocess.Popen(
            command(script, *args, ranks=ranks),
            cwd=ROOT, env=environment(), stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def python(*args: str | Path, fails: bool = False, timeout: float = 300) -> str:
    """Run a plain Python command from the checkout's root."""
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=ROOT, env=environment(), text=True, timeout=timeout,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stdout[-6000:]
    return done.stdout


@contextmanager
def start_python(*args: str | Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A plain Python command that goes on until the context ends, as by Ctrl-C."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *map(str, args)],
            cwd=ROOT, env=environment(), stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
