"""Every ZeRO stage, handed what is not finite on one of two ranks: nothing may change.

deepspeed tests/train/refusals_on_ranks.py ROOT
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import torch

from tests import tiny
from tests.train import mix
from train.engine import Engine, World, gathered, partition, partitioned, stage_of, world
from train.loop import train_step
from train.model.build import build

POLICIES = [
    ("zero0", "fp32"), ("zero1", "bf16"), ("zero2", "fp32"), ("zero3", "fp32"),
    ("zero3_offload", "bf16"),
]  # fmt: skip


def check(here: World, root: Path, policy: str, precision: str) -> None:
    config = mix.config(root, {"ce": 1.0})
    train = config.train.model_copy(
        update={"engine": Path(f"configs/ds/{policy}.json"), "precision": precision}
    )
    samples = mix.Samples(config)
    good = [samples.pack([2 * here.rank]), samples.pack([2 * here.rank + 1])]
    poison = good[1].features * torch.nan if here.rank == here.size - 1 else good[1].features
    bad = [good[0], dataclasses.replace(good[1], features=poison, bin=7, keys=("a", "b"))]
    model = build(
        config.model, precision, seed=3, partitioned=partitioned(train), gathered=gathered,
        partition=partition if stage_of(train) == 3 else None, capacity=4096,
    )  # fmt: skip
    engine = Engine(model, train, here, 2)

    def state() -> dict[str, torch.Tensor]:
        return {f"weight/{n}": w for n, w in engine.weights().items()} | engine.moments()

    def same(one: dict[str, torch.Tensor]) -> bool:  # rank 0 has them all, the others none
        other = state()
        return all(torch.equal(value, other[name]) for name, value in one.items())

    for trained in (False, True):
        before = state()
        assert bool(before) == (here.rank == 0)
        # A loss that is NaN on one rank.
        counts, norm = train_step(engine, here, bad, 0.01, {"ce": 1.0})
        assert not math.isfinite(norm)
        assert counts.fault is not None
        faulty = [each for each in counts.fault.bins if not each.finite]
        assert [(each.rank, each.bin, each.keys) for each in faulty] == [
            (here.size - 1, 7, ("a", "b"))
        ]
        assert same(before), (policy, trained)
        # A loss that is finite, and a gradient too large for float32.
        counts, _ = train_step(engine, here, good, 0.01, {"ce": 3e38})
        assert math.isfinite(counts.loss)
        assert counts.fault is not None
        assert same(before), (policy, trained)
        # A loss that is not finite, and a gradient that would be.
        for batch in good:
            engine.backward(engine(batch).sum() + torch.inf, last=batch is good[1])
        assert not engine.step(0.01)[1]
        assert same(before), (policy, trained)
        # And what is finite is trained on as if nothing had been.
        counts, norm = train_step(engine, here, good, 0.01, {"ce": 1.0})
        assert counts.fault is None
        assert math.isfinite(norm)
        assert same(before) == (here.rank > 0)


def main() -> None:
    root = Path(sys.argv[-1])
    with world() as here:
        if here.rank == 0:
            tiny.encoder(root / "encoder")
            tiny.llm(root / "llm")
        here.barrier()
        for policy, precision in POLICIES:
            check(here, root, policy, precision)
            print(f"{policy} {precision}: refused what is not finite")


if __name__ == "__main__":
    main()
