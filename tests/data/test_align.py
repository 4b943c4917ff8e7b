"""Word times: the best path, whatever the transcript; shards of them as any overlay."""

import json
import multiprocessing
import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from transformers import Wav2Vec2Model

from data.align import main
from data.archive import Row, write_shard
from data.audio import encode_flac
from data.ctc import Aligner, Unaligned, _spell
from data.shards import Overlay, ShardSet
from data.words import parse_words, split_words
from tests import tiny
from tests.data import made

HOP = 320
TEXTS = ["the old cat sees", "a dog", "in 1984 the café - well", "house", "", "1984", "d" * 90]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.encoder(tmp_path_factory.mktemp("ctc"), seed=3)


@pytest.fixture(scope="module")
def aligner(model) -> Aligner:
    return Aligner(str(model))


def write(folder: Path, texts: list[str], shards: int = 1, language: str = "en") -> Path:
    for s in range(shards):
        rows = []
        for n, text in enumerate(texts):
            wave = made.noise(20_000 + 500 * n, seed=10 * s + n)
            about = {"text": text, "language": language, "speaker": "s"}
            members = {"flac": encode_flac(wave), "json": json.dumps(about).encode()}
            rows.append(Row(f"k{s}-{n}", members, {"num_samples": len(wave), **about}))
        write_shard(folder / f"train-{s:06d}.tar", rows, made.FIELDS, {})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def best_path(log_probs: np.ndarray, labels: list[int]) -> float:
    """CTC's most probable path through [T, C], by the rule and one state after another."""
    states = [0, *(s for label in labels for s in (label, 0))]
    score = np.full(len(states), -np.inf)
    score[:2] = log_probs[0, states[:2]]
    for frame in log_probs[1:]:
        best = score.copy()
        for s in range(1, len(states)):
            best[s] = max(best[s], score[s - 1])
            if s > 1 and states[s] not in (0, states[s - 2]):
                best[s] = max(best[s], score[s - 2])
        score = best + frame[states]
    return max(score[-2:])


def test_words_are_where_the_best_path_has_them(aligner) -> None:
    text = "the bee sees 1984 dogs"
    wave = made.noise(24_000)
    words = aligner(wave, text, "en")
    log_probs = aligner._log_probs(wave, 1)[0].numpy()
    assert (log_probs[:, -1] == 0).all()  # anything is certain, and the letters share the rest
    assert np.exp(log_probs[:, :-1]).sum(1) == pytest.approx(1.0, abs=1e-5)
    letters = aligner._tokenizer.get_vocab()
    anything = log_probs.shape[1] - 1
    labels = [anything if c.isdigit() else letters[c] for c in text.replace("1984", "1").replace(
        " ", "|")]  # fmt: skip
    # Within its frames a word is the path of its own labels: the parts are as good as the whole.
    of_word = [labels[a:b] for a, b in split_words(text.replace("1984", "1"))]
    edges = [(word.start // HOP, word.end // HOP) for word in words]
    total = sum(best_path(log_probs[a:b], own) for (a, b), own in zip(edges, of_word, strict=True))
    gaps = [(0, edges[0][0]), *((a[1], b[0]) for a, b in pairwise(edges))]
    gaps.append((edges[-1][1], len(log_probs)))
    for number, (a, b) in enumerate(gaps):
        inner = 0 < number < len(gaps) - 1
        total += best_path(log_probs[a:b], [letters["|"]] if inner else []) if a < b else 0.0
    assert total == pytest.approx(best_path(log_probs, labels), abs=1e-3)
    assert [word.text for word in words] == text.split()
    assert [word.score == 0 for word in words] == [False, False, False, True, False]


def test_words_follow_each_other_within_the_clip(aligner) -> None:
    for seed in range(5):
        wave = made.noise(16_000 + 7 * seed, seed)
        words = aligner(wave, "well the old cat sees 7 green dogs", "en")
        times = [time for word in words for time in (word.start, word.end)]
        assert times == sorted(times)
        assert times[-1] <= len(wave)
        assert all(word.end - word.start >= HOP for word in words[:-1])
        assert words == aligner(wave, "well the old cat sees 7 green dogs", "xx")


def test_what_cannot_be_spelled() -> None:
    alphabet = {c: i for i, c in enumerate("abcdef")}
    assert _spell("Bad,", alphabet) == [1, 0, 3]
    assert _spell("cafe\u0301", alphabet) == _spell("café", alphabet) == [2, 0, 5, 4]
    assert _spell("–", alphabet) == []
    assert _spell("b2", alphabet) is None
    assert _spell("да", alphabet) is None
    assert _spell("a", {"A": 7}) == [7]


def test_ugly_transcripts(aligner) -> None:
    wave = made.noise(30_000)
    cat, dash, dog, end = aligner(wave, "cat — dog !", "en")
    assert dash.start == dash.end == cat.end <= dog.start
    assert (end.start, end.end, end.score) == (dog.end, dog.end, 0.0)
    for text, reason in (
        ("", "empty"), (" \n", "empty"), ("2001 1984", "can be spelled"), ("- !", "can be"),
        ("house" * 40, "too short: 93 frames for 200 labels"),
    ):  # fmt: skip
        with pytest.raises(Unaligned, match=reason):
            aligner(wave, text, "en")
    with pytest.raises(Unaligned, match="too short: 0 frames"):
        aligner(wave[:100], "a", "en")


def test_spaceless_scripts_are_characters() -> None:
    text = "我 love 東京です, ok"
    words = [text[a:b] for a, b in split_words(text)]
    assert words == ["我", "love", "東", "京", "で", "す", ",", "ok"]


def test_every_utterance_has_a_record(model, tmp_path, capsys) -> None:
    write(tmp_path / "s", TEXTS)
    assert main([str(tmp_path / "s"), str(tmp_path / "w"), "--model", str(model)]) == 0
    base = ShardSet.open(tmp_path / "s")
    overlay = Overlay.open(tmp_path / "w", base, "words.json")
    for i, text in enumerate(TEXTS):
        record = overlay.record(i)
        words = parse_words(record)
        assert [word.text for word in words] == ([] if "unaligned" in record else text.split())
        assert overlay.column("word_starts")[i].as_py() == [word.start for word in words]
        assert overlay.column("word_ends")[i].as_py() == [word.end for word in words]
        assert all(word.end <= base.num_samples[i] for word in words)
    reasons = overlay.column("unaligned").to_pylist()
    assert [bool(reason) for reason in reasons] == [False] * 4 + [True] * 3
    assert overlay.column("unspelled")[2].as_py() == ["1984", "-"]
    assert overlay.metas[0]["model"] == str(model)
    listed = [json.loads(line) for line in (tmp_path / "w" / "unaligned.jsonl").open()]
    assert [line["key"] for line in listed] == ["k0-2", "k0-4", "k0-5", "k0-6"]
    said = capsys.readouterr().err
    assert "4 of 7" in said
    assert "too short" in said


def test_unreadable_audio_is_named(model, tmp_path) -> None:
    rows = [made.row("bad", 8000, flac=b"x"), made.row("good", 8000)]
    write_shard(tmp_path / "s.tar", rows, made.FIELDS, {})
    assert main([str(tmp_path / "s.tar"), str(tmp_path / "w"), "--model", str(model)]) == 0
    overlay = Overlay.open(tmp_path / "w", ShardSet.open(tmp_path / "s.tar"), "words.json")
    reasons = overlay.column("unaligned").to_pylist()
    assert reasons[0].startswith("not audio")
    assert reasons[1] == ""


def test_the_same_bytes_with_any_workers_and_after_a_kill(model, tmp_path) -> None:
    write(tmp_path / "s", TEXTS[:3], shards=4)
    command = [str(tmp_path / "s"), "OUT", "--model", str(model), "--device", "cpu", "--workers"]

    def run(name: str, workers: int) -> int:
        return main([str(tmp_path / name) if a == "OUT" else a for a in command] + [str(workers)])

    assert run("whole", 1) == 0
    assert run("parallel", 2) == 0
    whole = contents(tmp_path / "whole")
    assert contents(tmp_path / "parallel") == whole
    assert len(whole) == 4 * 2 + 1

    killed = multiprocessing.get_context("fork").Process(target=run, args=("killed", 1))
    killed.start()
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("words-*.parquet")):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(killed.pid, signal.SIGKILL)  # type: ignore[arg-type]
    killed.join()
    first = next((tmp_path / "killed").glob("words-*.tar"))
    before = first.stat().st_ino
    assert len(contents(tmp_path / "killed")) < len(whole)
    assert run("killed", 1) == 0
    assert first.stat().st_ino == before  # what was whole was not made again
    found = contents(tmp_path / "killed")
    assert {name: data for name, data in found.items() if not name.startswith(".")} == whole


def test_made_again_where_the_speech_has_changed(model, tmp_path) -> None:
    command = [str(tmp_path / "s"), str(tmp_path / "w"), "--model", str(model)]
    write(tmp_path / "s", TEXTS[:2], shards=2)
    assert main(command) == 0
    before = contents(tmp_path / "w")
    write(tmp_path / "s", ["a green house"])  # the first shard of the two
    assert main(command) == 0
    after = contents(tmp_path / "w")
    assert {n for n in before if before[n] != after[n]} == {
        "words-train-000000.tar", "words-train-000000.parquet",
    }  # fmt: skip
    Overlay.open(tmp_path / "w", ShardSet.open(tmp_path / "s"), "words.json")


def test_models_and_settings_that_do_not_fit(model, tmp_path, capsys) -> None:
    shards = write(tmp_path / "s", TEXTS[:1])

    def complaint(*arguments: str) -> str:
        assert main([*arguments]) == 1
        said = capsys.readouterr().err.strip()
        assert said.count("\n") == 0
        return said

    out = str(tmp_path / "w")
    whisper = str(tiny.encoder(tmp_path / "whisper", "whisper"))
    assert "has no CTC head" in complaint(str(shards), out, "--model", whisper)
    headless = tiny.encoder(tmp_path / "headless")
    Wav2Vec2Model.from_pretrained(headless).save_pretrained(headless)
    assert "not trained (lm_head" in complaint(str(shards), out, "--model", str(headless))
    assert main([str(shards), out, "--model", str(model)]) == 0
    capsys.readouterr()
    other = str(tiny.encoder(tmp_path / "other", seed=4))
    assert "another model, weights" in complaint(str(shards), out, "--model", other)
    twice = [str(shards), str(write(tmp_path / "s2", ["cat"]))]
    assert "have the same name" in complaint(*twice, str(tmp_path / "w2"), "--model", str(model))


def test_an_alphabet_per_language(tmp_path, capsys) -> None:
    folder = tiny.encoder(tmp_path / "mms", "mms", seed=5)
    letters = json.loads((folder / "vocab.json").read_text())
    cyrillic = dict(
        zip([*list(letters)[:3], *"абвгдежзийклмнопрстуфхцчшщъ"], range(30), strict=True)
    )
    (folder / "vocab.json").write_text(json.dumps({"eng": letters, "rus": cyrillic}))
    about = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"target_lang": "eng"}))
    tiny.language_adapters(folder, ["eng", "rus"])

    wave = made.noise(20_000)
    names = {"en": "eng", "ru": "rus"}
    one = Aligner(str(folder), languages=names)
    russian, english = one(wave, "кот и", "ru"), one(wave, "cat and", "en")
    assert one(wave, "кот и", "ru") == russian
    assert Aligner(str(folder), languages=names)(wave, "cat and", "en") == english
    assert [word.score > 0 for word in russian] == [True, True]
    assert [word.score > 0 for word in one(wave, "cat кот", "en")] == [True, False]

    rows = write(tmp_path / "s", ["cat"], language="en")
    command = [str(rows), str(tmp_path / "w"), "--model", str(folder)]
    assert main(command) == 1
    assert "name the right one by --languages en=NAME" in capsys.readouterr().err
    assert main([*command, "--languages", "en=eng"]) == 0
