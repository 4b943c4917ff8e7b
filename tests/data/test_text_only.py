"""Rows without audio: instruction data to shards, and through lengths, plan and stream."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data import build
from data.archive import ContentError, write_shard
from data.collate import Sample, collate
from data.corpora import CorpusError
from data.prompts import Prompt, Text
from data.shards import Overlay, ShardSet
from data.stream import Stream, silent_clip
from tests.data import made

ROWS = [
    {"instruction": "Name a colour", "input": "", "output": "Red."},
    {"instruction": "Translate!", "input": " das Haus ", "output": "the house", "topic": "de"},
    {"key": "own", "instruction": "Why?", "output": "Because.", "language": "de"},
]
FAULTS = [
    ({"instruction": "Say nothing.", "output": " "}, "empty field: 'output'"),
    ({"instruction": "x"}, "no field: 'output' is missing"),
    ({"instruction": ["x"], "output": "y"}, "wrong field: 'instruction' must be a string"),
    ("{", "not JSON"),
    ("[]", "not JSON: an object is expected"),
]


def built(source: Path, out: Path) -> ShardSet:
    options = ["--workers", "1", "--language", "en", "--max-skipped", "0.9"]
    assert build.main(["instructions", str(source), str(out), *options]) == 0
    return ShardSet.open(out)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    rows = [json.dumps(row) for row in ROWS]
    rows += [row if isinstance(row, str) else json.dumps(row) for row, _ in FAULTS]
    (tmp_path / "alpaca.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path / "alpaca.jsonl"


def test_instructions_become_shards_without_audio(lines: Path, tmp_path: Path) -> None:
    shards = built(lines, tmp_path / "shards")
    found = {shards.key(i): i for i in range(len(shards))}
    assert found.keys() == {"alpaca-0000001", "alpaca-0000002", "own"}
    texts = {key: shards.texts[i].as_py() for key, i in found.items()}
    assert texts == {
        "alpaca-0000001": "Name a colour.",
        "alpaca-0000002": "Translate! das Haus",
        "own": "Why?",
    }
    assert shards.num_samples.tolist() == [0, 0, 0]
    record = shards.read_json(found["alpaca-0000002"])
    assert (record["output"], record["topic"], record["language"]) == ("the house", "de", "en")
    assert shards.languages[found["own"]].as_py() == "de"
    with pytest.raises(ContentError, match="no member 'flac'"):
        shards.read(0, "flac")


def test_rows_that_are_none_are_listed_with_their_reason(lines: Path, tmp_path: Path) -> None:
    built(lines, tmp_path / "shards")
    skipped = map(json.loads, (tmp_path / "shards/alpaca.skipped.jsonl").read_text().splitlines())
    reasons = {row["key"]: row["reason"] for row in skipped}
    assert list(reasons) == [f"alpaca.jsonl:{n}" for n in range(4, 9)]
    for reason, (_, expected) in zip(reasons.values(), FAULTS, strict=True):
        assert reason.startswith(expected)


def test_alpacas_own_form_gives_the_same_rows(lines: Path, tmp_path: Path) -> None:
    whole = tmp_path / "alpaca.json"
    whole.write_text(json.dumps(ROWS))
    one, other = built(lines, tmp_path / "a"), built(whole, tmp_path / "b")
    assert one.digest == other.digest
    whole.write_text("{}")
    with pytest.raises(CorpusError, match="must hold one list of rows, found dict"):
        list(build.READERS["instructions"](whole))
    with pytest.raises(CorpusError, match=r"end in \.json or \.jsonl, found '\.csv'"):
        list(build.READERS["instructions"](lines.rename(tmp_path / "rows.csv")))


def test_built_again_nothing_is_done_twice(lines: Path, tmp_path: Path) -> None:
    tar = tmp_path / "shards/alpaca-000000.tar"
    built(lines, tmp_path / "shards")
    before = tar.stat().st_mtime_ns
    built(lines, tmp_path / "shards")
    assert tar.stat().st_mtime_ns == before
    lines.write_text(lines.read_text().replace("Red.", "Blue."))
    built(lines, tmp_path / "shards")
    assert tar.stat().st_mtime_ns != before


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardSet, Overlay]:
    """Shards of speech and shards of texts, of which some are longer than what they would cost
    as speech; with targets for all."""
    folder = tmp_path_factory.mktemp("mixed")
    made.shards(folder / "s", [6, 5])
    rows = [
        {"key": f"t{n}", "instruction": "x" * (1 + 3 * n), "output": "y", "language": "en"}
        for n in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    built(folder / "rows.jsonl", folder / "t")
    base = ShardSet.open([folder / "s", folder / "t"])
    return base, made.targets(folder / "targets", base, per_sample=2)


def stream(data: tuple[ShardSet, Overlay], **more: object) -> Stream:
    budgets = {"tokens_per_bin": 80, "seconds_per_bin": 4.0, "bins_per_step": 3} | more
    prompt = Prompt(made.ByteTokenizer(), "U {instruction} : {input} A")
    return Stream.build(*data, prompt, made.Rule(), made.waveform, seed=3, **budgets)


def batches(of: Stream, epoch: int = 0) -> list:
    return [batch for step in of.steps(epoch) for batch in step]


def test_a_text_costs_its_tokens_and_no_seconds(mixed: tuple[ShardSet, Overlay]) -> None:
    found = stream(mixed)
    assert found.skipped(0) == []
    for epoch in (0, 1):
        tokens = dict(zip(mixed[0].keys.to_pylist(), found.lengths.tokens(epoch), strict=True))
        keys = []
        for batch in batches(found, epoch):
            assert list(batch.lengths) == [tokens[key] for key in batch.keys] or not batch.keys
            assert len(batch.source) <= 80
            keys += batch.keys
        assert sorted(keys) == sorted(mixed[0].keys.to_pylist())


def test_bins_have_the_clips_that_are_heard_or_silence_for_none(
    mixed: tuple[ShardSet, Overlay],
) -> None:
    kinds = set()
    for batch in batches(stream(mixed)):
        heard = sum(key.startswith("k") for key in batch.keys)
        kinds.add((bool(heard), heard < len(batch.keys)))
        assert batch.silent == (heard == 0)
        assert len(batch.features) == len(batch.slots) == max(1, heard)
        assert (batch.seconds > 0) == bool(heard)
        placed = sorted((-1 - batch.source[batch.source < 0]).tolist())
        if batch.weight:
            assert placed == list(range(sum(batch.slots) if heard else 0))
    assert {(True, True), (False, True)} <= kinds, "one of both kinds, and one of texts alone"


def test_a_text_stands_where_speech_would(mixed: tuple[ShardSet, Overlay]) -> None:
    found = stream(mixed, reads=True)
    i = mixed[0].keys.to_pylist().index("t3")
    sample = found.read(i, 1, 0)
    assert sample.clip is None
    prompt = found.prompt.with_text("say 1", "xxxxxxxxxx.")
    parts = [id for part in sample.document[:-1] for id in part.ids]
    assert parts == prompt
    assert sample.document[-1].labelled
    assert sample.read == sample.document


def test_what_a_teacher_reads_fits_the_budget_too(mixed: tuple[ShardSet, Overlay]) -> None:
    """Transcripts have more bytes than their clips have slots, so what is read is the longer."""
    found = stream(mixed, reads=True)
    planned = dict(zip(mixed[0].keys.to_pylist(), found.lengths.tokens(0), strict=True))
    longer = 0
    for batch in batches(found):
        if batch.weight:
            assert len(batch.read.source) <= 80
            both = np.maximum(batch.lengths, batch.read.lengths)
            assert [planned[key] for key in batch.keys] == both.tolist()
            longer += sum(batch.read.lengths) > sum(batch.lengths)
    assert longer


def test_bits_do_not_depend_on_workers(mixed: tuple[ShardSet, Overlay]) -> None:
    one, two = stream(mixed), stream(mixed, workers=2)
    for a, b in zip(batches(one), batches(two), strict=True):
        assert (a.source == b.source).all()
        assert (a.keys, a.silent) == (b.keys, b.silent)


def test_no_silence_is_asked_for_where_there_is_a_clip() -> None:
    silence = silent_clip(made.Rule(), made.waveform)
    text = Sample("t", (Text((7,)), Text((8,), True)))
    heard = Sample("k", (Text((7,)), Text((8,), True)), silence)
    assert len(collate([text, heard], silence=silence).features) == 1
    assert not collate([text, heard], silence=silence).silent
    assert collate([text], silence=silence).silent


def test_an_empty_text_is_a_document(tmp_path: Path) -> None:
    about = {"text": "", "language": "en", "speaker": None}
    columns = {"num_samples": 0, "flac_offset": -1, "flac_size": 0, **about}
    row = made.Row("e", {"json": json.dumps(about).encode()}, columns)
    fields = made.FIELDS | {"flac_offset": made.pa.int64(), "flac_size": made.pa.int64()}
    write_shard(tmp_path / "train-000000.tar", [row], fields, {})
    base = ShardSet.open(tmp_path)
    (batch, *_) = batches(stream((base, made.targets(tmp_path / "t", base))))
    assert batch.keys == ("e",)
