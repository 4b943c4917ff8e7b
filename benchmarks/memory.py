"""What a run holds, part by part, beside what `--dry-run` plans: on the CPU or on one GPU.

    python -m benchmarks.memory CONFIG [--set a.b=v ...] [--random FOLDER] [--json FILE]

One rank loads the config's model, makes the engine and trains four micro-batches of the plan's own
utterances. Measured is the growth of what it holds: `parameters` over loading, `gradients` over the
first backward pass, `optimizer` over making the engine and over the first update, `activations` as
the peak of a later micro-batch over what was held before it. Names: `planned`, `measured`.

On the CPU what is held is the resident set: of DeepSpeed's bucket only what is written to. Where
there is a GPU it is the tensors that torch's allocator has given out, so the bucket counts whole:
in stage 3, which keeps it, with the gradients; below, where a backward pass makes it anew, with the
activations.

`--random` first writes checkpoints of the config's architectures, with random weights, into a
folder, and takes these: what a run holds depends on shapes alone.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM

from benchmarks.report import Report
from data.collate import Batch
from train import config as cfg
from train.blueprint import Blueprint, architecture
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
from train.model.build import DTYPES, build
from train.model.speech_llm import SpeechLLM
from train.peak import peak_bytes, reset_peak, resident_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="A.B=V")
    parser.add_argument("--random", metavar="FOLDER", type=Path)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    give_back_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = cfg.load(options.config, options.set)
    if options.random:
        made = random_weights(config, options.random, device)
        config = cfg.load(options.config, [*options.set, *made])
    plan = planned(config, device)
    found = measured(config)
    report = Report("memory")
    case = (
        f"{options.config.stem}, stage {stage_of(config.train)}, "
        f"{config.data.tokens_per_bin} positions, {device}"
    )
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


def random_weights(config: cfg.Config, folder: Path, device: str) -> list[str]:
    """Write an encoder and an LLM into `folder`; returns the overrides that name them."""
    model, dtype = config.model, DTYPES[config.train.precision]
    for part, kind, path in (
        ("encoder", AutoModel, model.encoder.path),
        ("decoder", AutoModelForCausalLM, model.decoder.path),
    ):
        shape = architecture(path, model.trust_remote_code)
        with torch.device(device):
            kind.from_config(shape, dtype=dtype).save_pretrained(
                folder / part, max_shard_size="5GB"
            )
    return [f"model.{part}.path={folder / part}" for part in ("encoder", "decoder")]


def planned(config: cfg.Config, device: str) -> dict[str, int]:
    model = Planned(config)
    found = counts(Blueprint.of(config.model, config.losses))
    plan = Plan(config, policy(config.train), found, ranks=1)
    held = {part: sum(kinds.values()) for part, kinds in plan.held().items()}
    bucket = plan.buffers()["bucket of gradients"]
    if device == "cpu":  # what is never written to is not resident
        bucket = min(bucket, found.trained * 4) * (plan.stage == 3)
    kept = bucket * (plan.stage == 3)
    return {
        "parameters": held["parameters"],
        "gradients and optimizer": held["gradients"] + held["optimizer"] + kept,
        "activations": model.peak(config.data.tokens_per_bin) + bucket - kept,
    }


def measured(config: cfg.Config) -> dict[str, int]:
    batch = Planned(config).typical.batch(config.data.tokens_per_bin)
    with world() as here:
        batch = batch.to(here.device)
        # Twice: what libraries take when they are first used, and keep, is none of ours.
        for _ in range(2):
            found = _life(config, batch, here)
            gc.collect()
    return found


def _life(config: cfg.Config, batch: Batch, here: World) -> dict[str, int]:
    """An engine's, from loading to its second update: growth of what is held, part by part."""
    start = _held(here.device)
    model = _load(config, here.device)
    model.to(here.device)  # what is not partitioned waits on the host for the engine to move it
    if here.device.type == "cpu":
        for p in (*model.encoder.parameters(), *model.parameters()):
            p.data = p.data.clone()  # checkpoints are mapped: they count once they are copied
    loaded = _held(here.device)
    engine = Engine(model, config.train, here, accumulation=3)
    for last in (False, False, True):
        _forth_and_back(engine, batch, last)
    engine.step(1e-4)
    _forth_and_back(engine, batch, last=False)
    held = _held(here.device)
    peak = _peak(lambda: _forth_and_back(engine, batch, last=False), here.device)
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


def _held(device: torch.device) -> int:
    """Bytes of the tensors on a GPU, or of this process's own pages."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes("RssAnon")


def _peak(work: Callable[[], None], device: torch.device) -> int:
    """Bytes that `work` takes at most beyond what is there before."""
    if device.type == "cuda":
        reset_peak(device)
        before = peak_bytes(device)
        work()
        return peak_bytes(device) - before
    before = resident_bytes()
    reset_peak()
    work()
    return resident_bytes("VmHWM") - before


if __name__ == "__main__":
    main()
