"""`--profile`: a trace of some training steps, and a table of their ten costliest ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from train.progress import console

COSTLIEST = 10


@contextmanager
def profiled(folder: Path, steps: int) -> Iterator[Callable[[], None]]:
    """Profile `steps` steps after two of warming up; call what this gives after every step.

    Writes `trace.json.gz` (for Perfetto or chrome://tracing) and `ops.txt` into `folder`.
    """

    def write(done: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        done.export_chrome_trace(str(folder / "trace.json.gz"))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        averages = done.key_averages(group_by_input_shape=True)
        table = averages.table(sort_by=by, row_limit=COSTLIEST, max_name_column_width=60)
        (folder / "ops.txt").write_text(table + "\n")
        console.print(table, markup=False, highlight=False, soft_wrap=True)
        console.print(f"profile of {steps} steps in {folder}")

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    plan = schedule(wait=1, warmup=1, active=steps, repeat=1)
    with profile(
        activities=activities, schedule=plan, on_trace_ready=write, record_shapes=True
    ) as running:
        yield running.step
