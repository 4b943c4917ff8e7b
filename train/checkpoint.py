"""Checkpoints of what is trained: safetensors, whole tensors, independent of the rank count.

    OUTPUT/checkpoints/step-00000200/
        adapter.safetensors     float32 masters
        optimizer.safetensors   Adam's moments, `moment/name`
        state.json              step, data position, skips, tracker run, config, checksums

A checkpoint is written under another name, synced and renamed, so one that has its name is whole;
its checksums, of the rest of `state.json`, too, are checked when it is read. Frozen weights are not
here: they are rebuilt from the pretrained sources that the config in `state.json` names.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data.parsing import parse_json

_ADAPTER, _OPTIMIZER, _STATE = "adapter.safetensors", "optimizer.safetensors", "state.json"


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class WriteError(OSError):
    """A checkpoint could not be written, for now: the run goes on from the one before."""


@dataclass(frozen=True)
class State:
    """Everything but tensors that a resumed run needs."""

    step: int
    """Global steps done."""
    epoch: int
    epoch_step: int
    """Position in the data: the next step of `epoch` to train."""
    trained: int
    """Samples trained so far, in all epochs."""
    plan: str
    """Digest of what determines the order of the data; a resumed run must have the same."""
    tracker_run: str
    config: dict[str, Any]
    revision: str
    skipped: list[dict[str, str]] = field(default_factory=list)
    """Samples of all epochs so far that were not trained: {epoch, key, reason}, and {step} where
    that is one of `refused`."""
    refused: list[int] = field(default_factory=list)
    """Global steps whose update was not made, for the gradient was not finite."""
    validated: list[dict[str, float]] = field(default_factory=list)
    """Every validation so far: {step, loss}."""
    sources: dict[str, str] = field(default_factory=dict)
    """Which encoder and LLM it was trained on (see `train.provenance`)."""

    @property
    def updates(self) -> int:
        """Updates that the optimizer has made."""
        return self.step - len(self.refused)


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    state: State
    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]


def save(
    folder: Path,
    state: State,
    weights: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    keep: int,
    best: Sequence[int] = (),
) -> Path:
    """Write one checkpoint under `folder`; drop all but the newest `keep` and those of `best`.

    What is newer than this one was damaged when the run went back to before it: it counts for none,
    or it would have the good ones dropped.
    """
    path = folder / name_of(state.step)
    write(path, state, weights, moments)
    kept = {name_of(step) for step in best}
    for old in [p for p in _paths(folder) if p.name <= path.name][:-keep]:
        if old.name not in kept:
            shutil.rmtree(old)
    return path


def name_of(step: int) -> str:
    """The folder of a run's checkpoint after so many steps."""
    return f"step-{step:08d}"


def write(
    path: Path, state: State, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]
) -> None:
    """Write one checkpoint, whole or not at all, in place of what is at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        save_file(weights, partial / _ADAPTER)
        save_file(moments, partial / _OPTIMIZER)
        checksums = {name: _sha256(partial / name) for name in (_ADAPTER, _OPTIMIZER)}
        tree = asdict(state)
        checksums[_STATE] = _digest(tree)
        text = json.dumps(tree | {"checksums": checksums}, indent=1)
        (partial / _STATE).write_text(text + "\n")
        for name in (_ADAPTER, _OPTIMIZER, _STATE, ""):
            _sync(partial / name)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
        raise


def load(path: Path) -> Checkpoint:
    """Read one checkpoint.

    Raises:
        CheckpointError: a file is missing, unreadable, or differs from its checksum.
    """
    try:
        tree = parse_json((path / _STATE).read_bytes())
        checksums = tree.pop("checksums")
        actual = {name: _sha256(path / name) for name in (_ADAPTER, _OPTIMIZER)}
        if _STATE in checksums:  # not in those of before it was stored
            actual[_STATE] = _digest(tree)
        for name, found in actual.items():
            if found != (expected := str(checksums[name])):
                raise CheckpointError(
                    f"checkpoint {path}: {name} has checksum {found[:12]}, expected {expected[:12]}"
                )
        weights, moments = load_file(path / _ADAPTER), load_file(path / _OPTIMIZER)
        state = TypeAdapter(State).validate_python(tree)
        return Checkpoint(path, state, weights, moments)
    except (
        OSError, LookupError, TypeError, ValueError, AttributeError, SafetensorError, MemoryError,
    ) as e:  # fmt: skip
        reason = " ".join(str(e).split())[:300]
        raise CheckpointError(f"checkpoint {path} cannot be read: {reason}") from None


def newest(folder: Path, warn: Any = print) -> Checkpoint | None:
    """The newest whole checkpoint under `folder`; damaged ones are named and passed over."""
    for path in reversed(_paths(folder)):
        try:
            return load(path)
        except CheckpointError as e:
            warn(f"{e}; trying the one before")
    return None


def find(path: Path) -> Checkpoint:
    """The checkpoint that `path` names: one itself, a run's output folder, or its checkpoints.

    Raises:
        CheckpointError: there is none.
    """
    if (path / _STATE).exists():
        return load(path)
    for folder in (path / "checkpoints", path):
        found = newest(folder)
        if found is not None:
            return found
    raise CheckpointError(
        f"no checkpoint in {path}: expected {_STATE} there, or step-* folders in it"
    )


def steps_of(folder: Path) -> list[int]:
    """Steps of the checkpoints under `folder`, whole or not, in order."""
    return [int(path.name.removeprefix("step-")) for path in _paths(folder)]


def _paths(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _digest(tree: dict[str, Any]) -> str:
    """Of what `state.json` says beside its checksums; reading and writing it keep the order."""
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
