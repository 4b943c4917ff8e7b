"""Corpora to shards: exact, resumable, the same bytes; whatever is left out is named."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data import build
from data.audio import decode
from data.shards import ShardSet
from tests.data.made import noise


def librispeech(root: Path, splits=("train-x", "dev-x"), chapters=2, count=3) -> Path:
    for split in splits:
        for chapter in range(chapters):
            folder = root / split / "19" / str(chapter)
            folder.mkdir(parents=True)
            lines = []
            for n in range(count):
                key = f"19-{chapter}-{n:04d}"
                wave = noise(8000 + 100 * n, seed=len(split) + chapter)
                soundfile.write(folder / f"{key}.flac", wave, 16_000)
                lines.append(f"{key} IT'S NUMBER {n}\n")
            (folder / f"19-{chapter}.trans.txt").write_text("".join(lines))
    return root


def manifest(folder: Path, rows: list[dict | str], name: str = "train.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def entry(folder: Path, key: str, wave=None, rate=16_000, width=None, **more) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    wave = noise(8000, seed=sum(key.encode())) if wave is None else wave
    soundfile.write(folder / f"{key}.wav", wave, rate, subtype=width)
    return {"key": key, "audio": f"{key}.wav", "text": f"text {key}", "language": "de", **more}


def run(*arguments: object) -> int:
    return build.main([str(argument) for argument in (*arguments, "--workers", 1)])


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def skips(folder: Path, split: str = "train") -> dict[str, str]:
    lines = (folder / f"{split}.skipped.jsonl").read_text().splitlines()
    return {row["key"]: row["reason"] for row in map(json.loads, lines)}


def test_librispeech_splits_stay_apart(tmp_path) -> None:
    src = librispeech(tmp_path / "src" / "LibriSpeech").parent
    assert run("librispeech", src, tmp_path / "out", "--language", "en") == 0
    for split in ("train-x", "dev-x"):
        shards = ShardSet.open(tmp_path / "out" / f"{split}-*.tar")
        assert sorted(shards.keys.to_pylist()) == [
            f"19-{c}-{n:04d}" for c in range(2) for n in range(3)
        ]
        for i in range(6):
            about = shards.read_json(i)
            n = int(about["key"][-4:])
            assert (about["text"], about["raw_text"]) == (f"it's number {n}", f"IT'S NUMBER {n}")
            assert (about["language"], about["speaker"], about["split"]) == ("en", "19", split)
            wave = decode(shards.read(i, "flac"), max_seconds=1)
            assert len(wave) == shards.num_samples[i] == 8000 + 100 * n
            path = src / "LibriSpeech" / split / "19" / about["key"][3] / f"{about['key']}.flac"
            assert np.array_equal(wave, decode(path, max_seconds=1))


def test_one_split_and_a_split_folder(tmp_path) -> None:
    src = librispeech(tmp_path / "src")
    assert run("librispeech", src, tmp_path / "a", "--language", "en", "--split", "dev-x") == 0
    assert run("librispeech", src / "dev-x", tmp_path / "b", "--language", "en") == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert not list((tmp_path / "a").glob("train*"))


def test_audio_without_a_line_and_a_line_without_audio(tmp_path) -> None:
    src = librispeech(tmp_path / "src", ("train",))
    chapter = src / "train" / "19" / "0"
    (chapter / "19-0-0000.flac").rename(chapter / "19-0-0009.flac")
    assert run("librispeech", src, tmp_path / "o", "--language", "en", "--max-skipped", 0.5) == 0
    found = skips(tmp_path / "o")
    assert found.keys() == {"19-0-0000", "19-0-0009"}
    assert found["19-0-0000"] == "missing file"
    assert found["19-0-0009"].startswith("no transcript")


def test_bad_input_is_counted_and_named(tmp_path, capsys) -> None:
    src = tmp_path / "src"
    good = [
        entry(src, "narrow", rate=8000),
        entry(src, "stereo", np.stack([noise(44_100), noise(44_100, 1)], 1), 44_100),
        entry(src, "deep", width="PCM_24", mood="calm", speaker="s1"),
    ]
    flac = src / "cut.flac"
    soundfile.write(flac, noise(16_000), 16_000)
    flac.write_bytes(flac.read_bytes()[:9000])
    (src / "noaudio.wav").write_text("this is text")
    nan = noise(800)
    nan[7] = np.nan
    bad = [
        {"key": "gone", "audio": "gone.wav", "text": "x", "language": "de"},
        {"key": "noaudio", "audio": "noaudio.wav", "text": "x", "language": "de"},
        {"key": "cut", "audio": "cut.flac", "text": "x", "language": "de"},
        {**entry(src, "silent", np.zeros(8000, np.float32))},
        {**entry(src, "empty", np.zeros(0, np.float32))},
        {**entry(src, "nan", nan, width="FLOAT")},
        {**entry(src, "untold"), "text": "  "},
        {**entry(src, "long", np.full(7200 * 100, 0.5, np.float32), 100)},
        {**entry(src, "a_b"), "key": "a.b"},
        {**entry(src, "mute"), "language": None},
        good[0] | {"audio": "other.wav"},
        "{no json",
        {"key": "half"},
        {"key": 7, "audio": "x", "text": "y"},
    ]
    path = manifest(src, good + bad)
    assert run("manifest", path, tmp_path / "o", "--max-skipped", 0.9) == 0
    shards = ShardSet.open(tmp_path / "o")
    assert sorted(shards.keys.to_pylist()) == ["deep", "narrow", "stereo"]
    lengths = dict(zip(shards.keys.to_pylist(), shards.num_samples.tolist(), strict=True))
    assert lengths == {"narrow": 16_000, "stereo": 16_000, "deep": 8000}
    about = shards.read_json(shards.keys.to_pylist().index("deep"))
    assert (about["mood"], about["speaker"], about["split"]) == ("calm", "s1", "train")
    found = {key: reason.split(":")[0] for key, reason in skips(tmp_path / "o").items()}
    assert found == {
        "gone": "missing file",
        "noaudio": "not audio that libsndfile can open (Format not recognised.)",
        "cut": "truncated or corrupt",
        "silent": "silence",
        "empty": "empty",
        "nan": "not finite",
        "untold": "empty transcript",
        "long": "too long",
        "a.b": "bad key",
        "mute": "no language",
        "narrow": "duplicate key",
        "train.jsonl:15": "not JSON",
        "train.jsonl:16": "no field",
        "train.jsonl:17": "wrong field",
    }
    table = capsys.readouterr().err
    assert "duplicate key" in table
    assert run("manifest", path, tmp_path / "o", "--max-skipped", 0.8) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert "82.4% of the utterances are skipped, over the limit of 80.0%" in message


def test_tab_separated(tmp_path) -> None:
    rows = [entry(tmp_path, key) for key in ("a", "b")]
    lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows), "c\tonly two"]
    path = tmp_path / "dev.tsv"
    path.write_text("\n".join(lines) + "\n")
    assert run("manifest", path, tmp_path / "o", "--max-skipped", 0.5) == 0
    assert sorted(ShardSet.open(tmp_path / "o" / "dev-000000.tar").keys.to_pylist()) == ["a", "b"]
    assert skips(tmp_path / "o", "dev")["dev.tsv:4"].startswith("wrong columns")


def test_same_input_same_bytes_whatever_the_workers(tmp_path) -> None:
    entries = [entry(tmp_path / "src", f"k{n}") for n in range(7)]
    path = manifest(tmp_path / "src", entries)
    shutil.copytree(tmp_path / "src", tmp_path / "copy")
    manifest(tmp_path / "copy", entries[::-1])
    size = ("--samples-per-shard", "3")
    assert run("manifest", path, tmp_path / "a", *size) == 0
    arguments = ["manifest", str(tmp_path / "copy" / "train.jsonl"), str(tmp_path / "b"), *size]
    assert build.main([*arguments, "--workers", "2"]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(contents(tmp_path / "a")) == 7


def test_again_does_only_what_changed(tmp_path) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    rows = [entry(src, f"k{n}") for n in range(6)]
    rows[2]["text"] = ""
    path = manifest(src, rows)
    arguments = ("manifest", path, out, "--samples-per-shard", 2, "--max-skipped", 0.5)
    assert run(*arguments) == 0
    before, told = contents(out), skips(out)
    times = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    assert run(*arguments) == 0
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")} == times
    assert contents(out) == before
    (out / "train-000001.parquet").unlink()
    tar = out / "train-000002.tar"
    os.chmod(tar, 0o644)
    tar.write_bytes(tar.read_bytes()[:-512])
    assert run(*arguments) == 0
    assert (contents(out), skips(out)) == (before, told)
    entry(src, "k4", noise(9999))
    assert run(*arguments) == 0
    shards = ShardSet.open(out)
    assert shards.num_samples[shards.keys.to_pylist().index("k4")] == 9999
    manifest(src, rows[:2])
    assert run(*arguments) == 0
    assert sorted(ShardSet.open(out).keys.to_pylist()) == ["k0", "k1"]


def test_foreign_shard_is_left_alone(tmp_path, capsys) -> None:
    path = manifest(tmp_path / "src", [entry(tmp_path / "src", "k")])
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "train-000007.tar").write_bytes(b"precious")
    assert run("manifest", path, tmp_path / "o") == 1
    assert "train-000007.tar: not from this build" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "o" / "train-000007.tar").read_bytes() == b"precious"


def test_killed_build_goes_on(tmp_path) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    path = manifest(src, [entry(src, f"k{n}", noise(160_000, n)) for n in range(60)])
    arguments = ["manifest", str(path), str(out), "--samples-per-shard", "10", "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "data.build", *arguments], start_new_session=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and not list(out.glob("train-000001.parquet")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert run(*arguments[:-2]) == 0
    assert run(*(str(a).replace(str(out), str(tmp_path / "whole")) for a in arguments[:-2])) == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert not [p for p in out.iterdir() if p.name.endswith(".part")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("librispeech", "{src}", "{out}"), "not in LibriSpeech's layout"),
        (("manifest", "{src}/none.jsonl", "{out}"), "no such manifest"),
        (("manifest", "{src}/a.txt", "{out}"), "ends in .jsonl or .tsv"),
        (("manifest", "{src}/a.jsonl", "{out}", "--split", "dev"), "no utterance of split 'dev'"),
        (("manifest", "{src}/b.jsonl", "{out}"), "split 'a/b' cannot name a file"),
        (("manifest", "{src}/c.jsonl", "{out}"), "zzz...' cannot name a file"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, arguments, message) -> None:
    row = entry(tmp_path / "src", "k")
    manifest(tmp_path / "src", [{**row, "split": "train"}], "a.jsonl")
    manifest(tmp_path / "src", [{**row, "split": "a/b"}], "b.jsonl")
    manifest(tmp_path / "src", [{**row, "split": "z" * 201}], "c.jsonl")
    (tmp_path / "src" / "a.txt").write_text("x")
    places = {"src": tmp_path / "src", "out": tmp_path / "out"}
    assert run(*(argument.format(**places) for argument in arguments)) == 1
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
