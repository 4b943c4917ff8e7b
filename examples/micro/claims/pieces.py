"""The jobs: subsets, targets, word times, then every system with every seed, then measuring.

All of it by the project's own commands, as a user would type them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from examples.micro.claims.prepare import TASKS, targets_of
from examples.micro.claims.runner import PORT, Job
from examples.micro.claims.systems import (
    COMMON,
    FEW,
    HELD_OUT,
    MADE,
    RUNS,
    STATES,
    TARGETS,
    WORLD,
    Seeds,
    System,
    run_of,
)

PYTHON = sys.executable
MEASURED = Path(RUNS) / "measured"


def config_of(system: System) -> str:
    return f"configs/micro/{system.config}.yaml"


def overrides(system: System, seed: int) -> dict[str, str]:
    """What is set over the system's recipe."""
    found = COMMON | {
        "run.name": f"{system.name}-{seed}",
        "run.output": run_of(system.name, seed),
        "run.seed": str(seed),
        "data.shards": f"['{system.shards}']",
        "data.targets": f"['{targets_of(system.targets)}/targets-*.tar']",
        "data.states": f"['{STATES[system.shards]}/states-*.tar']",
        "train.steps": str(system.steps),
        "train.checkpoint_every": str(system.steps),
    }
    if system.init:
        found["train.init"] = run_of(system.init, seed)
    if system.inputs:
        found["evaluate"] = evaluation(system.inputs)
    return found | dict(system.settings)


def evaluation(inputs: Sequence[str]) -> str:
    """The `evaluate` section: greedy, all tasks, held-out sentences by held-out voices."""
    return (
        f"{{shards: ['{HELD_OUT}'], tasks: {TASKS}, inputs: [{', '.join(inputs)}], "
        "batch_size: 256, max_new_tokens: 48, states: 60, resamples: 200, samples: 3, pictures: 0}"
    )


def jobs(systems: Sequence[System], seeds: Seeds, ranks: int) -> list[Job]:
    """Everything that there is to do, in an order that works."""
    made = [
        Job("subsets", ((PYTHON, "-m", "examples.micro.claims.prepare", "subsets"),), TASKS),
        *(_targets(name) for name in dict.fromkeys(["heldout", *(s.targets for s in systems)])),
        *(_states(folder) for folder in dict.fromkeys(STATES[s.shards] for s in systems)),
        Job(
            "words",
            ((PYTHON, "-m", "data.align", FEW, f"{MADE}/words", "--model",
              f"{WORLD}/encoder-wav2vec2"),),
            Path(MADE) / "words",
            ("subsets",),
        ),
    ]  # fmt: skip
    # Seed by seed, so that a run that ends early has whole seeds.
    found = [*made]
    for seed in seeds.every:
        found += [_run(system, seed, ranks) for system in systems]
        found += [_bounds(systems[0], seed)] if seed == seeds.every[0] else []
        found.append(_measured(systems, seed))
    for seed in seeds.extra:
        having = [system for system in systems if seed in seeds.of(system.name)]
        found += [_run(system, seed, ranks) for system in having]
        found += [_measured(having, seed)] if having else []
    return found


def _measured(systems: Sequence[System], seed: int) -> Job:
    """One process for all runs of a seed: they share the models."""
    names = tuple(system.name for system in systems)
    command = (PYTHON, "-m", "examples.micro.claims.measure", str(seed), *names)
    after = ("heldout-targets", *(f"{name}-{seed}" for name in names))
    return Job(f"measured-{seed}", (command,), MEASURED / f"{seed}.json", after)


def _states(folder: str) -> Job:
    shards = next(shards for shards, found in STATES.items() if found == folder)
    settings = {"data.shards": f"['{shards}']", "model.encoder": COMMON["model.encoder"]}
    command = (PYTHON, "train/encode.py", "configs/micro/blsp.yaml", folder, *_set(settings))
    return Job(f"{Path(folder).name}-states", (command,), Path(folder), ("subsets",))


def _targets(name: str) -> Job:
    wanted, folder = TARGETS[name], targets_of(name)
    if name == "cut_ended":
        command: tuple[str, ...] = (PYTHON, "-m", "examples.micro.claims.prepare", "ended")
        return Job(f"{name}-targets", (command,), Path(folder), ("cut-targets",))
    settings = {
        "run.experiment": "claims",
        "run.name": f"{name}",
        "data.shards": f"['{wanted.shards}']",
        "behave.tasks": wanted.tasks,
        "behave.output": folder,
    } | dict(wanted.settings)
    command = (PYTHON, "train/behave.py", "configs/micro/blsp.yaml", *_set(settings))
    # One alone first: it makes the tracker's database.
    after = ("subsets",) if name == "heldout" else ("heldout-targets",)
    return Job(f"{name}-targets", (command,), Path(folder), after)


def _run(system: System, seed: int, ranks: int) -> Job:
    """Training through DeepSpeed's launcher, and the evaluation."""
    output = run_of(system.name, seed)
    settings = _set(overrides(system, seed))
    launcher = Path(PYTHON).parent / "deepspeed"
    train = (
        str(launcher), "--num_accelerators", str(ranks), "--master_port", PORT, "--log_level",
        "error", "train/main.py", config_of(system), *settings,
    )  # fmt: skip
    evaluate = (
        PYTHON, "train/evaluate.py", config_of(system), *settings, "--json",
        f"{output}/evaluation.json", "--answers", f"{output}/answers.json",
    )  # fmt: skip
    states = Path(STATES[system.shards]).name
    after = ["subsets", f"{system.targets}-targets", f"{states}-states"]
    after += ["words"] if "data.words" in dict(system.settings) else []
    after += [f"{system.init}-{seed}"] if system.init else []
    commands = (train, evaluate) if system.inputs else (train,)
    return Job(f"{system.name}-{seed}", commands, Path(output), tuple(after))


def _bounds(untrained: System, seed: int) -> Job:
    """Text, cascade and floors, which know no adapter: asked once, beside an untrained one."""
    output = f"{RUNS}/bounds"
    settings = overrides(untrained, seed) | {
        "run.name": "bounds",
        "run.output": output,
        "evaluate": evaluation(("text", "cascade", "none")),
    }
    command = (
        PYTHON, "train/evaluate.py", config_of(untrained), *_set(settings), "--checkpoint",
        run_of(untrained.name, seed), "--json", f"{output}/evaluation.json", "--answers",
        f"{output}/answers.json",
    )  # fmt: skip
    return Job("bounds", (command,), Path(output), (f"{untrained.name}-{seed}",))


def _set(settings: dict[str, str]) -> list[str]:
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
