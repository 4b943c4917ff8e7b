"""Three steps under ZeRO-3, with the decoder's layers run again and without, on as many ranks as
the launcher says.

    deepspeed tests/train/recompute_on_ranks.py ROOT CASE...

Writes ROOT/CASE.pt: of `kept` and `again` the losses' means, Adam's moments, how often the first
layer has run in the last step, and for each rank how many numbers each of its collectives gathered.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed.comm
import torch

from tests.train import mix
from tests.train.losses_on_ranks import bins
from train import config as cfg
from train.engine import Engine, World, gathered, partition, partitioned, world
from train.loop import train_step
from train.model.build import build
from train.model.recompute import layers_of

LOSSES = {"ce": 1.0, "kl": {"weight": 0.5}}
CASES: dict[str, dict[str, Any]] = {
    "frozen": {"losses": LOSSES},
    "lora": {"losses": LOSSES, "lora": True},
    "full": {"losses": {"ce": 1.0}, "train": "full"},
}
# Else every weight of a tiny model stays where it has been gathered once.
ZERO = {
    "stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}  # fmt: skip


@contextmanager
def noted(gathers: list[int]) -> Iterator[None]:
    """Inside, how many numbers DeepSpeed's collectives gather is noted."""
    real = deepspeed.comm.comm.all_gather_into_tensor

    def gather(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        gathers.append(output.numel())
        return real(output, *args, **kwargs)

    deepspeed.comm.comm.all_gather_into_tensor = gather
    try:
        yield
    finally:
        deepspeed.comm.comm.all_gather_into_tensor = real


def steps(here: World, config: cfg.Config) -> dict[str, Any]:
    mine = bins(mix.Samples(config))[here.rank]
    model = build(
        config.model, "fp32", seed=3, partitioned=partitioned(config.train), gathered=gathered,
        partition=partition, capacity=4096, losses=config.losses,
    )  # fmt: skip
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in sorted(model.trained().items()):
            if "lora_B" in name:  # begins as zero, which would hide a gradient that is missing
                p.copy_(0.3 * torch.randn_like(p))
    engine = Engine(model, config.train, here, len(mine))
    # The trace of modules is invalid in the first step, recorded in the second, followed then.
    inner, ran = next(layers_of(model.decoder)[0].children()), []
    inner.register_forward_hook(lambda *_: ran.append(1))
    for _ in range(3):
        gathers: list[int] = []
        ran.clear()
        with noted(gathers):
            counts, _ = train_step(engine, here, mine, 0.0, config.losses.weights)
    found = {"means": counts.losses, "moments": engine.moments(), "runs": len(ran)}
    found["gathers"] = here.gather(gathers)
    engine.close()
    return found


def main() -> None:
    at = next(i for i, argument in enumerate(sys.argv) if Path(argument).is_dir())
    root = Path(sys.argv[at])
    with world() as here:
        for name in sys.argv[at + 1 :]:
            made = mix.config(root, **CASES[name]).resolved()
            made["train"]["engine"] = str(root / "zero.json")
            found = {}
            for which, again in (("kept", False), ("again", True)):
                made["model"]["decoder"]["checkpointing"] = again
                found[which] = steps(here, cfg.parse(json.loads(json.dumps(made)), name))
            if here.rank == 0:
                torch.save(found, root / f"{name}.pt")


if __name__ == "__main__":
    main()
