"""The average of a run's best checkpoints, as a checkpoint of its own (BLOOMZMMS averages three).

    python train/average.py runs/blsp runs/blsp/average --best 3
    deepspeed train/evaluate.py configs/blsp.yaml --checkpoint runs/blsp/average

Best by the run's own validation loss. The average has no optimizer state: it is to be evaluated,
exported or begun from (`train.init`), not resumed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from train import checkpoint as ckpt
from train.cli import guarded
from train.progress import console


def average(run: Path, out: Path, count: int) -> list[int]:
    """Write the mean of the weights of `run`'s best `count` checkpoints; returns their steps.

    Raises:
        CheckpointError: the run has no validations, or fewer checkpoints are left.
    """
    state = ckpt.find(run).state
    there = {path.name for path in (run / "checkpoints").iterdir()}
    ranked = sorted(state.validated, key=lambda found: (found["loss"], found["step"]))
    kept = [int(f["step"]) for f in ranked if ckpt.name_of(int(f["step"])) in there]
    if len(kept) < count:
        raise ckpt.CheckpointError(
            f"{run} has {len(kept)} validated checkpoints left of {len(state.validated)}, asked "
            f"for the best {count}; set validation.keep_best and train.keep, or lower --best"
        )
    steps = kept[:count]
    found = [ckpt.load(run / "checkpoints" / ckpt.name_of(step)) for step in steps]
    weights = {
        name: sum((c.weights[name].double() for c in found[1:]), first.double()).div(count).float()
        for name, first in found[0].weights.items()
    }
    ckpt.write(out, found[0].state, weights, {})
    return steps


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run.output of a run with `validation`")
    parser.add_argument("out", type=Path)
    parser.add_argument("--best", type=int, default=3)
    args = parser.parse_args(argv)
    steps = average(args.run, args.out, args.best)
    console.print(f"{args.out} is the average of steps {', '.join(map(str, steps))}")


if __name__ == "__main__":
    sys.exit(guarded(main))
