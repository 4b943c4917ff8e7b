"""The report, written from results of every system in the files that an evaluation leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples.micro.claims import figures, report
from examples.micro.claims.figures import Outcome
from examples.micro.claims.pieces import MEASURED
from examples.micro.claims.systems import (
    FEW,
    FEW_PER_LANGUAGE,
    RUNS,
    STEPS,
    SYSTEMS,
    Seeds,
    run_of,
)
from examples.micro.claims.table import CLAIMS
from train.tracking import StepTracker

_TASKS = (*figures.TRANSLATION, *figures.UNDERSTANDING, *figures.SHORT, "repeat", "continue")
SEEDS = Seeds()
_STATES = ("instruction_match", "instruction_cosine", "state_cosine")


def rows(level: float, inputs: tuple[str, ...]) -> list[dict[str, Any]]:
    """As `evaluate.py --json` writes them; all scores are `level`, error rates 100 less it."""
    made = []
    for task in _TASKS:
        metrics = {"repeat": ("wer", "cer")}.get(task, (figures.METRICS.get(task, "exact"),))
        for metric in (*metrics, *_STATES):
            value = 100 - level if metric in ("wer", "cer") else level
            for wording, found in (("all", value), ("unseen", value - 1), ("drop", 1.0)):
                made += [
                    {"task": task, "metric": metric, "wording": wording, "language": language,
                     "input": source, "value": 0.0 if source == "shuffled" else found}
                    for source in inputs for language in ("all", "en", "es", "de")
                ]  # fmt: skip
    return made


def answers(level: float, inputs: tuple[str, ...]) -> list[dict[str, str]]:
    """Ten questions a task; of continuations, as many as `level` says are right."""
    return [
        {"key": f"u{n}", "task": task, "instruction": "do", "input": source,
         "said": f"{task} {n}" if n * 10 < level or source == "text" else "a longer answer"}
        for task in _TASKS for n in range(10) for source in inputs
    ]  # fmt: skip


def leave(folder: Path, level: float, inputs: tuple[str, ...]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(rows(level, inputs)))
    (folder / "answers.json").write_text(json.dumps(answers(level, inputs)))


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Made-up results: cont is at 60 %, asr at 50 %, few utterances 20 % below."""
    monkeypatch.chdir(tmp_path)
    levels = {system.name: 60.0 - 20 * (system.shards == FEW) for system in SYSTEMS}
    levels |= {"untrained": 5.0, "asr": 50.0, "asr_few": 30.0}
    leave(Path(RUNS) / "bounds", 95.0, ("text", "cascade", "none"))
    frozen = {"tensors": 99, "before": "a", "after": "a", "changed": []}
    for n, seed in enumerate(SEEDS.every):
        measured = {s.name: {"kl": 1.0 + n, "gap": 2.0 + n / 9, "packed": 0.0} for s in SYSTEMS}
        MEASURED.mkdir(parents=True, exist_ok=True)
        (MEASURED / f"{seed}.json").write_text(json.dumps(measured))
        for system in SYSTEMS:
            folder = Path(run_of(system.name, seed))
            if system.inputs:
                level = levels[system.name] + n
                leave(folder, level, system.inputs)
            folder.mkdir(exist_ok=True)
            (folder / "frozen.json").write_text(json.dumps(frozen))
            if system.name in ("cont", "cont_ctc", "cont_few", "multi"):
                tracker = StepTracker(
                    "sqlite:///mlflow.db", "claims", system.name, journal=folder / "metrics.jsonl"
                )
                speed = 2 if system.name == "cont_ctc" else 1
                for step in range(20):
                    tracker.log(step, {"train/loss": 100 - speed * (step + n / 9)})
                tracker.close()
                facts = {"uri": "sqlite:///mlflow.db", "run_id": tracker.run_id}
                (folder / "tracker.json").write_text(json.dumps(facts))
    for seed in SEEDS.extra:
        names = [name for name in SEEDS.more if seed in SEEDS.of(name)]
        measured = {name: {"kl": 1.0, "gap": 2.0, "packed": 0.0} for name in names}
        (MEASURED / f"{seed}.json").write_text(json.dumps(measured))
        for name in names:
            level = levels[name] + (10 if name == "multi_few" else 0)
            leave(Path(run_of(name, seed)), level, ("speech",))
    return tmp_path


def test_the_report_says_what_the_results_do(results: Path) -> None:
    assert Outcome("cont", 1).losses == [100 - step for step in range(20)]
    report.write(results / "docs", SEEDS, minutes=118.0)
    found = json.loads((results / "docs/claims.json").read_text())
    assert {row["claim"] for row in found} == {claim.number for claim in CLAIMS}
    by = {(row["claim"], row["inequality"]): row for row in found}
    row = by["D", "WER: asr < asr_few"]
    assert (row["holds"], row["seeds"], row["must_hold"]) == (True, 3, True)
    assert row["left"]["per_seed"] == [50, 49, 48]
    assert row["right"]["per_seed"] == [70, 69, 68]
    assert row["left"]["value"] == 49
    assert row["left"]["low"] < 48 < 50 < row["left"]["high"]
    held = {claim: [r["holds"] for r in found if r["claim"] == claim] for claim in "ABCDF"}
    assert all(all(holds) for holds in held.values())
    # Equal figures: neither side.
    assert {r["verdict"] for r in found if r["claim"] == "15"} == {"parity"}
    assert [r["holds"] for r in found if r["claim"] in ("11", "19")] == [True, True]
    (higher,) = [r for r in found if r["inequality"] == "WER: cont > asr"]
    assert (higher["holds"], higher["verdict"]) == (False, "does not hold")
    assert (higher["steps"], higher["utterances"]) == (str(STEPS), "7200")
    assert row["utterances"] == f"7200 / {3 * FEW_PER_LANGUAGE}"
    heard = [r for r in found if r["claim"] == "8"]
    assert len(heard) == 4
    assert [r["holds"] for r in heard] == [True, True, True, False]  # a made-up WER of 0
    assert heard[0]["utterances"] == "2400"
    assert by["4", "WER: asr > cascade"]["right"]["per_seed"] == [5, 5, 5]
    text = (results / "docs/claims.md").read_text()
    assert "118 minutes" in text
    for claim in CLAIMS:
        assert claim.says in text
    for name in ("scores", "losses"):
        image = results / f"docs/img/claims_{name}.png"
        assert image.read_bytes().startswith(b"\x89PNG")
        assert image.stat().st_size < 60_000


def test_close_systems_are_compared_over_all_their_seeds(results: Path) -> None:
    def verdicts(seeds: Seeds) -> dict[str, tuple[int, str]]:
        report.write(results / "docs", seeds, minutes=118.0)
        found = json.loads((results / "docs/claims.json").read_text())
        return {row["inequality"]: (row["seeds"], row["verdict"]) for row in found}

    found = verdicts(SEEDS)
    assert found["WER: multi_few < cont_few"] == (10, "holds")
    assert found["WER: multi < multi_few"] == (3, "holds")
    text = (results / "docs/claims.md").read_text()
    assert "3 seeds of every system, 5 of `cont`, 5 of `asr`, 10 of `cont_few`" in text
    # The first three seeds know no difference.
    assert verdicts(Seeds((1, 2, 3), {}))["WER: multi_few < cont_few"] == (3, "parity")


def test_a_frozen_weight_that_changed_is_reported(results: Path) -> None:
    path = Path(run_of("asr", 2)) / "frozen.json"
    path.write_text(
        json.dumps({"tensors": 99, "before": "a", "after": "b", "changed": ["decoder.norm"]})
    )
    report.write(results / "docs", SEEDS, minutes=118.0)
    found = json.loads((results / "docs/claims.json").read_text())
    (row,) = [row for row in found if row["claim"] == "F"]
    assert row["left"]["per_seed"] == [0, 1, 0]
    assert row["verdict"] == "does not hold"
