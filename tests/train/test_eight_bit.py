"""A frozen LLM in 8 bit: nearly the same losses and gradients, trained and resumed exactly."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations import HfDeepSpeedConfig

from tests import tiny
from tests.launch import launch
from tests.train.conftest import Workspace
from tests.train.test_packing import World, gradients
from tests.train.test_runs import same_weights
from train import config as cfg
from train.blueprint import Blueprint
from train.dryrun import counts
from train.engine import ds_config
from train.memory import Plan
from train.model.build import load_decoder


def in_eight_bit(root: Path) -> dict[str, Any]:
    return {"path": str(root / "llm"), "eight_bit": True}


def test_partitioned_weights_are_refused(tmp_path: Path) -> None:
    tiny.llm(tmp_path / "llm")
    config = cfg.parse(tiny.config(tmp_path, model__decoder=in_eight_bit(tmp_path)), "tiny")
    keep = HfDeepSpeedConfig(ds_config(config.train, 1))
    with pytest.raises(cfg.ConfigError, match=r"eight_bit: .*ZeRO-3; take configs/ds/zero2\.json"):
        load_decoder(config.model, torch.float32)
    del keep


def test_the_plan_counts_a_byte_for_a_weight(tmp_path: Path) -> None:
    tiny.encoder(tmp_path / "encoder")
    tiny.llm(tmp_path / "llm")
    sizes = []
    for eight_bit in (False, True):
        decoder = in_eight_bit(tmp_path) | {"eight_bit": eight_bit}
        config = cfg.parse(tiny.config(tmp_path, model__decoder=decoder), "tiny")
        found = counts(Blueprint.of(config.model, config.losses))
        plan = Plan(config, {"zero_optimization": {"stage": 1}}, found, ranks=2)
        sizes.append(plan.held()["parameters"]["decoder, frozen"])
    assert 0 < found.linear < found.decoder - found.table
    assert sizes[0] - sizes[1] == 3 * found.linear


@pytest.mark.slow
@pytest.mark.parametrize("llm", ["llama", "bloom"])
def test_nearly_the_same_gradients(tmp_path: Path, llm: str) -> None:
    found = []
    for eight_bit in (False, True):
        world = World(tmp_path, "wav2vec2", llm, decoder={"eight_bit": eight_bit})
        found.append(gradients(world.model, [world.pack([2, 3, 4])]))
    assert torch.int8 in {p.dtype for p in world.model.decoder.parameters()}
    (loss, exact), (near, close) = found
    assert near != loss
    assert near == pytest.approx(loss, rel=0.02)
    for name, expected in exact.items():
        assert torch.cosine_similarity(close[name].flatten(), expected.flatten(), dim=0) > 0.99


@pytest.mark.slow
def test_a_run_resumes_exactly(workspace: Workspace) -> None:
    config = workspace.config(
        "eight",
        train__checkpoint_every=6,
        train__engine="configs/ds/zero2.json",
        model__decoder=in_eight_bit(workspace.root),
    )
    launch("train/main.py", config, ranks=2)
    losses = [loss for _, loss in workspace.curve("eight")]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    shutil.copytree(workspace.root / "eight", workspace.root / "whole")
    shutil.rmtree(workspace.root / "eight/checkpoints/step-00000012")
    launch("train/main.py", config, ranks=2)
    assert same_weights(workspace, "eight", "whole")
