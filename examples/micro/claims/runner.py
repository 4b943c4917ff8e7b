"""Jobs, as many side by side as there are slots; what is finished is kept.

A job is some commands in turn. `RUNS/.jobs/NAME.json` says which commands it was and how long they
took; a job whose commands are the same and are done is passed over, one that was interrupted goes
on where its commands themselves can, and one whose commands have changed is made anew.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

PORT = "{port}"
"""In a command: a free one, chosen when it starts."""


@dataclass(frozen=True)
class Job:
    name: str
    commands: tuple[tuple[str, ...], ...]
    makes: Path
    """What it leaves; removed before other commands make it anew."""
    after: tuple[str, ...] = ()
    """Jobs that must be done before."""


class JobFailed(RuntimeError):
    """A command ended with another status than 0."""


class Runner:
    """Args: folder: for stamps and logs; slots: jobs at once."""

    def __init__(self, folder: Path, slots: int):
        self.folder, self.slots = folder, slots
        self.began = time.monotonic()

    def pending(self, jobs: Sequence[Job]) -> list[Job]:
        """Those that are not done, or were done by other commands."""
        return [job for job in jobs if not self._done(job)]

    def run(self, jobs: Sequence[Job]) -> dict[str, float]:
        """Do what is not done yet; returns the seconds of each job, whenever it was done.

        Raises:
            JobFailed: after the jobs beside it have ended.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        waiting = self.pending(jobs)
        done = {job.name for job in jobs} - {job.name for job in waiting}
        if done:
            print(f"{len(done)} of {len(jobs)} jobs are done already", flush=True)
        running: dict[Future[float], Job] = {}
        with ThreadPoolExecutor(self.slots) as pool:
            while waiting or running:
                ready = [job for job in waiting if done.issuperset(job.after)]
                for job in ready[: self.slots - len(running)]:
                    waiting.remove(job)
                    running[pool.submit(self._do, job)] = job
                if not running:
                    raise ValueError(f"jobs wait for jobs that there are not: {waiting[0]}")
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    job = running.pop(future)
                    seconds = future.result()
                    done.add(job.name)
                    self._tell(f"{len(done):>3}/{len(jobs)} {job.name:<24} {seconds:4.0f} s")
        return {job.name: self._stamp(job)["seconds"] for job in jobs}

    def _tell(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        print(f"{minutes:3}:{seconds:02}  {text}", flush=True)

    def _path(self, job: Job) -> Path:
        return self.folder / f"{job.name}.json"

    def _stamp(self, job: Job) -> dict:
        path = self._path(job)
        return json.loads(path.read_text()) if path.exists() else {}

    def _same(self, job: Job) -> bool:
        return self._stamp(job).get("commands") == [list(c) for c in job.commands]

    def _done(self, job: Job) -> bool:
        return self._same(job) and self._stamp(job)["done"] and job.makes.exists()

    def _do(self, job: Job) -> float:
        if not self._same(job):
            remove(job.makes)
        facts = {"commands": job.commands, "done": False}
        self._path(job).write_text(json.dumps(facts))
        began = time.monotonic()
        with self._path(job).with_suffix(".log").open("wb") as log:
            for command in job.commands:
                words = [word.replace(PORT, str(free_port())) for word in command]
                ended = subprocess.run(words, env=environment(), stdout=log, stderr=log)
                if ended.returncode:
                    tail = Path(log.name).read_text(errors="replace").splitlines()[-30:]
                    raise JobFailed("\n".join([*tail, f"{job.name}: {' '.join(words)}"]))
        facts |= {"done": True, "seconds": round(time.monotonic() - began, 1)}
        self._path(job).write_text(json.dumps(facts))
        return float(facts["seconds"])  # type: ignore[arg-type]


def remove(path: Path) -> None:
    """A folder or a file, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def environment() -> dict[str, str]:
    """One thread a job; nothing is looked up outside."""
    found = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    # Where there is no GPU, DeepSpeed otherwise says so once per process.
    return found if shutil.which("nvidia-smi") else found | {"DS_ACCELERATOR": "cpu"}
