"""Jobs in worker processes, and one progress bar that all of them move."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

J = TypeVar("J")
R = TypeVar("R")

_done: Any = None  # how far all processes are together


def advance(count: int) -> None:
    """Within a job: so much more is done."""
    if _done is not None:
        with _done.get_lock():
            _done.value += count


def run_jobs(
    jobs: Sequence[J],
    work: Callable[[J], R],
    *,
    total: int,
    console: Console,
    workers: int,
    here: bool = False,
    spawn: bool = False,
    start: Callable[..., None] = lambda: None,
    given: tuple[Any, ...] = (),
) -> list[R]:
    """`work(job)` for every job; the results in the jobs' order.

    Args:
        work, start: functions of a module, which other processes find by name.
        total: what the jobs `advance` by, all in all.
        here: work in this process, which has what `start` would set up.
        spawn: new processes rather than copies of this one (CUDA does not survive a fork).
        start: called with `given` in each new process.
    Raises:
        BrokenProcessPool: a process was killed.
    """
    global _done
    context = multiprocessing.get_context("spawn" if spawn else "fork")
    done = context.Value("q", 0)
    with _progress(console) as progress:
        task = progress.add_task("utterances", total=total, rate="")

        def show() -> None:
            rate = f"{done.value / max(progress.tasks[0].elapsed or 0.0, 1e-9):.0f}/s"
            progress.update(task, completed=done.value, rate=rate)

        if here:
            results, _done = [], done
            try:
                for job in jobs:
                    results.append(work(job))
                    show()
            finally:
                _done = None
            return results
        size = max(1, min(workers, len(jobs)))
        with ProcessPoolExecutor(size, context, _start, (done, start, given)) as pool:
            futures = [pool.submit(work, job) for job in jobs]
            running: set[Future[R]] = set(futures)
            try:
                while running:
                    finished, running = wait(running, timeout=0.2)
                    for future in finished:
                        future.result()
                    show()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [future.result() for future in futures]


def _start(done: Any, start: Callable[..., None], given: tuple[Any, ...]) -> None:
    global _done
    _done = done
    torch.set_num_threads(1)  # there is one process per core already
    start(*given)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
    )
