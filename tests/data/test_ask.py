"""Evaluation sets: corpora with answers in their own layouts, in miniature, to task files."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile
import yaml

from data import ask, build
from data.corpora import READERS, CorpusError, Fault, Utterance
from data.shards import ShardSet
from data.tasks import Item, TaskError, load_items
from tests.data.made import noise

SETS = sorted(Path("configs/sets").glob("*.yaml"))
CV_HEADER = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccent"


def covost(root: Path) -> Path:
    """English into German and Catalan, and German into English, over two folders of a release."""
    release = root / "cv-corpus-4"
    for language, sentences in {
        "en": ['"It ""is"" so."', "Two  words.", "Three.", "Four.", "Not translated.", "Added."],
        "de": ["Ein Satz."],
    }.items():
        clips = release / language / "clips"
        clips.mkdir(parents=True)
        lines = [CV_HEADER]
        for n, sentence in enumerate(sentences):
            name = f"common_voice_{language}_{n}.mp3"
            soundfile.write(clips / name, noise(16_000, n), 16_000, format="MP3")
            lines.append(f"c{n}\t{name}\t{sentence}\t2\t0\t\t\t")
        (release / language / "validated.tsv").write_text("\n".join(lines) + "\n")
    splits = ["test", "test", "dev", "train", None, "train_covost"]

    def table(name: str, rows: list[tuple[str, str, str]]) -> None:
        lines = ["path\ttranslation\tsplit", *("\t".join(row) for row in rows)]
        (release / "en" / name).write_text("\n".join(lines) + "\n")

    for target in ("de", "ca"):
        table(
            f"covost_v2.en_{target}.tsv",
            [
                (f"common_voice_en_{n}.mp3", f'\\"{target}\\"  {n}', split)
                for n, split in enumerate(splits)
                if split
            ],
        )
    rows = [("common_voice_de_0.mp3", "A sentence.", "test"), ("gone.mp3", "Gone.", "test")]
    table("covost_v2.de_en.tsv", rows)
    return root


def read(kind: str, root: Path) -> tuple[dict[str, Utterance], list[Fault]]:
    entries = list(READERS[kind](root))
    found = {u.key: u for u in entries if isinstance(u, Utterance)}
    return found, [f for f in entries if isinstance(f, Fault)]


def test_covost(tmp_path: Path) -> None:
    found, faults = read("covost", covost(tmp_path))
    assert {u.key[13:]: u.split for u in found.values()} == {
        "en_0": "test", "en_1": "test", "en_2": "dev", "en_3": "train", "en_5": "train",
        "de_0": "test",
    }  # fmt: skip
    first = found["common_voice_en_0"]
    assert (first.text, first.raw_text) == ('It "is" so.', '"It ""is"" so."')
    assert first.extra == {"translation_ca": '"ca" 0', "translation_de": '"de" 0'}
    assert (first.language, first.speaker) == ("en", "c0")
    assert found["common_voice_de_0"].extra == {"translation_en": "A sentence."}
    assert [(f.where, f.reason) for f in faults] == [
        ("gone.mp3", "no clip: de/validated.tsv does not have it")
    ]


def test_covost_as_its_own_script_splits_it(tmp_path: Path) -> None:
    root = covost(tmp_path)
    folder = root / "cv-corpus-4" / "en"
    whole, _ = read("covost", root)
    for target in ("de", "ca"):
        table = folder / f"covost_v2.en_{target}.tsv"
        rows = [line.split("\t") for line in table.read_text().splitlines()[1:]]
        table.unlink()
        for split in ("train", "dev", "test"):
            lines = ["path\tsentence\ttranslation\tclient_id"]
            lines += [f"{p}\tx\t{t}\tc" for p, t, s in rows if s in (split, f"{split}_covost")]
            path = folder / f"covost_v2.en_{target}.{split}.tsv"
            path.write_text("\n".join(lines) + "\n")
    assert read("covost", root)[0] == whole


def test_covost_names_what_is_wrong(tmp_path: Path) -> None:
    root = covost(tmp_path)
    table = root / "cv-corpus-4" / "en" / "covost_v2.en_ca.tsv"
    table.write_text(
        "path\ttranslation\tsplit\ncommon_voice_en_0.mp3\tx\tdev\ncommon_voice_en_1.mp3\t \ttest\n"
        "one\n"
    )
    found, faults = read("covost", root)
    assert found["common_voice_en_1"].extra.keys() == {"translation_de"}
    # Of two tables that disagree, the first by name is believed.
    assert found["common_voice_en_0"].split == "dev"
    assert [f.reason for f in faults if f.where.startswith("covost_v2.en")] == [
        "empty translation", "wrong columns: expected 3, found 1",
        "two splits: test here, dev in another table",
    ]  # fmt: skip
    table.write_text("path\ttext\tsplit\nx\ty\ttest\n")
    with pytest.raises(CorpusError, match="no column 'translation'"):
        read("covost", root)
    table.rename(table.with_name("covost_v2.fr_en.tsv"))
    with pytest.raises(CorpusError, match=r"expected fr/validated\.tsv and fr/clips"):
        read("covost", root)
    with pytest.raises(CorpusError, match="not in CoVoST 2's layout"):
        read("covost", tmp_path / "cv-corpus-4" / "de" / "clips")


def fleurs(root: Path) -> Path:
    """Three sentences in English, the first read twice; two of them in German; no French audio."""
    readings = {
        "en_us": [("1", "The cat."), ("1", "The cat."), ("2", "A  dog."), ("3", "No bird.")],
        "de_de": [("2", "Ein Hund."), ("1", "Die Katze.")],
    }
    for locale, sentences in readings.items():
        folder = root / "data" / locale / "audio" / "test"
        folder.mkdir(parents=True)
        lines = []
        for n, (sentence, text) in enumerate(sentences):
            soundfile.write(folder / f"{n}.wav", noise(8000, n), 16_000)
            lines.append(f"{sentence}\t{n}.wav\t{text}\tx\tx\t8000\tFEMALE\n")
        (root / "data" / locale / "test.tsv").write_text("".join(lines))
    return root


def asked(config: dict[str, Any], root: Path, tmp_path: Path) -> list[Item]:
    """By the command: the set file written, the task file read back."""
    path, out = tmp_path / "set.yaml", tmp_path / "tasks.jsonl"
    path.write_text(yaml.safe_dump(config))
    assert ask.main([str(path), str(root), str(out)]) == 0
    keys = {json.loads(line)["key"] for line in out.read_text().splitlines()}
    return load_items(out, keys)


def test_fleurs_is_translated_through_its_sentences(tmp_path: Path) -> None:
    config = yaml.safe_load(Path("configs/sets/fleurs.yaml").read_text())
    items = asked(config, fleurs(tmp_path / "src"), tmp_path)
    answers = {(i.key, i.task): i.answer for i in items}
    assert answers == {
        ("en_us-0", "repeat"): "The cat.", ("en_us-0", "translate_de"): "Die Katze.",
        ("en_us-1", "repeat"): "The cat.", ("en_us-1", "translate_de"): "Die Katze.",
        ("en_us-2", "repeat"): "A dog.", ("en_us-2", "translate_de"): "Ein Hund.",
        ("en_us-3", "repeat"): "No bird.",
        ("de_de-0", "repeat"): "Ein Hund.", ("de_de-0", "translate_en"): "A dog.",
        ("de_de-1", "repeat"): "Die Katze.", ("de_de-1", "translate_en"): "The cat.",
    }  # fmt: skip
    assert {i.wording for i in items} == {"seen", "unseen"}
    assert Counter(i.wording for i in items)["seen"] == len(answers)


def test_covost_from_download_to_shards_and_questions(tmp_path: Path) -> None:
    root = covost(tmp_path / "src")
    command = ["covost", str(root), str(tmp_path / "out"), "--workers", "1", "--max-skipped", "1"]
    assert build.main(command) == 0
    shards = ShardSet.open(tmp_path / "out" / "test-*.tar")
    config = yaml.safe_load(Path("configs/sets/covost.yaml").read_text())
    items = asked(config, root, tmp_path)
    assert {i.key for i in items} == set(shards.keys.to_pylist())
    english = [i for i in items if i.key == "common_voice_en_0"]
    assert {(i.task, i.wording): i.answer for i in english if i.task != "repeat"} == {
        (f"translate_{code}", wording): f'"{code}" 0'
        for code in ("de", "ca") for wording in ("seen", "unseen")
    }  # fmt: skip
    assert {i.metrics for i in english} == {("wer", "cer"), ("bleu", "chrf")}


# What a row of each set's manifest holds beside key, audio and text (docs/evaluation.md).
MANIFESTS: dict[str, list[dict[str, str]]] = {
    "slurp": [
        {"split": "test", "intent": "alarm_set", "scenario": "alarm"},
        {"split": "test", "intent": "play_music", "scenario": "play"},
        {"split": "devel", "intent": "other", "scenario": "other"},
    ],
    "fluent_speech_commands": [
        {"split": "test", "action": "activate", "object": "lights", "location": "kitchen"},
        {"split": "test", "action": "increase", "object": "volume", "location": "none"},
    ],
    "speechglue": [
        {"split": "validation", "sst2": "1"},
        {"split": "validation", "rte": "0", "sentence2": "It rains {here}."},
    ],
    "xnli": [
        {"split": "test", "label": "0", "hypothesis": "Es regnet.", "language": "de"},
        {"split": "test", "label": "contradiction", "hypothesis": "It is dry."},
    ],
}
ANSWERS = {
    "slurp": {"intent": ["alarm_set", "play_music"], "scenario": ["alarm", "play"]},
    "fluent_speech_commands": {"command": ["activate lights kitchen", "increase volume none"]},
    "speechglue": {"sst2": ["positive"], "rte": ["yes"]},
    "xnli": {"xnli": ["Yes", "No"]},
}


@pytest.mark.parametrize("name", sorted(MANIFESTS))
def test_a_manifest_holds_any_set(name: str, tmp_path: Path) -> None:
    rows = [
        {"key": f"u{n}", "audio": f"u{n}.wav", "text": "x", "language": "en", **row}
        for n, row in enumerate(MANIFESTS[name])
    ]
    for row in rows:
        soundfile.write(tmp_path / row["audio"], noise(16_000), 16_000)
    manifest = tmp_path / "set.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert build.main(["manifest", str(manifest), str(tmp_path / "out"), "--workers", "1"]) == 0
    config = yaml.safe_load(Path(f"configs/sets/{name}.yaml").read_text())
    items = asked(config, manifest, tmp_path)
    found: dict[str, list[str]] = {}
    for item in items:
        assert item.answer in item.options
        if item.wording == "seen":
            found.setdefault(item.task, []).append(item.answer)
    assert found == ANSWERS[name]
    if name == "xnli":
        assert [i.instruction for i in items if i.key == "u0"] == [
            "Is the following true, then? Yes, no or maybe? Es regnet.",
            "Es regnet. Does that follow? Yes, no or maybe?",
        ]
        assert items[0].language == "de"
    if name == "speechglue":
        assert items[-1].instruction == "Can one conclude from this: It rains {here}."


def utterance(n: int, **extra: str) -> Utterance:
    return Utterance(f"u{n}", Path("x.wav"), "text", "text", "en", "s", "test", extra)


def a_set(tmp_path: Path, **changes: Any) -> ask.Set:
    task = {"task": "t", "answer": "{label}", "metric": "exact", "seen": ["a", "b"]}
    tree = {"corpus": "manifest", "tasks": [task | changes.pop("task", {})]} | changes
    path = tmp_path / "set.yaml"
    path.write_text(yaml.safe_dump(tree))
    return ask.load_set(path)


def test_wordings_take_turns_and_come_from_templates_too(tmp_path: Path) -> None:
    found = [utterance(n, label="x") for n in range(4)]
    items = list(ask.items(a_set(tmp_path, task={"unseen": ["c"]}), found))
    assert [i.instruction for i in items if i.wording == "seen"] == ["a", "b", "a", "b"]
    assert [i.instruction for i in items if i.wording == "unseen"] == ["c"] * 4
    wordings = [
        {"name": "1", "task": "t", "language": "en", "instruction": "say {input} so"},
        {"name": "2", "task": "t", "language": "de", "instruction": "sag es"},
        {"name": "3", "task": "t", "language": "*", "instruction": "new", "heldout": True},
        {"name": "4", "task": "u", "language": "*", "instruction": "other"},
    ]
    templates = tmp_path / "templates.yaml"
    templates.write_text(yaml.safe_dump(wordings))
    about = a_set(tmp_path, task={"seen": []}, templates=str(templates))
    (seen, unseen) = ask.items(about, found[:1])
    assert (seen.instruction, seen.wording) == ("say {input} so", "seen")
    assert (unseen.instruction, unseen.wording) == ("new", "unseen")


def test_what_has_no_answer_is_not_asked_and_limits_are_per_language(tmp_path: Path) -> None:
    found = [utterance(0, label="x"), utterance(1), utterance(2, label="")]
    assert [i.key for i in ask.items(a_set(tmp_path), found)] == ["u0"]
    about = yaml.safe_load(Path("configs/sets/fleurs.yaml").read_text()) | {"limit": 1}
    items = asked(about, fleurs(tmp_path / "src"), tmp_path)
    assert {i.key for i in items} == {"en_us-0", "de_de-0"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"corpus": "covost3"}, "corpus 'covost3' is none of"),
        ({"splits": "test"}, "unknown key 'splits'"),
        ({"tasks": []}, "tasks must be a list"),
        ({"task": {"seen": []}}, "has no wording"),
        ({"task": {"anwer": "x"}}, "unknown key 'anwer'"),
    ],
)
def test_a_bad_set_file_is_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"set\.yaml") as caught:
        a_set(tmp_path, **changes)
    assert said in str(caught.value)


def test_answers_outside_of_options_or_map_and_missing_fields_stop(tmp_path: Path) -> None:
    found = [utterance(0, label="x")]
    with pytest.raises(TaskError, match="none of its options"):
        list(ask.items(a_set(tmp_path, task={"options": ["y"]}), found))
    with pytest.raises(TaskError, match="its map has nothing for 'x' of 'u0'"):
        list(ask.items(a_set(tmp_path, task={"map": {"y": "z"}}), found))
    with pytest.raises(TaskError, match="no field 'other'"):
        list(ask.items(a_set(tmp_path, task={"seen": ["{other}"]}), found))
    with pytest.raises(TaskError, match="does not exist"):
        ask.load_set(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_the_sets_that_come_along_are_well_formed(path: Path) -> None:
    about = ask.load_set(path)
    assert about.corpus in READERS
    assert {path.stem for path in SETS} >= {"covost", "fleurs", *MANIFESTS}
    assert replace(about, limit=1).limit == 1
