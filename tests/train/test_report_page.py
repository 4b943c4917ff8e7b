"""The page that compares runs, from a real database that the tracker itself has written."""

from __future__ import annotations

import re
import sqlite3
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile

from train.config import ConfigError
from train.report import main
from train.tracked import Store
from train.tracking import StepTracker, Tracker

SCORES = {"first": 12.5, "second": 7.25}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two training runs that differ in two settings, and an evaluation of each."""
    root = tmp_path_factory.mktemp("report")
    uri = f"sqlite:///{root}/mlflow.db"
    clip = root / "utt1.flac"
    soundfile.write(clip, 0.1 * np.random.default_rng(0).normal(size=8_000), 16_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)  # where MLflow puts artifacts
        for number, (name, score) in enumerate(SCORES.items()):
            run = StepTracker(
                uri, "exp", name, journal=root / f"{name}.jsonl",
                tags={"hearken.stage": "train", "hearken.revision": "abc"},
                params={"train.lr": f"{number + 1}e-3", "train.clip": "1.0",
                        "prompt": "<user> {input}"} | ({"data.noise": "yes"} if number else {}),
            )  # fmt: skip
            for step in range(30):
                run.log(step, {"train/loss": 3.0 / (step + 1), "perf/mfu": 0.4})
            run.close()
            tags = {"hearken.stage": "evaluate", "hearken.trained_by": run.run_id}
            evaluation = Tracker(uri, "exp", "evaluation", tags=tags)
            row = {"language": ["all"] * 2, "wording": ["all"] * 2, "task": ["repeat"] * 2,
                   "metric": ["wer"] * 2, "input": ["speech", "text"], "value": [score, 0.5],
                   "low": [score - 1, 0.0], "high": [score + 1, 1.0]}  # fmt: skip
            evaluation.table("evaluation", row)
            evaluation.file(clip, "samples")
            said = {
                "audio": "samples/utt1.flac", "transcript": "a <b>cat</b>", "task": "repeat",
                "instruction": "say it", "expected": "a cat", "answer": f"{name} cat",
            }  # fmt: skip
            evaluation.table("samples", {column: [value] for column, value in said.items()})
            evaluation.close()
    return uri


@pytest.fixture(scope="module")
def page(uri: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the training runs alone: their evaluations come along."""
    out = tmp_path_factory.mktemp("page") / "a" / "report.html"
    main(["first", "second", "--uri", uri, "--out", str(out)])
    return out.read_text(encoding="utf-8")


def section(page: str, name: str) -> str:
    """From one heading to the next, cells joined by |."""
    text = re.split(r'<h2 id="', page)
    (found,) = [part for part in text if part.startswith(f'{name}"')]
    return re.sub(r"(<[^>]+>\s*)+", "|", found)


def test_what_differs_is_apart_from_what_does_not(page: str) -> None:
    differences, same = section(page, "differences").split("settings that are the same", 1)
    assert "|train.lr|1e-3|2e-3|" in differences
    assert "|data.noise|(not set)|yes|" in differences
    assert "train.clip" not in differences
    assert "|train.clip|1.0|" in same


def test_scores_stand_side_by_side_and_the_best_is_marked(page: str) -> None:
    assert "|repeat|wer ↓|12.5 ± 1.0|7.2 ± 1.0|0.50|" in section(page, "scores")
    # Lower is better.
    assert '<td class="n best">7.2 ± 1.0</td>' in page
    assert page.count('class="n best"') == 1


def test_scores_that_are_gone_are_said(uri: str, tmp_path: Path) -> None:
    """The database went elsewhere without the artifacts: nothing is left out in silence."""
    moved = tmp_path / "moved.db"
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as here, sqlite3.connect(moved) as there:
        here.backup(there)
        there.execute("update runs set artifact_uri = ?", [str(tmp_path / "nowhere")])
    main(["first", "--uri", f"sqlite:///{moved}", "--out", str(tmp_path / "report.html")])
    found = section((tmp_path / "report.html").read_text(), "scores")
    assert "evaluation: its table of scores is not there" in found


def test_samples_can_be_heard_and_answers_compared(page: str) -> None:
    assert "|repeat|say it|a cat|first cat|second cat|" in section(page, "samples")
    assert page.count('src="data:audio/flac;base64,ZkxhQ') == 1  # "fLaC"
    assert "a &lt;b&gt;cat&lt;/b&gt;" in page
    assert "<b>" not in page


def test_every_metric_with_steps_has_a_plot(page: str) -> None:
    assert re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,iVBOR', page) == [
        "train/loss", "perf/mfu",
    ]  # fmt: skip


def test_the_page_needs_nothing_beside_it(page: str) -> None:
    class Addresses(HTMLParser):
        found: list[str | None]

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [v for k, v in attrs if k in ("src", "href", "srcset", "action")]

    seen = Addresses()
    seen.found = []
    seen.feed(page)
    assert seen.found
    assert all(address and address.startswith("data:") for address in seen.found)
    assert "@import" not in page
    assert "url(" not in page


def test_runs_are_linked_and_named(page: str) -> None:
    runs = section(page, "runs")
    # Both evaluations have one name, so that of the run they belong to goes with it.
    assert re.search(r"\|evaluation of first\|evaluate\|.*?\|first\|", runs)
    assert "|evaluation of second|evaluate|" in runs


def test_an_experiment_brings_all_its_runs(uri: str) -> None:
    names = [run.name for run in Store(uri).find([], "exp")]
    assert names == ["first", "evaluation", "second", "evaluation"]


def test_a_name_that_fits_nothing_is_told(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run 'third'; the latest are .*second"):
        Store(uri).find(["third"])
    with pytest.raises(ConfigError, match=r"no experiment 'none'; there are .*exp"):
        Store(uri).find([], "none")
    missing = tmp_path / "none.db"
    with pytest.raises(ConfigError, match="does not exist"):
        Store(f"sqlite:///{missing}")
    assert not missing.exists()
