"""The claims' driver: fair systems, kept jobs, honest verdicts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data.collate import Clip, Sample, collate
from data.prompts import Speech, Text
from data.shards import Overlay, ShardSet, write_overlay
from examples.micro.claims import figures, pieces, prepare, table
from examples.micro.claims.figures import Figure, Outcome
from examples.micro.claims.measure import with_gap
from examples.micro.claims.runner import Job, JobFailed, Runner
from examples.micro.claims.systems import FULL, SYSTEMS, Seeds, System
from examples.micro.claims.table import CLAIMS, Comparison, Finding, Side
from tests import tiny
from train import config as cfg

# What may differ between two systems: what is learnt of what, by which loss, for how long.
_MAY_DIFFER = {"run", "behave", "losses", "evaluate"}
_OF_DATA = {"shards", "targets", "states", "words", "interleave"}
_OF_TRAIN = {"steps", "init", "checkpoint_every", "lr"}


def loaded(system: System, seed: int = 1) -> cfg.Config:
    settings = pieces.overrides(system, seed)
    return cfg.load(pieces.config_of(system), [f"{k}={v}" for k, v in settings.items()])


def test_systems_differ_in_what_a_claim_is_about_alone() -> None:
    configs = {system.name: loaded(system).resolved() for system in SYSTEMS}
    first = configs["cont"]
    for name, config in configs.items():
        for section in config.keys() - _MAY_DIFFER:
            free = {"data": _OF_DATA, "train": _OF_TRAIN}.get(section, set())
            if section == "prompt":
                assert config[section] == first[section]
                continue
            for key in config[section].keys() - free if config[section] else ():
                assert config[section][key] == first[section][key], (name, section, key)
    trained = [s for s in SYSTEMS if s.name not in ("untrained", "ctc", "cut", "cut_ended")]
    assert len({system.steps for system in trained}) == 1
    assert {configs[s.name]["train"]["lr"] for s in SYSTEMS if s.name != "untrained"} == {2e-3}
    assert all(config["train"]["engine"] == "configs/ds/zero3.json" for config in configs.values())


def test_every_claim_is_about_systems_that_are_run() -> None:
    known = {system.name for system in SYSTEMS if system.inputs} | {*table.FIXED, "all systems"}
    for claim in CLAIMS:
        for comparison in claim.comparisons:
            for side in (comparison.left, comparison.right):
                assert side.system.partition("/")[0] in known, claim.number
    assert len({claim.number for claim in CLAIMS}) == len(CLAIMS)
    assert sum(claim.number.isdigit() for claim in CLAIMS) >= 12
    assert len(Seeds().every) >= 3


def made(left: list[float], sense: str, right: list[float], margin: float = 0.0) -> Finding:
    sides = [Side(n, Figure(n, lambda o: 0.0)) for n in ("left", "right")]
    comparison = Comparison(sides[0], sense, sides[1], margin)  # type: ignore[arg-type]
    found = Finding(comparison, (1, 2, 3))
    found.__dict__.update(left=left, right=right)
    return found


@pytest.mark.parametrize(
    ("left", "sense", "right", "margin", "expected"),
    [
        ([10, 11, 12], ">", [1, 2, 3], 0, "holds"),
        ([10, 11, 12], ">", [1, 2, 3], 15, "does not hold"),
        ([1, 2, 3], ">", [10, 11, 12], 0, "does not hold"),
        ([1, 2, 3], "<", [10, 11, 12], 0, "holds"),
        ([1, 2, 3], "<", [10, 11, 12], 8, "holds"),
        ([1, 2, 3], "<", [10, 11, 12], 10, "does not hold"),
        ([10, 0, 5], ">", [4, 4, 4], 0, "parity"),
        ([10, 10, 10.5], ">", [11, 11.5, 11], -3, "holds"),
        ([0, 0, 0], "=", [0, 0, 0], 0, "holds"),
        ([0, 1, 0], "=", [0, 0, 0], 0, "does not hold"),
    ],
)
def test_a_verdict_goes_by_the_interval_of_paired_differences(
    left: list[float], sense: str, right: list[float], margin: float, expected: str
) -> None:
    assert made(left, sense, right, margin).verdict == expected


def test_a_claim_is_as_good_as_its_worst_comparison() -> None:
    good, bad = made([2, 2, 2.1], ">", [1, 1, 1]), made([1, 1, 1.1], ">", [2, 2, 2])
    open_ = made([0, 2, 4], ">", [1, 1, 1])
    assert table.verdict([good, good]) == "holds"
    assert table.verdict([good, open_]) == "parity"
    assert table.verdict([good, open_, bad]) == "does not hold"


def test_figures_read_rows_of_all_wordings_and_languages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(pieces.run_of("cont", 1))
    folder.mkdir(parents=True)
    rows = [
        {"task": task, "metric": metric, "wording": wording, "language": language,
         "input": source, "value": value}
        for task, metric, level in (("repeat", "wer", 5.0), ("translate_de", "bleu", 70.0),
                                    ("translate_en", "bleu", 80.0), ("translate_es", "bleu", 90.0))
        for wording, more in (("seen", 100), ("unseen", 200), ("drop", 300), ("all", 0))
        for language, yet_more in (("en", 1000), ("all", 0))
        for source, most in (("text", 5000), ("speech", 0))
        for value in (level + more + yet_more + most,)
    ]  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(rows))
    outcome = Outcome("cont", 1)
    assert figures.WER.of(outcome) == 5
    assert figures.BLEU.of(outcome) == 80
    assert outcome.score("repeat", wording="drop") == 305
    assert figures.WER.of(Outcome("cont", 1, "text")) == 5005


def marks(path: Path, text: str, fails: bool = False) -> tuple[str, ...]:
    code = f"open({str(path)!r}, 'a').write({text!r}); raise SystemExit({int(fails)})"
    return (sys.executable, "-c", code)


def test_finished_jobs_are_kept_and_changed_ones_made_anew(tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"

    def jobs(text: str) -> list[Job]:
        return [
            Job("second", (marks(other, "x"),), other, ("first",)),
            Job("first", (marks(out, text),), out),
        ]

    runner = Runner(tmp_path / "jobs", 2)
    assert set(runner.run(jobs("a"))) == {"first", "second"}
    assert runner.pending(jobs("a")) == []
    assert [job.name for job in runner.pending(jobs("b"))] == ["first"]
    runner.run(jobs("a"))
    assert out.read_text() == "a"
    runner.run(jobs("b"))
    assert out.read_text() == "b"
    other.unlink()
    runner.run(jobs("b"))
    assert (out.read_text(), other.read_text()) == ("b", "x")


def test_a_job_that_fails_says_so_and_is_done_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    runner = Runner(tmp_path / "jobs", 1)
    failing = Job("job", (marks(out, "a", fails=True),), out)
    with pytest.raises(JobFailed, match="job: "):
        runner.run([failing])
    with pytest.raises(JobFailed):  # the same again: what is there stays, to be continued
        runner.run([failing])
    assert out.read_text() == "aa"
    with pytest.raises(ValueError, match="wait for jobs"):
        runner.run([Job("alone", (marks(out, "a"),), out, ("nobody",))])


def test_a_subset_has_the_targets_of_the_whole(tmp_path: Path) -> None:
    tiny.shards(tmp_path)
    source = f"{tmp_path}/shards/*.tar"
    whole = ShardSet.open(source)
    keys = whole.keys.to_pylist()
    target = {"instruction": "go on", "template": "t", "text": "", "finished": True}
    records = [(key, {"targets": [target | {"ids": [n]}]}) for n, key in enumerate(keys)]
    write_overlay(tmp_path / "targets-000000.tar", records, base=whole)
    taken = prepare.subset(source, tmp_path / "few/few-000000.tar", 2)
    few = ShardSet.open(f"{tmp_path}/few")
    assert few.keys.to_pylist() == taken
    languages = whole.languages.to_pylist()
    assert sorted(few.languages.to_pylist()) == sorted(2 * list(set(languages)))
    assert len(taken) < len(keys)
    targets = Overlay.open(f"{tmp_path}/targets-*.tar", few)
    for i, key in enumerate(taken):
        assert few.read(i, "flac") == whole.read(keys.index(key), "flac")
        assert targets.record(i)["targets"][0]["ids"] == [keys.index(key)]


def test_the_gap_is_that_of_padding_to_the_longest_clip() -> None:
    def sample(key: str, slots: int) -> Sample:
        clip = Clip(np.zeros(8, np.float32), 8, slots, slots)
        answer = Text((7, 8), labelled=True)
        return Sample(key, (Text((5,)), Speech(0, slots), Text((6,)), answer), clip)

    batch = collate([sample("a", 2), sample("b", 5)])
    assert batch.positions.tolist() == [*range(6), *range(9)]
    gapped = with_gap(batch)
    assert gapped.positions.tolist() == [0, 1, 2, 6, 7, 8, *range(9)]
    assert torch.equal(gapped.source, batch.source)
    assert torch.equal(with_gap(collate([sample("a", 2)])).positions, torch.arange(6))


def test_the_bounds_lie_where_figures_look_for_them() -> None:
    (bounds,) = [job for job in pieces.jobs(SYSTEMS, Seeds(), 1) if job.name == "bounds"]
    folder = Outcome("bounds", 1, "text").folder
    assert bounds.makes == folder
    assert f"{folder}/evaluation.json" in bounds.commands[0]


def test_the_states_of_all_utterances_serve_a_part_of_them() -> None:
    jobs = {job.name: job for job in pieces.jobs(SYSTEMS, Seeds(), 1)}
    assert {name for name in jobs if name.endswith("-states")} == {"full-states", "few-states"}
    assert f"data.shards=['{FULL}']" in jobs["full-states"].commands[0]
    assert "full-states" in jobs["cont_en-1"].after


def test_more_seeds_are_run_of_close_systems_alone() -> None:
    seeds = Seeds((1, 2), {"cont_few": (7,), "multi_few": (7, 8)})
    assert seeds.of("cont_few") == seeds.of("multi_few", "cont_few") == (1, 2, 7)
    assert seeds.of("multi_few") == (1, 2, 7, 8)
    assert seeds.of("cont") == seeds.of("multi_few", "mixed_few") == (1, 2)
    names = {job.name for job in pieces.jobs(SYSTEMS, seeds, 1)}
    assert {name for name in names if name.endswith("-7")} == {
        "cont_few-7", "multi_few-7", "measured-7",
    }  # fmt: skip
    assert {name for name in names if name.endswith("-8")} == {"multi_few-8", "measured-8"}
    assert {f"{system.name}-{seed}" for system in SYSTEMS for seed in (1, 2)} <= names
