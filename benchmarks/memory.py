"""What a run on the CPU holds, part by part, beside what `--dry-run` plans.

    python -m benchmarks.memory CONFIG [--set a.b=v ...] [--json FILE]

One rank loads the config's model, makes the engine and trains four micro-batches of the plan's own
utterances. Measured is the growth of the resident set: `parameters` over loading, `gradients` over
the first backward pass (with DeepSpeed's bucket, of which only what is written to is resident),
`optimizer` over making the engine and over the first update, `activations` as the peak of a later
micro-batch over what was held before it. Names: `planned`, `measured`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
from pathlib import Path

import torch

from benchmarks.report import Report
from data.collate import Batch
from train import config as cfg
from train.blueprint import Blueprint
from train.dryrun import counts
from train.engine import (
    Engine,
    World,
    gathered,
    partition,
    partitioned,
    policy,
    stage_of,
    world,
)
from train.footprint import Planned
from train.memory import Plan
from train.model.build import build
from train.model.speech_llm import SpeechLLM
from train.peak import reset_peak, resident_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="A.B=V")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    give_back_memory()
    config = cfg.load(options.config, options.set)
    plan = planned(config)
    found = measured(config)
    report = Report("memory")
    case = f"{options.config.stem}, {config.data.tokens_per_bin} positions"
    for name, parts in (("planned", plan), ("measured", found)):
        for part, size in parts.items():
            report.add(case, name, part, size, "B")
    for part, size in found.items():
        report.add(case, "planned over measured", part, 100 * plan[part] / size, "%")
    print(report.markdown())
    if options.json:
        report.write(options.json)


def give_back_memory() -> None:
    """Every tensor of 64 KB or more is mapped on its own, and unmapped when it goes."""
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD


def planned(config: cfg.Config) -> dict[str, int]:
    model = Planned(config)
    found = counts(Blueprint.of(config.model, config.losses))
    plan = Plan(config, policy(config.train), found, ranks=1)
    held = {part: sum(kinds.values()) for part, kinds in plan.held().items()}
    # Of stage 3's bucket, which stays, what is never written to is not resident.
    bucket = min(plan.buffers()["bucket of gradients"], found.trained * 4) * (plan.stage == 3)
    return {
        "parameters": held["parameters"],
        "gradients and optimizer": held["gradients"] + held["optimizer"] + bucket,
        "activations": model.peak(config.data.tokens_per_bin),
    }


def measured(config: cfg.Config) -> dict[str, int]:
    batch = Planned(config).typical.batch(config.data.tokens_per_bin)
    with world() as here:
        # Twice: what libraries take when they are first used, and keep, is none of ours.
        for _ in range(2):
            found = _life(config, batch, here)
            gc.collect()
    return found


def _life(config: cfg.Config, batch: Batch, here: World) -> dict[str, int]:
    """An engine's, from loading to its second update: growth of the resident set, part by part."""
    start = _held()
    model = _load(config, here.device)
    for p in (*model.encoder.parameters(), *model.parameters()):
        p.data = p.data.clone()  # checkpoints are mapped: they count once they are copied
    loaded = _held()
    engine = Engine(model, config.train, here, accumulation=3)
    for last in (False, False, True):
        _forth_and_back(engine, batch, last)
    engine.step(1e-4)
    _forth_and_back(engine, batch, last=False)
    held = _held()
    resident = resident_bytes()
    reset_peak()
    _forth_and_back(engine, batch, last=False)
    peak = resident_bytes("VmHWM") - resident
    _forth_and_back(engine, batch, last=True)
    engine.step(1e-4)
    engine.close()
    return {
        "parameters": loaded - start,
        "gradients and optimizer": held - loaded,
        "activations": peak,
    }


def _forth_and_back(engine: Engine, batch: Batch, last: bool) -> None:
    engine.backward(engine(batch).sum() / batch.num_labels, last=last)


def _load(config: cfg.Config, device: torch.device) -> SpeechLLM:
    stage = stage_of(config.train)
    return build(
        config.model,
        config.train.precision,
        seed=1,
        device=device,
        partitioned=partitioned(config.train),
        gathered=gathered,
        partition=partition if stage == 3 else None,
        capacity=config.data.tokens_per_bin,
        losses=config.losses,
    )


def _held() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes("RssAnon")


if __name__ == "__main__":
    main()
