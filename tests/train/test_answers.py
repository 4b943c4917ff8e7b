"""Evaluation and `listen.py`, on an adapter that a real run has trained."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import numpy as np
import pytest
import soundfile

from data.shards import ShardSet
from tests.launch import launch, python
from tests.train.conftest import Workspace

RATE = 16_000


@pytest.fixture(scope="module")
def evaluated(workspace: Workspace, uninterrupted: str, tasks: Path) -> list[dict]:
    tree_path = workspace.root / f"{uninterrupted}.yaml"
    rows = workspace.root / "rows.json"
    shards = workspace.root / "shards" / "train-*.tar"
    launch(
        "train/evaluate.py", tree_path, "--checkpoint", workspace.root / uninterrupted,
        "--json", rows, "--answers", workspace.root / "answers.json",
        "--set", f"evaluate={{shards: ['{shards}'], tasks: '{tasks}', batch_size: 4, "
        "max_new_tokens: 5, samples: 3, num_beams: 2, states: 4, pictures: 1}", ranks=2,
    )  # fmt: skip
    return json.loads(rows.read_text())


def test_every_task_is_scored_for_every_input(evaluated: list[dict]) -> None:
    assert all(
        {"task", "language", "input", "metric", "value", "count"} < set(row) for row in evaluated
    )
    cells = {
        (r["task"], r["input"], r["language"], r["metric"]): r["count"]
        for r in evaluated
        if r["wording"] == "all"
    }
    for task, metric in (("repeat", "wer"), ("translate", "bleu"), ("what", "accuracy")):
        for kind in ("speech", "text", "cascade", "shuffled", "none"):
            assert cells[task, kind, "all", metric] == cells[task, kind, "en", metric] == 10
        assert cells[task, "speech", "all", "state_cosine"] > 0
    # The targets of this run are continuations alone.
    assert {r["trained"] for r in evaluated} == {False}


def test_ranks_share_the_questions_and_lose_none(
    evaluated: list[dict], workspace: Workspace
) -> None:
    answers = json.loads((workspace.root / "answers.json").read_text())
    asked = [(a["key"], a["task"], a["input"]) for a in answers]
    assert len(asked) == len(set(asked)) == 10 * 3 * 5


def test_the_tracker_has_scores_tables_and_clips(
    evaluated: list[dict], workspace: Workspace, uninterrupted: str
) -> None:
    uri = f"sqlite:///{workspace.root / uninterrupted}.db"
    client = mlflow.MlflowClient(uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
    runs = client.search_runs([experiment.experiment_id])
    (run,) = [r for r in runs if r.data.tags["hearken.stage"] == "evaluate"]
    by_id = {r.info.run_id: r for r in runs}
    assert by_id[run.data.tags["hearken.trained_by"]].data.tags["hearken.stage"] == "train"
    assert {"eval/speech/repeat_wer", "drop/speech/repeat_wer"} <= set(run.data.metrics)
    paths = {f.path for f in client.list_artifacts(run.info.run_id)}
    assert {
        "scores.json",
        "samples.json",
        "evaluation.json",
        "generalisation.json",
        "samples",
    } <= paths
    assert len(client.list_artifacts(run.info.run_id, "samples")) == 3
    drawn = {Path(f.path).stem for f in client.list_artifacts(run.info.run_id, "pictures")}
    assert drawn == {"loss_by_task", "slots-00", "similarity-00"}
    assert [i.dataset.name for i in run.inputs.dataset_inputs] == ["evaluation"]
    assert run.data.tags["mlflow.parentRunId"] == run.data.tags["hearken.trained_by"]


def test_the_tracker_knows_what_a_run_was_trained_on(
    evaluated: list[dict], workspace: Workspace, uninterrupted: str
) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{workspace.root / uninterrupted}.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
    stage = "tags.`hearken.stage` = 'train'"
    (run,) = client.search_runs([experiment.experiment_id], stage)
    (used,) = run.inputs.dataset_inputs
    shards = ShardSet.open(str(workspace.root / "shards" / "train-*.tar"))
    assert used.dataset.digest == shards.digest[:36]
    assert json.loads(used.dataset.profile)["utterances"] == len(shards)
    assert {Path(a).name for a in json.loads(used.dataset.source)["shards"]} == {
        Path(a).name for a in shards.addresses
    }
    drawn = {Path(f.path).stem for f in client.list_artifacts(run.info.run_id, "pictures")}
    assert drawn == {"lengths", "packing"}
    # Stage 1's run is found by the tag of what it made.
    made = mlflow.MlflowClient(f"sqlite:///{workspace.root / 'targets-run'}.db")
    (experiment,) = [e for e in made.search_experiments() if e.name == "tiny"]
    *_, first = made.search_runs([experiment.experiment_id])  # other tests may have come later
    assert first.data.tags["hearken.targets"] == run.data.tags["hearken.targets"]


def listen(workspace: Workspace, run: str, audio: Path, fails: bool = False) -> str:
    return python(
        "train/listen.py", workspace.root / run, audio, "--instruction", "repeat this",
        "--max-new-tokens", "5", fails=fails,
    )  # fmt: skip


@pytest.mark.parametrize(("suffix", "rate", "channels"), [("wav", 8_000, 1), ("mp3", 44_100, 2)])
def test_listen_takes_any_recording(
    workspace: Workspace, uninterrupted: str, tmp_path: Path, suffix: str, rate: int, channels: int
) -> None:
    wave = 0.1 * np.random.default_rng(0).normal(size=(rate, channels))
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, wave, rate)
    assert listen(workspace, uninterrupted, path).strip()


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"no audio at all", "not audio"), (None, "does not exist"), ("short", "too short")],
)
def test_listen_says_what_is_wrong_in_one_line(
    workspace: Workspace, uninterrupted: str, tmp_path: Path, content: bytes | str | None, said: str
) -> None:
    path = tmp_path / "a.wav"
    if content == "short":
        soundfile.write(path, 0.1 * np.ones(50), RATE)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    out = listen(workspace, uninterrupted, path, fails=True)
    assert "Traceback" not in out
    (line,) = [line for line in out.splitlines() if line.startswith("error: ")]
    assert said in line
    assert "a.wav" in line
