"""Train on two hosts while everything goes wrong: `python -m tests.chaos` (`make chaos`).

A run of two hosts with two ranks each, under `train.supervise`, is hit at moments that the printed
seed decides, with every class of fault at least once. It must end with the uninterrupted run's
weights and moments to the last bit, its ledger, and one run in the tracker without a gap. Needs
root, iproute2, openssh-server and pdsh.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests import hosts as nodes
from tests.chaos.cluster import Run, cluster
from tests.chaos.faults import FAULTS, until
from tests.chaos.verdict import differences

_FIRST = 30
"""Steps before the first fault: a checkpoint is there."""
_SPACE = 12
"""Steps between two faults, at least, and from the last one to the end."""


def schedule(
    dice: random.Random, count: int, steps: int
) -> list[tuple[int, Callable[[Run, random.Random], str]]]:
    """(step, fault), all classes as often as can be, in any order."""
    kinds = [FAULTS[n % len(FAULTS)] for n in range(count)]
    dice.shuffle(kinds)
    least = _FIRST + _SPACE * (count + 1)
    if (free := steps - least) < 0:
        raise ValueError(f"{count} faults want {least} steps or more, not {steps}")
    gaps = sorted(dice.randint(0, free) for _ in range(count))
    moments = [_FIRST + gap + _SPACE * n for n, gap in enumerate(gaps)]
    return list(zip(moments, kinds, strict=True))


def undisturbed(run: Run) -> float:
    """Train to the end; seconds a step, in the middle."""
    run.start()
    times = []
    for step in (run.steps // 4, 3 * run.steps // 4):
        until(lambda step=step: run.step() >= step, run, f"step {step}")  # type: ignore[misc]
        times.append((run.step(), time.monotonic()))
    until(lambda: run.status() is not None, run, "the uninterrupted run ends")
    assert run.status() == 0, run.said()[-4000:]
    (a, began), (b, ended) = times
    return (ended - began) / max(1, b - a)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, help="of faults and moments (default: a new one)")
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args(argv)
    console = Console(soft_wrap=True)
    if reason := nodes.why_not():
        console.print(reason)
        return 2
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    dice = random.Random(seed)
    console.print(f"seed {seed}: {args.faults} faults in {args.steps} steps")
    table = Table("step", "fault", "seconds lost")
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder)) as made:
        quiet, hit = (Run(made, name, args.steps) for name in ("quiet", "hit"))
        pace = undisturbed(quiet)
        console.print(f"uninterrupted: {1000 * pace:.0f} ms a step")
        lost = []
        hit.start()
        for step, fault in schedule(dice, args.faults, args.steps):
            until(lambda step=step: hit.step() >= step and len(hit.ranks()) == 4,  # type: ignore[misc]
                  hit, f"step {step}")  # fmt: skip
            at, began = hit.step(), time.monotonic()
            console.print(f"{time.strftime('%X')} step {at}: {fault.__name__}")
            mark = len(hit.said())
            expected = fault(hit, dice)
            if hit.status() is not None:  # the supervisor's end, too: whoever started it does again
                hit.start()
            goal = max(at, hit.step()) + 1
            _recover(hit, goal)
            seconds = time.monotonic() - began - pace
            said = hit.said()[mark:]
            assert expected in said, f"{fault.__name__}: {expected!r} is not in\n{said[-4000:]}"
            lost.append(seconds)
            table.add_row(str(at), fault.__name__, f"{seconds:.1f}")
        until(lambda: hit.status() is not None, hit, "the run ends")
        assert hit.status() == 0, hit.said()[-4000:]
        console.print(table)
        stalls = _stalls(hit)
        console.print(
            f"lost {sum(lost):.0f} s, {statistics.median(lost):.1f} s for the median fault; "
            f"checkpoint stall {1000 * statistics.mean(stalls):.1f} ms each, "
            f"{sum(stalls) / (args.steps * pace):.2%} of the step time"
        )
        wrong = list(differences(hit, quiet))
    for line in wrong:
        console.print(f"WRONG: {line}")
    if not wrong:
        console.print("weights, moments, ledger and metrics are the uninterrupted run's")
    return bool(wrong)


def _recover(run: Run, goal: int) -> None:
    """Wait for a step that the fault kept from being done, starting the run where it has ended."""

    def there() -> bool:
        if run.status() not in (None, 0):
            run.start()
        return run.step() > goal or run.status() == 0  # done, if it was hit in its last steps

    until(there, run, f"step {goal} after a fault")


def _stalls(run: Run) -> list[float]:
    """Seconds that training waited for each checkpoint."""
    rows = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    found = (row["metrics"].get("perf/checkpoint_stall_ms", 0.0) / 1000 for row in rows)
    return [seconds for seconds in found if seconds]


if __name__ == "__main__":
    sys.exit(main())
