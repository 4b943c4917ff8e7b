"""A step that was not finite, once more: which sample it is, and which part of the model.

    python train/replay.py runs/blsp/nonfinite/step-00000012
    deepspeed train/replay.py runs/blsp/nonfinite/step-00000012

Nothing is trained and nothing of the run is touched. The bins are run as they were, with the
weights that the step began with, and the samples of each bad one alone. `--set` changes the run's
settings: `train.precision=fp32`, say, or paths that have moved.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from train import checkpoint as ckpt
from train import config as cfg
from train import nonfinite
from train.cli import guarded, leave
from train.engine import Engine, World, rewritten, world
from train.feed import open_feed
from train.loss import counted, mixed
from train.main import make_model
from train.model.respond import load_trained
from train.progress import console
from train.provenance import recorded_again

if TYPE_CHECKING:
    from data.collate import Batch

_MANY = 1_000_000  # micro-batches: an update would come after so many


@contextmanager
def first_bad(model: nn.Module) -> Iterator[list[str]]:
    """Names of the modules whose output is not finite, in the order in which they ran."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor) and not first.isfinite().all():
                found.append(name)

        return hook

    modules = dict(model.named_modules())
    if (encoder := getattr(model, "encoder", None)) is not None:  # may be hidden from the tree
        modules |= {f"encoder.{name}": m for name, m in encoder.named_modules()}
    handles = [m.register_forward_hook(look(name)) for name, m in modules.items() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class Replay:
    """The step's model, and its losses' weights and counts."""

    def __init__(self, config: cfg.Config, here: World, saved: ckpt.Checkpoint):
        self.here, self.weights = here, config.losses.weights
        self.model = make_model(config, here)
        load_trained(self.model, saved.weights, rewritten)
        self.engine = Engine(self.model, config.train, here, _MANY)

    def run(self, batches: list[Batch], totals: list[float]) -> list[tuple[nonfinite.Bin, str]]:
        """Each of all ranks' batches, with the first module that was not finite. A collective."""
        losses, largest, modules = [], [], []
        for batch in batches:
            with first_bad(self.model) as found:
                sums_K = self.engine(batch.to(self.here.device))
            loss = mixed(sums_K, list(self.weights.values()), totals)
            largest.append(self.engine.backward(loss, last=False))
            losses.append(dict(zip(self.weights, sums_K.tolist(), strict=True)))
            modules.append(found[0] if found else "")
        fault = nonfinite.gather(self.here, batches, losses, largest)
        names = [name for rank in self.here.gather(modules) for name in rank]
        return list(zip(fault.bins, names, strict=True))


def run(folder: Path, overrides: list[str], here: World) -> None:
    saved = ckpt.load(folder)
    state = saved.state
    config = recorded_again(state, overrides, str(folder))
    feed = open_feed(config)
    if feed.digest != state.plan:
        raise ckpt.CheckpointError(
            f"{folder} is of another order of data (plan {state.plan[:12]}, now "
            f"{feed.digest[:12]}): shards, targets, budgets, prompt or seed changed; restore them"
        )
    replay = Replay(config, here, saved)
    batches = next(feed.steps(here, state.epoch, state.epoch_step))
    totals = here.sum(*(sum(counted(b, loss) for b in batches) for loss in replay.weights))
    bins = replay.run(batches, totals)
    bad = sorted({each.bin for each, _ in bins if not each.finite})
    mine = feed.stream.alone(state.epoch, state.epoch_step, bad, rank=here.rank, world=here.size)
    samples = [(each, where) for each, where in replay.run(mine, totals) if each.keys]
    if here.rank == 0:
        report(folder, state, bins, samples)


def report(
    folder: Path,
    state: ckpt.State,
    bins: list[tuple[nonfinite.Bin, str]],
    samples: list[tuple[nonfinite.Bin, str]],
) -> None:
    then = {row["bin"] for row in json.loads((folder / "batch.json").read_text()) if not _ok(row)}
    console.print(
        f"step {state.step} (step {state.epoch_step} of epoch {state.epoch}): "
        f"{len(bins)} bins, not finite then: {sorted(then) or 'their sum alone'}"
    )
    for kind, rows in (("bin", bins), ("sample", samples)):
        for each, where in rows:
            if kind == "bin" or not each.finite:
                name = f"bin {each.bin}" if kind == "bin" else f"sample {each.keys[0]}"
                said = ", ".join(f"{n} loss {v:.6g}" for n, v in each.losses.items())
                first = f", first in {where}" if where else ""
                console.print(f"{name}: {said}, largest gradient {each.gradient:.6g}{first}")
    found = sorted(each.keys[0] for each, _ in samples if not each.finite)
    if found:
        console.print(f"not finite alone: {', '.join(found)}")
    elif any(not each.finite for each, _ in bins):
        console.print("every sample alone is finite: it takes the whole bin")
    else:
        console.print("all is finite this time: look at the machine, or at what differs")


def _ok(row: dict[str, Any]) -> bool:
    return nonfinite.Bin(**row).finite


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="RUN/nonfinite/step-*")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    with world() as here:
        run(args.folder, args.set, here)


if __name__ == "__main__":
    leave(guarded(main))
