"""One step of every loss under ZeRO-3, on as many ranks as the launcher says.

    deepspeed tests/train/losses_on_ranks.py ROOT

Writes ROOT/FOUND.pt for each case: the losses' means, and the gradients of what is trained.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from data.collate import Batch, collate, dummy_batch
from tests.train import mix
from train.engine import Engine, World, gathered, partition, partitioned, world
from train.loop import train_step
from train.model.build import build

CASES = {
    "mix": (mix.ALL, "none"),
    # A head that is trained, too, and so gathered in the backward pass as well.
    "full": ({"ce": 1.0, "align": {}}, "full"),
}


def bins(samples: mix.Samples) -> list[list[Batch]]:
    """Two ranks' micro-batches: one has no label, no transcript and no word, one is a dummy, one
    has no clip, and one has some documents without."""
    mixed = collate([samples.written[2], samples.all[0], samples.written[0], samples.all[4]])
    return [
        [samples.pack([0, 1]), dummy_batch(samples.silence), samples.pack_written([0, 1])],
        [collate([samples.nothing_to_say]), samples.pack([2, 3, 4]), mixed],
    ]


def step(here: World, root: Path, case: str) -> None:
    config = mix.config(root, *CASES[case])
    mine = bins(mix.Samples(config))[here.rank]
    model = build(
        config.model, "fp32", seed=3, partitioned=partitioned(config.train), gathered=gathered,
        partition=partition, capacity=4096, losses=config.losses,
    )  # fmt: skip
    engine = Engine(model, config.train, here, len(mine))
    # A learning rate of zero: the weights stay, and Adam's first moment is a tenth of the gradient.
    counts, _ = train_step(engine, here, mine, 0.0, config.losses.weights)
    moments = engine.moments()
    if here.rank == 0:
        gradients = {
            name.removeprefix("exp_avg/"): 10 * moment
            for name, moment in moments.items()
            if name.startswith("exp_avg/")
        }
        torch.save({"means": counts.losses, "gradients": gradients}, root / f"{case}.pt")


def main() -> None:
    with world() as here:
        for case in CASES:
            step(here, Path(sys.argv[-1]), case)


if __name__ == "__main__":
    main()
