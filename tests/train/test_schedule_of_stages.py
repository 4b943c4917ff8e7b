"""Stages of one file: what each is, that one begins where the one before ended, and a kill."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import yaml

from tests import tiny
from tests.launch import ROOT, launch, start
from tests.train.conftest import Workspace
from train import config as cfg

CTC = {"name": "ctc", "losses": {"ce": 0.0, "ctc": {"weight": 0.8}}, "train": {"steps": 4}}
STAGES: list[dict[str, Any]] = [CTC, {"name": "ce"}]


def staged(root: Path, stages: Any = STAGES, **changes: Any) -> Path:
    tree = tiny.config(root, **changes) | {"stages": stages}
    return tiny.write_config(root / "staged.yaml", tree)


def test_each_stage_is_the_file_with_its_changes(tmp_path: Path) -> None:
    first, second = cfg.load_stages(staged(tmp_path, train__steps=9))
    assert (first.losses.weights, first.train.steps) == ({"ctc": 0.8}, 4)
    assert (second.losses.weights, second.train.steps) == ({"ce": 1.0}, 9)
    assert (first.run.name, second.run.name) == ("tiny-ctc", "tiny-ce")
    assert second.run.output == tmp_path / "run" / "ce"
    assert first.train.init is None
    assert second.train.init == first.run.output == tmp_path / "run" / "ctc"
    assert first.data == second.data
    assert cfg.load(tmp_path / "staged.yaml") == second


def test_overrides_go_to_all_stages_or_to_one(tmp_path: Path) -> None:
    path = staged(tmp_path)
    given = ["train.lr=0.5", "train.steps=2", "stages.ce.train.init=elsewhere"]
    first, second = cfg.load_stages(path, [*given, "stages.ctc.losses.ctc.weight=2"])
    assert (first.train.lr, first.train.steps) == (second.train.lr, second.train.steps) == (0.5, 2)
    assert (first.train.init, second.train.init) == (None, Path("elsewhere"))
    assert first.losses.weights == {"ctc": 2.0}
    with pytest.raises(cfg.ConfigError, match="no stage 'tcc'; there are ctc, ce"):
        cfg.load_stages(path, ["stages.tcc.train.steps=2"])
    begun = cfg.load_stages(path, ["train.init=before"])
    assert begun[0].train.init == Path("before")
    assert begun[1].train.init == tmp_path / "run" / "ctc"


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([CTC | {"losses": {"cct": {}}}], r"stage ctc: unknown key 'losses.cct'; did you mean"),
        ([{"name": "a/b"}], "a stage must be a mapping with a `name` of its own, of letters"),
        ([CTC, CTC], "a stage must be a mapping with a `name` of its own"),
        ([CTC, 3], "a stage must be a mapping with a `name`.*found 3"),
        ([{"losses": {}}], "a stage must be a mapping with a `name`"),
        ({"ctc": {}}, "stages must be a list of changes"),
        ([], "stages must be a list of changes"),
    ],
)
def test_what_is_wrong_is_named_with_its_stage(tmp_path: Path, stages: Any, said: str) -> None:
    with pytest.raises(cfg.ConfigError, match=said):
        cfg.load_stages(staged(tmp_path, stages))


def test_the_shipped_schedule_is_its_stages_apart() -> None:
    """configs/bloomzmms.yaml says again what two other files say."""
    for folder in ("configs", "configs/micro"):
        together = cfg.load_stages(ROOT / folder / "bloomzmms.yaml")
        apart = [cfg.load(ROOT / folder / f"bloomzmms_{name}.yaml") for name in ("ctc", "tmi")]
        for one, other in zip(together, apart, strict=True):
            assert (one.model, one.losses, one.prompt) == (other.model, other.losses, other.prompt)
            same = {"targets": one.data.targets}
            assert one.data == other.data.model_copy(update=same)
            init = {"init": one.train.init}
            assert one.train == other.train.model_copy(update=init)
        assert together[1].behave.tasks == apart[1].behave.tasks
        assert together[1].evaluate == apart[1].evaluate


@pytest.mark.slow
def test_killed_in_the_second_stage_it_goes_on_there(workspace: Workspace) -> None:
    tree = yaml.safe_load(workspace.config("staged", train__checkpoint_every=2).read_text())
    # The schedule is a function of `train.steps`; a constant one lets a run be cut short.
    tree["train"]["schedule"] = "constant"
    # The second stage leaves the weights as the first one left them, so that it can be seen.
    stages = [CTC, {"name": "ce", "train": {"lr": 1e-12}}]
    path = tiny.write_config(workspace.root / "staged.yaml", tree | {"stages": stages})
    log = workspace.root / "staged.log"
    process = start("train/main.py", path, "--set", "stages.ce.train.steps=4000", ranks=2, log=log)
    first, second = (workspace.root / "staged" / name / "checkpoints" for name in ("ctc", "ce"))
    deadline = time.monotonic() + 240
    while not list(second.glob("step-*")):
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {p: p.stat().st_mtime_ns for p in first.rglob("*") if p.is_file()}
    reached = max(int(p.name[5:]) for p in second.glob("step-*"))
    steps = reached + 2
    said = launch("train/main.py", path, "--set", f"stages.ce.train.steps={steps}", ranks=2)
    said = " ".join(said.split())  # the terminal's lines are short
    assert "has all 4 steps; nothing to do" in said
    assert "from the start" not in said
    assert done == {p: p.stat().st_mtime_ns for p in first.rglob("*") if p.is_file()}
    begun, ended = workspace.checkpoint("staged/ctc"), workspace.checkpoint("staged/ce")
    assert (begun.state.step, ended.state.step) == (4, steps)
    assert begun.weights.keys() - ended.weights.keys() == {"ctc.blank"}
    for name, weight in ended.weights.items():
        torch.testing.assert_close(weight, begun.weights[name], rtol=0, atol=1e-7)
    # Two runs in the tracker, the second below the first, and every step of it once.
    client = mlflow.MlflowClient(f"sqlite:///{workspace.root / 'staged'}.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"staged-ctc", "staged-ce"}
    below, above = runs["staged-ce"], runs["staged-ctc"]
    assert below.data.tags["mlflow.parentRunId"] == above.info.run_id
    assert below.data.tags["hearken.begun_from"] == above.info.run_id
    assert "hearken.begun_from" not in above.data.tags
    history = client.get_metric_history(below.info.run_id, "train/loss")
    assert [m.step for m in sorted(history, key=lambda m: m.step)] == list(range(steps))
