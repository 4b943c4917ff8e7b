"""What `--dry-run` plans, against the same model on real tensors and against arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import tiny
from train import config as cfg
from train.dryrun import dry_run, largest
from train.footprint import Live, Planned
from train.memory import Counts, Plan, total
from train.model.build import build

ROOT = Path(__file__).parent.parent.parent
COUNTS = Counts(trained=50_000_000, encoder=100_000_000, decoder=7_000_000_000, table=130_000_000)


def blsp(*changes: str) -> cfg.Config:
    return cfg.load(ROOT / "configs" / "blsp.yaml", list(changes))


def plan(stage: int, ranks: int, *changes: str, **zero: object) -> Plan:
    rules = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 10**7, **zero}}
    return Plan(blsp(*changes), rules, COUNTS, ranks)


def tiny_config(root: Path, kind: str, encoder: str) -> cfg.Config:
    tiny.llm(root / "llm", kind)
    tiny.encoder(root / "encoder", encoder)
    return cfg.load(tiny.write_config(root / "run.yaml", tiny.config(root)))


def test_live_counts_what_is_alive() -> None:
    x = torch.ones(1000)
    with Live() as live:
        y = x * 2
        assert live.now == 4000
        z = y.view(10, 100)
        y += 1
        assert live.now == 4000
        del y, z
        assert live.now == 0
        (x + 1) + (x + 2)
    assert live.peak == 12_000
    assert live.now == 0


@pytest.mark.parametrize(
    ("kind", "encoder"), [("llama", "wav2vec2"), ("bloom", "whisper"), ("gemma2", "wav2vec2")]
)
def test_fake_tensors_take_what_real_ones_take(kind: str, encoder: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, kind, encoder)
    planned = Planned(config)
    batch = planned.typical.batch(600)
    model = build(config.model, "fp32", seed=1, losses=config.losses).train()
    with Live() as live:
        model(batch).sum().backward()
    gradients = sum(p.grad.nbytes for p in model.trained().values() if p.grad is not None)
    assert planned.peak(600) == pytest.approx(live.peak - gradients, rel=0.02)


def test_stages_partition_what_they_should() -> None:
    for stage, ranks, decoder, gradients, optimizer in (
        (0, 8, 14e9, 200e6, 600e6),
        (1, 8, 14e9, 200e6, 75e6),
        (2, 8, 14e9, 25e6, 75e6),
        (3, 8, 14e9 / 8, 25e6, 75e6),
        (3, 1, 14e9, 200e6, 600e6),
    ):
        held = plan(stage, ranks).held()
        assert held["parameters"]["decoder, frozen"] == decoder
        assert held["parameters"]["encoder, frozen"] == 200e6
        assert held["parameters"]["text embeddings"] == 260e6
        assert sum(held["gradients"].values()) == gradients
        assert sum(held["optimizer"].values()) == optimizer
    away = plan(3, 8, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}).held()
    assert total(away) == 200e6 + 260e6
    exchanged = plan(3, 8, "model.decoder.table=exchange").held()
    assert exchanged["parameters"]["text embeddings"] == 0


def test_what_is_moved() -> None:
    weights = 2 * 7_050_000_000 * 2 * 7 / 8
    assert plan(3, 8).moved(2) == {"weights": 2 * weights, "gradients": 2 * 200e6 * 7 / 8}
    assert plan(3, 1).moved(2) == {"weights": 0, "gradients": 0}
    assert plan(2, 8).moved(2) == {"weights": 100e6 * 7 / 8, "gradients": 200e6 * 7 / 8}
    assert plan(0, 8).moved(2) == {"weights": 0, "gradients": 2 * 200e6 * 7 / 8}


@pytest.mark.slow
def test_the_largest_budget_fits_and_a_larger_one_does_not(tmp_path: Path) -> None:
    planned = Planned(tiny_config(tmp_path, "llama", "wav2vec2"))
    room = planned.peak(5000)
    found = largest(planned, room)
    assert planned.peak(found) <= room
    assert planned.peak(found + 512) > room
    assert largest(planned, 1000.0) == 0


@pytest.mark.slow
def test_a_plan_of_eight_gpus(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    dry_run(blsp(), path, ranks=8, gpu_memory=80)
    found = json.loads(path.read_text())
    assert found["ranks"] == 8
    assert found["largest_tokens_per_bin"] > 8192
    # Llama-2-7B: 6.6 G weights beside the table, forward and back through them.
    assert found["flops_per_token"]["decoder"] == pytest.approx(4 * 6.48e9, rel=0.05)
    held = total({part: kinds for part, kinds in found["memory"].items()})
    assert 10e9 < held < 60e9
    assert {"parameters", "gradients", "optimizer", "activations", "communication"} == set(
        found["memory"]
    )
