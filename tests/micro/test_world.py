"""The generator as a whole: what it writes, and that it does nothing twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.micro import corpus, record, world
from examples.micro.settings import CorpusSettings

SMALL = CorpusSettings(train_per_language=37, test_per_language=4, seed=5)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "CORPUS", SMALL)
    monkeypatch.setattr(world, "SPEECH", world.Part("corpus", world.SPEECH.sources, SMALL))


@pytest.mark.usefixtures("small")
def test_a_second_run_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world.make(tmp_path, models=[], processes=2)
    keys = {json.loads(line)["key"] for line in (tmp_path / "tasks.jsonl").open()}
    assert keys == {utterance.key for utterance in corpus.plan(SMALL, "test")}
    summary = json.loads((tmp_path / "world.json").read_text())
    assert summary["parts"]["corpus"]["utterances"] == 3 * (37 + 4)

    def fail(*_: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(corpus, "write", fail)
    world.make(tmp_path, models=[], processes=2)
    # Other settings, or a run that was stopped half way, are no cache.
    monkeypatch.setattr(world, "CORPUS", CorpusSettings(seed=6))
    with pytest.raises(AssertionError, match="made again"):
        world.make(tmp_path, models=[], processes=2)


def test_a_half_made_part_is_made_again(tmp_path: Path) -> None:
    part = world.MODELS["llama"]
    (tmp_path / part.folder).mkdir()
    assert not world.is_made(tmp_path, part)
    world._stamp(tmp_path, part, {})
    assert world.is_made(tmp_path, part)
    world._unmake(tmp_path, part)
    assert not world.is_made(tmp_path, part)


def test_one_sentence_on_demand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "said.wav"
    monkeypatch.setattr("sys.argv", ["record", str(out), "--language", "es", "--seed", "7"])
    record.main()
    assert out.stat().st_size > 16_000
    assert "said (es)" in capsys.readouterr().out
