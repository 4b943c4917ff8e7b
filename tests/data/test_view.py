"""Samples to look at: all of a document, its label mask and its speech, with and without colour."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from rich.console import Console

from data.align import main as align
from data.collate import Clip, Sample, Word
from data.prompts import Prompt, Speech, Text
from data.shards import ShardSet, write_overlay
from data.view import main, show
from tests import tiny
from tests.data import made
from train import config as cfg
from train.feed import open_feed
from train.view import main as view_of_config


@pytest.fixture(scope="module")
def prompt(tmp_path_factory) -> Prompt:
    return Prompt(tiny.tokenizer(tmp_path_factory.mktemp("tokenizer")), tiny.PROMPT)


def interleaved(prompt: Prompt, finished: bool = True) -> Sample:
    old, cat, sees, dog = (tuple(prompt.encode(word)) for word in ("old", "cat", "sees", "dog"))
    parts = (Speech(0, 3), Text(cat), Speech(5, 2))
    return Sample(
        "k1",
        (*prompt.with_parts("repeat this", parts), prompt.answer((*old, *cat), finished)),
        Clip(made.noise(8000), 8000, 24, 7),
        words=(Word(0, 2, old), Word(3, 2, cat), Word(5, 1, sees), Word(6, 1, dog)),
    )


def test_a_document_with_its_slots_words_and_labels(prompt) -> None:
    line = show(interleaved(prompt), prompt)
    assert line.plain.splitlines() == [
        "k1: 14 positions (5 prompt, 5 slots, 1 words to read, 3 labels)",
        " <user> repeat this : <slots 0-2: old> {cat} <slots 5-6: sees dog> <assistant> "
        "[old cat </s>]",
    ]
    assert "[old cat]" in show(interleaved(prompt, finished=False), prompt).plain
    styles = {line.plain[s.start : s.end].strip(): str(s.style) for s in line.spans}
    assert styles["{cat}"] == "yellow"
    assert styles["[old cat </s>]"] == "bold green"
    assert styles["<slots 5-6: sees dog>"] == "cyan"


def test_colour_is_for_terminals_alone(prompt, capsys) -> None:
    Console().print(show(interleaved(prompt), prompt))
    assert "\x1b" not in capsys.readouterr().out
    Console(force_terminal=True, color_system="standard", soft_wrap=True).print(
        show(interleaved(prompt), prompt)
    )
    assert "\x1b[33m {cat}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """Shards, a target for each sample, word times, models and a config that interleaves."""
    root = tmp_path_factory.mktemp("view")
    tiny.shards(root, count=12, per_shard=6)
    tiny.encoder(root / "encoder")
    tiny.llm(root / "llm")
    tiny.prompts(root / "prompts.yaml")
    base = ShardSet.open(root / "shards")
    items = [(key, {"targets": [made.target(tokens=4)]}) for key in base.keys.to_pylist()]
    write_overlay(root / "targets" / "targets-000000.tar", items, base=base)
    arguments = [str(root / "shards"), str(root / "words"), "--model", str(root / "encoder")]
    assert align(arguments) == 0
    interleave = {"span_words": [1, 2], "pure_speech": 0.25}
    changes = {"data__words": [str(root / "words")], "data__interleave": interleave}
    tiny.write_config(root / "view.yaml", tiny.config(root, **changes))
    return root


def test_samples_as_they_are_stored(workspace, capsys) -> None:
    overlays = ["--targets", str(workspace / "targets"), "--words", str(workspace / "words")]
    assert main([str(workspace / "shards"), *overlays, "--count", "3"]) == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"^utt\d{4}: \d\.\d\d s, en$", said, re.MULTILINE)) == 3
    assert said.count("say 0 [x] (ended)") == 3
    assert re.search(r" \w+<\d\.\d\d> \w+<\d\.\d\d>", said)
    assert main([str(workspace / "shards"), "--key", "none"]) == 1
    assert main([]) == 1
    assert "key 'none' is in none of the shards" in capsys.readouterr().err


def test_samples_as_the_model_of_a_config_sees_them(workspace, capsys) -> None:
    config = str(workspace / "view.yaml")
    view_of_config(["--config", config, "--epoch", "1", "--count", "12"])
    said = capsys.readouterr().out
    heads = re.findall(r"^(utt\d{4}): (\d+) positions", said, re.MULTILINE)
    stream = open_feed(cfg.load(config)).stream
    planned = dict(zip(stream.shards.keys.to_pylist(), stream.lengths.tokens(1), strict=True))
    assert {key: int(count) for key, count in heads} == planned
    assert re.search(r"<slots \d+-\d+.*> \{[\w ]+\}|\{[\w ]+\} <slots", said)
    assert len(re.findall(r"\[[^]]+</s>\]$", said, re.MULTILINE)) == 12
    key = heads[3][0]
    view_of_config(["--config", config, "--key", key, "--set", "data.interleave=null"])
    assert re.fullmatch(rf"{key}: .*\n.* : <slots 0-[^{{]*\n", capsys.readouterr().out)


def test_a_config_is_for_the_room_that_knows_it(workspace, capfd) -> None:
    assert main(["--config", str(workspace / "none.yaml")]) == 2
    assert "none.yaml does not exist" in capfd.readouterr().err


def test_interleaving_is_part_of_the_datas_digest(workspace) -> None:
    config = str(workspace / "view.yaml")
    without = "data.interleave=null"
    changes = ([], ["data.interleave.pure_speech=0.5"], [without], [without, "data.words=[]"])
    assert len({open_feed(cfg.load(config, change)).digest for change in changes}) == 4
