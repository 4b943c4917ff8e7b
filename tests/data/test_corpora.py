"""Corpora in the layouts of their official downloads, in miniature."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data import build
from data.audio import AudioError, decode
from data.corpora import READERS, CorpusError, Fault, Utterance
from data.shards import ShardSet
from tests.data.made import noise

CV_HEADER = (
    "client_id\tpath\tsentence_id\tsentence\tsentence_domain\tup_votes\tdown_votes\tage\tgender\t"
    "accents\tvariant\tlocale\tsegment"
)


def common_voice(root: Path, language: str = "de") -> Path:
    folder = root / "cv-corpus-21.0-2025-03-14" / language
    (folder / "clips").mkdir(parents=True)
    sentences = {
        "train": ["Ein Satz.", '"Ein ""wörtlicher"" Satz."', "Zwei  Worte\u00a0mehr"],
        "dev": ['Er sagte "Ja" und "Nein"'],
        "test": ['"Ja" und "Nein"'],
        "validated": ["Ein Satz."],
        "other": ["Ungeprüft."],
    }
    number = 0
    for split, texts in sentences.items():
        lines = [CV_HEADER]
        for text in texts:
            name = f"common_voice_{language}_{number}.mp3"
            soundfile.write(folder / "clips" / name, noise(16_000, number), 16_000, format="MP3")
            who = "twenties\tfemale_feminine\t\t"
            lines.append(f"c{number}\t{name}\ts{number}\t{text}\t\t2\t0\t{who}\t{language}\t")
            number += 1
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return root


def fleurs(root: Path) -> Path:
    for locale, text in (("en_us", "The Cat, “quoted”."), ("cmn_hans_cn", "这是 一 句")):
        for n, split in enumerate(("train", "dev", "test")):
            folder = root / "data" / locale / "audio" / split
            folder.mkdir(parents=True)
            soundfile.write(folder / f"100{n}.wav", noise(8000, n), 16_000)
            line = f"{n}\t100{n}.wav\t{text}\tthe cat quoted\tt h e |\t8000\tFEMALE\n"
            (root / "data" / locale / f"{split}.tsv").write_text(line)
    return root


def gigaspeech(root: Path) -> Path:
    folder = root / "audio" / "podcast" / "P0000"
    folder.mkdir(parents=True)
    soundfile.write(folder / "POD0000000041.opus", noise(48_000 * 6), 48_000, format="OGG",
                    subtype="OPUS")  # fmt: skip
    segments = [
        ("S0000000", 0.5, 1.5, ["{XL}"], "IT'S THE LARGEST <COMMA> YES <PERIOD>"),
        ("S0000001", 1.5, 3.25, ["{XL}", "{L}", "{M}"], "MIDDLE <QUESTIONMARK>"),
        ("S0000002", 3.0, 3.5, ["{DEV}"], "HELD OUT <EXCLAMATIONPOINT>"),
        ("S0000003", 4.0, 5.0, ["{XL}"], "<MUSIC>"),
        ("S0000004", 5.0, 9.0, ["{TEST}"], "BEYOND THE END"),
    ]
    recording = {
        "title": "N/A", "url": "N/A", "path": "audio/podcast/P0000/POD0000000041.opus",
        "aid": "POD0000000041", "source": "podcast", "codec": "opus", "channels": 1,
        "md5": "0", "speaker": "N/A", "category": "N/A", "subsets": ["{XL}", "{DEV}"],
        "segments": [
            {"sid": f"POD0000000041_{sid}", "speaker": "N/A", "begin_time": begin,
             "end_time": end, "subsets": subsets, "text_tn": text}
            for sid, begin, end, subsets, text in segments
        ],
    }  # fmt: skip
    table = {"dataset": "GigaSpeech", "language": "EN", "version": "v1.0.0", "audios": [recording]}
    (root / "GigaSpeech.json").write_text(json.dumps(table))
    return root


def found(kind: str, root: Path) -> dict[str, Utterance]:
    return {u.key: u for u in READERS[kind](root) if isinstance(u, Utterance)}


def built(kind: str, root: Path, out: Path) -> dict[str, ShardSet]:
    assert build.main([kind, str(root), str(out), "--workers", "1", "--max-skipped", "1"]) == 0
    splits = {tar.name.rpartition("-")[0] for tar in out.glob("*.tar")}
    return {split: ShardSet.open(out / f"{split}-*.tar") for split in splits}


def test_common_voice(tmp_path) -> None:
    root = common_voice(tmp_path / "src")
    splits = built("common-voice", root, tmp_path / "out")
    assert {name: len(shards) for name, shards in splits.items()} == {
        "train": 3, "dev": 1, "test": 1,
    }  # fmt: skip
    texts = {u.text for u in found("common-voice", root).values()}
    assert texts == {
        "Ein Satz.", 'Ein "wörtlicher" Satz.', "Zwei Worte mehr", 'Er sagte "Ja" und "Nein"',
        '"Ja" und "Nein"',
    }  # fmt: skip
    about = splits["train"].read_json(splits["train"].keys.to_pylist().index("common_voice_de_1"))
    assert about["raw_text"] == '"Ein ""wörtlicher"" Satz."'
    assert (about["language"], about["speaker"], about["age"]) == ("de", "c1", "twenties")
    assert (
        found("common-voice", root / "cv-corpus-21.0-2025-03-14" / "de").keys()
        == found("common-voice", root).keys()
    )


def test_common_voice_names_what_is_wrong(tmp_path) -> None:
    root = common_voice(tmp_path)
    table = next(root.rglob("train.tsv"))
    table.write_text(table.read_text() + "only\ttwo\n")
    faults = [f for f in READERS["common-voice"](root) if isinstance(f, Fault)]
    assert [(f.where, f.reason, f.split) for f in faults] == [
        ("de/train.tsv:5", "wrong columns: expected 13, found 2", "train")
    ]
    table.write_text("path\tsentence\nx.mp3\ttext\n")
    with pytest.raises(CorpusError, match="no column 'client_id'"):
        list(READERS["common-voice"](root))


def test_fleurs(tmp_path) -> None:
    root = fleurs(tmp_path / "src")
    splits = built("fleurs", root, tmp_path / "out")
    assert {name: sorted(shards.keys.to_pylist()) for name, shards in splits.items()} == {
        split: [f"cmn_hans_cn-100{n}", f"en_us-100{n}"]
        for n, split in enumerate(("train", "dev", "test"))
    }
    about = splits["dev"].read_json(splits["dev"].keys.to_pylist().index("en_us-1001"))
    assert (about["text"], about["transcription"]) == ("The Cat, “quoted”.", "the cat quoted")
    assert (about["language"], about["sentence"], about["locale"]) == ("en", "1", "en_us")
    assert set(splits["test"].languages.to_pylist()) == {"en", "cmn"}
    assert len(found("fleurs", root / "data")) == 6
    assert len(found("fleurs", root / "data" / "en_us")) == 3


def test_fleurs_as_archives(tmp_path) -> None:
    audio = fleurs(tmp_path) / "data" / "en_us" / "audio"
    (audio / "dev").rename(tmp_path / "data" / "en_us" / "dev")  # an older release
    assert "en_us-1001" in found("fleurs", tmp_path)
    (audio / "train").rename(tmp_path / "elsewhere")
    (audio / "train.tar.gz").touch()
    with pytest.raises(CorpusError, match=r"no folder audio/train .* unpack .*train.tar.gz"):
        list(READERS["fleurs"](tmp_path))


def test_gigaspeech(tmp_path) -> None:
    root = gigaspeech(tmp_path / "src")
    splits = built("gigaspeech", root, tmp_path / "out")
    assert {name: len(shards) for name, shards in splits.items()} == {
        "xl": 1, "m": 1, "dev": 1, "test": 0,
    }  # fmt: skip
    assert splits["xl"].read_json(0)["text"] == "it's the largest, yes."
    assert splits["xl"].read_json(0)["raw_text"] == "IT'S THE LARGEST <COMMA> YES <PERIOD>"
    assert (splits["m"].texts[0].as_py(), splits["dev"].texts[0].as_py()) == (
        "middle?", "held out!",
    )  # fmt: skip
    assert splits["m"].num_samples.tolist() == [28_000]
    reasons = {
        json.loads(line)["key"][-1]: json.loads(line)["reason"]
        for path in (tmp_path / "out").glob("*.jsonl")
        for line in path.read_text().splitlines()
    }
    assert reasons == {"3": "no speech: tagged <MUSIC>", "4": "bad span: 5 to 9 s of 6 s"}


def test_a_span_is_that_part_of_the_whole(tmp_path) -> None:
    path = tmp_path / "x.flac"
    soundfile.write(path, noise(16_000 * 20), 16_000)
    whole = decode(path, max_seconds=30)
    for start, stop in ((0, 20), (0, 5), (3.5, 19.25), (19.9, 20)):
        part = decode(path, max_seconds=20, span=(start, stop))
        assert np.array_equal(part, whole[round(start * 16_000) : round(stop * 16_000)])
    for span in ((-1, 2), (2, 2), (3, 2), (0, 20.1)):
        with pytest.raises(AudioError, match="bad span"):
            decode(path, max_seconds=20, span=span)
    with pytest.raises(AudioError, match="too long"):
        decode(path, max_seconds=5, span=(0, 6))


@pytest.mark.parametrize("kind", ["common-voice", "fleurs", "gigaspeech"])
def test_another_layout(kind: str, tmp_path) -> None:
    with pytest.raises(CorpusError, match="layout, expected"):
        list(READERS[kind](tmp_path))
