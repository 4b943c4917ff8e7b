"""Real runs through the real launcher: ranks, kills, resumes, the tracker."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import time
from typing import Any

import pytest
import torch

from tests import tiny
from tests.launch import launch, python, start
from tests.train.conftest import STEPS, Workspace
from train import config as cfg
from train.blueprint import Blueprint
from train.feed import open_feed
from train.flops import Flops, sum_work
from train.model.build import load_decoder


def kill_at(workspace: Workspace, name: str, ranks: int, seed: int, after: int) -> None:
    """SIGKILL the whole run at a random moment after checkpoint number `after` appeared."""
    config = workspace.config(name)
    log = workspace.root / f"{name}.log"
    process = start("train/main.py", config, ranks=ranks, log=log)
    folder = workspace.root / name / "checkpoints"
    deadline = time.monotonic() + 240
    while not any(int(p.name[5:]) >= after for p in folder.glob("step-*")):
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.01)
    # Somewhere within the next steps, between checkpoints as likely as at one.
    time.sleep(random.Random(seed).uniform(0, 0.4))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not any(int(p.name[5:]) == STEPS for p in folder.glob("step-*")), "killed too late"


def same_weights(workspace: Workspace, one: str, other: str) -> bool:
    a, b = workspace.checkpoint(one), workspace.checkpoint(other)
    assert a.weights.keys() == b.weights.keys()
    return all(
        torch.equal(x[name], y[name])
        for x, y in ((a.weights, b.weights), (a.moments, b.moments))
        for name in x
    )


def test_every_step_is_tracked_once(workspace: Workspace, uninterrupted: str) -> None:
    assert [step for step, _ in workspace.curve(uninterrupted)] == list(range(STEPS))
    assert workspace.checkpoint(uninterrupted).state.step == STEPS


def test_the_operations_of_a_step_are_those_of_its_batches(
    workspace: Workspace, uninterrupted: str
) -> None:
    """What two ranks log, against what one would count of the same step."""
    config = cfg.load(workspace.root / f"{uninterrupted}.yaml")
    parts = Blueprint.of(config.model, config.losses)
    flops = Flops(parts.encoder, parts.adapter, parts.decoder)
    batches = next(iter(open_feed(config).stream.steps(0, 0)))
    works = [work for b in batches for work in flops.of(flops.useful(b)).values()]

    def first(metric: str) -> float:
        return workspace.curve(uninterrupted, f"perf/{metric}")[0][1]

    done = 1e12 * first("teraflops_per_second") * first("step_seconds")
    assert done == pytest.approx(sum_work(works).total, rel=1e-6)
    assert 0 < first("mfu") < 1
    assert 0.1 < first("peak_memory_gb") < 10
    shares = workspace.curve(uninterrupted, "perf/communication_share")
    assert [step for step, _ in shares] == [4, 9]
    assert all(0 < share < 1 for _, share in shares)


def test_training_lowers_the_loss(workspace: Workspace, uninterrupted: str) -> None:
    losses = [loss for _, loss in workspace.curve(uninterrupted)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_killed_and_resumed_is_the_uninterrupted_run(
    workspace: Workspace, uninterrupted: str
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    kill_at(workspace, "killed", 2, seed, after=4)
    said = launch("train/main.py", workspace.config("killed"), ranks=2)
    assert "from the start" not in said
    assert workspace.curve("killed") == workspace.curve(uninterrupted)
    assert same_weights(workspace, "killed", uninterrupted)


@pytest.mark.slow
def test_killed_before_any_checkpoint_starts_again_in_the_same_tracker_run(
    workspace: Workspace, uninterrupted: str
) -> None:
    config = workspace.config("early", train__checkpoint_every=STEPS)
    log = workspace.root / "early.log"
    process = start("train/main.py", config, ranks=2, log=log)
    # The run is in the tracker, its first steps may be, a checkpoint is not.
    while not (workspace.root / "early" / "tracker.json").exists():
        assert process.poll() is None, log.read_text()[-4000:]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    launch("train/main.py", config, ranks=2)
    assert workspace.curve("early") == workspace.curve(uninterrupted)


def test_sigterm_leaves_a_checkpoint_of_the_last_step(workspace: Workspace) -> None:
    config = workspace.config("term", train__checkpoint_every=5, train__schedule="constant")
    log = workspace.root / "term.log"
    process = start("train/main.py", config, "--set", "train.steps=4000", ranks=2, log=log)
    while not list((workspace.root / "term" / "checkpoints").glob("step-*")):
        assert process.poll() is None, log.read_text()[-4000:]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)  # as schedulers do it; the ranks end by themselves
    deadline = time.monotonic() + 60
    while log.read_text().count("stopped: SIGTERM after") < 2:
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.05)
    reached = workspace.checkpoint("term").state.step
    assert f"stopped: SIGTERM after {reached} of 4000 steps" in log.read_text()
    launch("train/main.py", config, "--set", f"train.steps={reached + 2}", ranks=1)
    assert [step for step, _ in workspace.curve("term")] == list(range(reached + 2))


@pytest.mark.gpu
def test_cut_and_resumed_on_a_gpu(workspace: Workspace) -> None:
    """Where the optimizer's state has to lie on the device, as no test on the CPU can see."""
    constant = ("--set", "train.schedule=constant")
    launch("train/main.py", workspace.config("gpu-whole"), *constant, ranks=1)
    cut = workspace.config("gpu-cut")
    launch("train/main.py", cut, *constant, "--set", f"train.steps={STEPS // 2}", ranks=1)
    launch("train/main.py", cut, *constant, ranks=1)
    assert [step for step, _ in workspace.curve("gpu-cut")] == list(range(STEPS))
    for (step, found), (_, whole) in zip(
        workspace.curve("gpu-cut"), workspace.curve("gpu-whole"), strict=True
    ):
        assert found == pytest.approx(whole, rel=1e-4), step


@pytest.mark.gpu
def test_the_llm_is_loaded_to_the_device_alone(workspace: Workspace) -> None:
    config = cfg.load(workspace.config("device"))
    decoder = load_decoder(config.model, torch.bfloat16, "cuda")
    assert {t.device.type for t in (*decoder.parameters(), *decoder.buffers())} == {"cuda"}


@pytest.fixture(scope="module")
def one_rank(workspace: Workspace) -> str:
    launch("train/main.py", workspace.config("one"), ranks=1)
    return "one"


def test_two_ranks_equal_one(workspace: Workspace, uninterrupted: str, one_rank: str) -> None:
    # The same bins in another order of summation: float32 rounding of sums of some thousand
    # terms, growing as Adam feeds it back over the steps.
    for metric, first, later in (("train/loss", 2e-6, 2e-4), ("train/grad_norm", 2e-5, 2e-3)):
        pairs = zip(
            workspace.curve(uninterrupted, metric), workspace.curve(one_rank, metric), strict=True
        )
        for (step, two), (_, one) in pairs:
            assert two == pytest.approx(one, rel=later if step else first), (metric, step)
    labels = [workspace.curve(name, "data/label_tokens") for name in (uninterrupted, one_rank)]
    assert labels[0] == labels[1]


def test_first_gradient_is_the_same_on_one_two_and_three_ranks(workspace: Workspace) -> None:
    # After one step Adam's first moment is a tenth of the gradient, whole; clipping is out of the
    # way, since it would hide a wrong scale. Four bins on three ranks leave two with a dummy.
    found = {}
    for ranks in (1, 2, 3):
        name = f"first-{ranks}"
        config = workspace.config(name, train__checkpoint_every=1, train__clip=1e9)
        launch("train/main.py", config, "--set", "train.steps=1", ranks=ranks)
        found[ranks] = workspace.checkpoint(name).moments
    for ranks in (2, 3):
        for name, one in found[1].items():
            if name.startswith("exp_avg/"):
                # An element is a sum of some thousand terms that may cancel; each is rounded at
                # the scale of the tensor's largest, not at the element's own.
                atol = 1e-5 * one.abs().max().item()
                torch.testing.assert_close(found[ranks][name], one, rtol=1e-4, atol=atol)


def test_changed_data_order_is_refused(workspace: Workspace, uninterrupted: str) -> None:
    config = workspace.root / f"{uninterrupted}.yaml"
    said = launch(
        "train/main.py", config, "--set", "run.seed=9", "--set", f"train.steps={STEPS + 2}",
        ranks=1, fails=True,
    )  # fmt: skip
    assert "was trained on another order of data" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_bfloat16_resumes_exactly_too(workspace: Workspace) -> None:
    bf16 = {"train__precision": "bf16", "train__checkpoint_every": 2}
    parts = workspace.config("half-parts", **bf16)
    # The schedule is a function of `train.steps`; a constant one lets a run be cut short.
    flat = ["--set", "train.schedule=constant"]
    launch("train/main.py", parts, *flat, "--set", "train.steps=2", ranks=2)
    launch("train/main.py", parts, *flat, "--set", "train.steps=4", ranks=2)
    whole = workspace.config("half-whole", **bf16)
    launch("train/main.py", whole, *flat, "--set", "train.steps=4", ranks=2)
    assert same_weights(workspace, "half-whole", "half-parts")
    assert workspace.curve("half-whole") == workspace.curve("half-parts")


def test_whisper_and_bloom_train_too(workspace: Workspace) -> None:
    encoder = tiny.encoder(workspace.root / "whisper", "whisper")
    llm = tiny.llm(workspace.root / "bloom", "bloom")
    config = workspace.config("others", train__precision="bf16")
    launch(
        "train/main.py", config, "--set", f"model.encoder.path={encoder}",
        "--set", f"model.decoder.path={llm}", "--set", "model.encoder.sharded=true",
        "--set", "train.steps=6", ranks=2,
    )  # fmt: skip
    losses = [loss for _, loss in workspace.curve("others")]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_exchanged_text_rows_are_the_whole_table(workspace: Workspace, uninterrupted: str) -> None:
    config = workspace.config("exchange")
    launch("train/main.py", config, "--set", "model.decoder.table=exchange", ranks=2)
    assert workspace.curve("exchange") == workspace.curve(uninterrupted)


def profile_of(workspace: Workspace, ops: str) -> list[dict[str, Any]]:
    """Ops of two ZeRO-3 steps, as the profiler saw them."""
    config = workspace.config(f"profiled-{ops}")
    launch(
        "train/main.py", config, "--profile", "2", "--set", f"model.ops={ops}",
        "--set", "train.steps=4", ranks=2,
    )  # fmt: skip
    folder = workspace.root / f"profiled-{ops}" / "profile"
    assert "Self CPU" in (folder / "ops.txt").read_text()
    with gzip.open(folder / "trace.json.gz") as trace:
        return [e for e in json.load(trace)["traceEvents"] if e.get("cat") == "cpu_op"]


@pytest.mark.slow
def test_a_step_runs_the_fused_ops_and_none_of_the_padded_path(
    workspace: Workspace, uninterrupted: str
) -> None:
    weights = workspace.checkpoint(uninterrupted).weights
    kernels = [w.shape for name, w in weights.items() if "convs" in name and w.dim() == 3]

    def padded(events: list[dict[str, Any]]) -> list[str]:
        """Dense convolutions with the adapter's kernels, and rows placed by masks."""
        dense = [[out, channels, taps] for out, taps, channels in kernels]

        def is_padded(event: dict[str, Any]) -> bool:
            name, dims = event["name"], event["args"].get("Input Dims", [])
            whole_rows = name == "aten::where" and dims[0][1:] == [1]
            convolved = "convolution" in name and len(dims) > 1 and dims[1] in dense
            return name == "aten::masked_scatter" or whole_rows or convolved

        return [event["name"] for event in events if is_padded(event)]

    fused, reference = profile_of(workspace, "fused"), profile_of(workspace, "reference")
    names = {e["name"] for e in fused}
    for op in ("ragged_conv1d", "pack_embeddings"):
        assert {f"hearken::{op}", f"hearken::{op}_backward"} <= names
    assert padded(fused) == []
    assert padded(reference)  # the test can see what it forbids
    assert not any(e["name"].startswith("hearken::") for e in reference)


def test_dry_run_counts_what_a_run_trains(workspace: Workspace, uninterrupted: str) -> None:
    path = workspace.root / "dry.json"
    config = workspace.root / f"{uninterrupted}.yaml"
    said = python("train/main.py", config, "--dry-run", "--json", path)
    found = json.loads(path.read_text())
    weights = workspace.checkpoint(uninterrupted).weights
    assert sum(found["parameters"]["trained"].values()) == sum(w.numel() for w in weights.values())
    assert "layer norm" in said
    assert found["config"]["train"]["steps"] == STEPS


def test_an_unknown_key_stops_every_rank_with_a_line(
    workspace: Workspace, uninterrupted: str
) -> None:
    config = workspace.root / f"{uninterrupted}.yaml"
    said = launch("train/main.py", config, "--set", "train.lrr=1", ranks=2, fails=True)
    assert "unknown key 'train.lrr'; did you mean 'lr'?" in said
    assert "Traceback" not in said
