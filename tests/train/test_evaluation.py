"""What is asked and how it is scored, in process: the questions, the bounds, the rows."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.shards import ShardSet
from data.tasks import Item, TaskError, load_items, write_items
from tests import tiny
from train import config as cfg
from train.compare import compare, over_seeds, read
from train.compare import main as compare_main
from train.evaluate import check, trained_tasks
from train.evaluation import Evaluation, Result, others
from train.generalisation import COLUMNS, generalisation
from train.model.attention import set_packed
from train.model.respond import Question, Responder
from train.progress import Bar
from train.report import write_json
from train.scores import cells
from train.states import Measured, measure

INPUTS = ("speech", "text", "cascade", "shuffled", "none")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluation")
    tiny.shards(root, count=9, per_shard=5)
    tiny.encoder(root / "encoder")
    tiny.llm(root / "llm")
    return root


@pytest.fixture(scope="module")
def shards(root: Path) -> ShardSet:
    return ShardSet.open(root / "shards" / "train-*.tar")


@pytest.fixture(scope="module")
def config(root: Path) -> cfg.Config:
    tree = tiny.config(root, train__precision="fp32")
    tree["evaluate"] = {
        "shards": [str(root / "shards" / "train-*.tar")], "tasks": str(root / "tasks.jsonl"),
        "max_new_tokens": 4, "batch_size": 4, "states": 3, "resamples": 50,
    }  # fmt: skip
    return cfg.parse(tree, "test")


@pytest.fixture(scope="module")
def responder(config: cfg.Config) -> Responder:
    return Responder(config, None)


def questions(shards: ShardSet) -> dict[str, list[Item]]:
    """A repetition and a choice about every clip, the first in two wordings."""
    found: dict[str, list[Item]] = defaultdict(list)
    for i, key in enumerate(shards.keys.to_pylist()):
        text = shards.texts[i].as_py()
        repeat = Item(key, "repeat", "en", "repeat this", "seen", text, ("wer", "cer"))
        found[key] = [
            repeat,
            replace(repeat, instruction="repeat", wording="unseen"),
            Item(key, "pet", "en", "this", "seen", "cat", ("accuracy", "exact"), ("cat", "a dog")),
            # The same words, with something else to choose from.
            Item(key, "size", "en", "this", "seen", "old", ("f1",), ("old", "new", "red")),
        ]
    return found


@pytest.fixture(scope="module")
def evaluation(config: cfg.Config, responder: Responder, shards: ShardSet) -> Evaluation:
    assert config.evaluate is not None
    clips = list(range(len(shards)))
    return Evaluation(config, config.evaluate, responder, shards, questions(shards), clips)


@pytest.fixture(scope="module")
def answered(evaluation: Evaluation) -> tuple[list[Result], list[Measured]]:
    shown = Bar("", 0, enabled=False)
    found = evaluation.results(list(range(9)), shown)
    assert shown.done == len(found[0])
    return found


def by_name(results: list[Result]) -> dict[tuple[str, str, str], Result]:
    return {(r.item.key, r.item.task + r.item.instruction, r.input): r for r in results}


def test_every_question_is_put_with_every_input_of_the_default(
    config: cfg.Config, answered: tuple[list[Result], list[Measured]]
) -> None:
    assert config.evaluate is not None
    assert config.evaluate.inputs == INPUTS
    results, _ = answered
    assert len(results) == len(by_name(results)) == 9 * 4 * len(INPUTS)
    for r in results:
        assert (r.choice in r.item.options) if r.item.options else r.choice is None
        assert (r.answer is None) == (r.item.task == "size")


def test_answers_and_choices_are_those_of_each_question_alone(
    evaluation: Evaluation, answered: tuple[list[Result], list[Measured]], shards: ShardSet
) -> None:
    heard = evaluation._inputs(list(range(9)))
    for r in answered[0][::4]:
        i = shards.keys.to_pylist().index(r.item.key)
        question = Question(r.item.instruction, heard[i][r.input])
        if r.answer is not None:
            assert evaluation.responder.answer([question], max_new_tokens=4) == [r.answer]
        if r.item.options:
            (scores,) = evaluation.responder.score([question], [r.item.options])
            best = max(
                range(len(scores)), key=lambda n: scores[n].log_probability / scores[n].tokens
            )
            assert r.choice == r.item.options[best]


def test_a_clip_that_is_alone_in_its_chunk_is_shuffled_with_another(
    evaluation: Evaluation, answered: tuple[list[Result], list[Measured]]
) -> None:
    (alone,) = [evaluation._inputs([i]) for i in (8,)]
    together = evaluation._inputs(list(range(9)))
    assert not torch.equal(alone[8]["speech"], alone[8]["shuffled"])
    # The padding of a batch differs: float32 rounding through the encoder.
    other = together[evaluation._other[8]]["speech"]
    torch.testing.assert_close(alone[8]["shuffled"], other, atol=1e-5, rtol=1e-5)


def test_shuffled_audio_says_something_else_in_the_same_language() -> None:
    texts = ["x", "x", "y", "u", "v", "z"]
    languages = ["en", "en", "de", "en", "de", "fr"]
    found = others(texts, languages)
    assert found == [3, 3, 4, 0, 2, 0]  # the only French one takes what there is
    with pytest.raises(cfg.ConfigError, match="all 2 say 'x'; leave it out"):
        others(["x", "x"], ["en", "en"])


def test_no_input_is_the_same_whatever_the_utterance(
    answered: tuple[list[Result], list[Measured]],
) -> None:
    said: dict[str, set[str | None]] = defaultdict(set)
    for r in answered[0]:
        if r.input == "none" and r.answer is not None:
            said[r.item.instruction].add(r.answer)
    assert {len(answers) for answers in said.values()} == {1}
    texts = {r.answer for r in answered[0] if r.input == "text" and r.item.task == "repeat"}
    assert len(texts) > 1


def test_states_are_measured_for_some_utterances_against_their_text(
    answered: tuple[list[Result], list[Measured]],
) -> None:
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for m in answered[1]:
        found[m.input, m.metric].append(m.value)
    assert {metric for _, metric in found} == {
        "state_cosine", "state_l2", "instruction_match", "instruction_cosine", "answer_loss",
    }  # fmt: skip
    assert len(found["speech", "state_cosine"]) == 3 * 4
    assert ("text", "state_cosine") not in found
    assert len(found["text", "instruction_cosine"]) == 3 * 4


def test_the_loss_of_an_answer_is_that_of_its_tokens_and_its_end(
    answered: tuple[list[Result], list[Measured]], evaluation: Evaluation
) -> None:
    """By transformers' own loss, one document at a time."""
    losses = [m for m in answered[1] if m.metric == "answer_loss" and m.input == "text"]
    assert len(losses) == 3 * 4
    responder, keys = evaluation.responder, evaluation.shards.keys.to_pylist()
    decoder, eos = responder.model.decoder, responder.tokenizer.eos_token_id
    for found in losses:
        text = evaluation.shards.texts[keys.index(found.item.key)].as_py()
        prefix, suffix = responder.prompt.parts(found.item.instruction)
        before = [*prefix, *responder.prompt.encode(text), *suffix]
        answer = [*responder.prompt.encode(found.item.answer), eos]
        set_packed(decoder, None)
        ids = torch.tensor([before + answer])
        labels = torch.tensor([[-100] * len(before) + answer])
        assert found.value == pytest.approx(float(decoder(ids, labels=labels).loss), rel=1e-4)


def test_distances_are_what_they_are_called() -> None:
    items = [Item("k", task, "en", task, "seen", "", ("exact",)) for task in ("a", "b", "c")]
    eye = torch.eye(3)
    states = {"text": 2 * eye, "speech": 4 * eye, "shuffled": 2 * eye.roll(1, 0)}
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for m in measure(items, states):
        found[m.input, m.metric].append(m.value)
    assert found["speech", "state_cosine"] == [1, 1, 1]
    assert found["speech", "state_l2"] == [1, 1, 1]
    assert found["speech", "instruction_match"] == [100, 100, 100]
    assert found["shuffled", "state_cosine"] == [0, 0, 0]
    assert found["shuffled", "instruction_match"] == [0, 0, 0]
    assert found["shuffled", "state_l2"] == pytest.approx([2**0.5] * 3)
    assert found["text", "instruction_cosine"] == [0, 0, 0]
    collapsed = measure(items, {"text": eye[:1].expand(3, -1)})
    assert [m.value for m in collapsed] == [1, 1, 1]


def results_of(right: dict[tuple[str, str, str], int]) -> list[Result]:
    """Ten questions each of (task, wording, input), so many of them answered rightly."""
    return [
        Result(
            Item(f"k{n}", task, "en", f"{task} {wording}", wording, "yes", ("exact",)),
            source, "yes" if n < count else "no",
        )
        for (task, wording, source), count in right.items()
        for n in range(10)
    ]  # fmt: skip


RIGHT = {
    ("old", "seen", "speech"): 9, ("old", "unseen", "speech"): 6,
    ("new", "seen", "speech"): 5, ("new", "unseen", "speech"): 4,
    ("newer", "seen", "speech"): 3, ("newer", "unseen", "speech"): 4,
    ("old", "seen", "text"): 10, ("old", "unseen", "text"): 10,
    ("new", "seen", "text"): 9, ("new", "unseen", "text"): 9,
    ("newer", "seen", "text"): 8, ("newer", "unseen", "text"): 8,
}  # fmt: skip


def rows_of(right: dict[tuple[str, str, str], int]) -> list[dict[str, Any]]:
    found = cells(results_of(right), [], normaliser="plain", resamples=100, trained=["ol*|other"])
    return [cell.row for cell in found]


def test_rows_carry_wording_and_training_and_the_drop() -> None:
    rows = {(r["task"], r["language"], r["input"], r["wording"]): r for r in rows_of(RIGHT)}
    assert len(rows) == 3 * 2 * 2 * 4
    old = rows["old", "all", "speech", "seen"]
    assert (old["value"], old["count"], old["metric"], old["trained"]) == (90, 10, "exact", True)
    assert old["low"] < 90 <= old["high"]
    assert rows["old", "en", "speech", "all"]["value"] == 75
    drop = rows["old", "en", "speech", "drop"]
    assert drop["value"] == pytest.approx(30)
    # Paired: of ten utterances three are lost, so the drop is 0 in a resample without them only.
    assert 0 <= drop["low"] <= 30 <= drop["high"] <= 70
    assert rows["newer", "en", "speech", "drop"]["value"] == pytest.approx(-10)
    assert rows["new", "en", "speech", "all"]["trained"] is False


def test_a_drop_is_positive_where_the_error_rate_rises() -> None:
    item = Item("k", "repeat", "en", "repeat", "seen", "a b", ("wer",))
    worse = replace(item, instruction="again", wording="unseen")
    results = [Result(item, "speech", "a b"), Result(worse, "speech", "a")]
    found = cells(results, [], normaliser="plain", resamples=0, trained=[])
    rows = {r["wording"]: r for r in (c.row for c in found) if r["language"] == "all"}
    assert rows["drop"]["value"] == 50
    assert rows["drop"]["low"] is None
    assert rows["drop"]["trained"] is None


def test_what_an_item_says_of_its_training_counts() -> None:
    found = results_of({("old", "seen", "speech"): 9})
    told = [replace(r, item=replace(r.item, trained=False)) for r in found]
    rows = [c.row for c in cells(told, [], normaliser="plain", resamples=0, trained=["old"])]
    assert {r["trained"] for r in rows} == {False}


def test_generalisation_is_two_by_two_with_the_text_beside() -> None:
    scored = cells(results_of(RIGHT), [], normaliser="plain", resamples=100, trained=["old"])
    table = {
        (r["trained"], r["column"]): r
        for r in generalisation(scored)
        if r["language"] == "all" and r["input"] == "speech"
    }
    values = {at: round(r["value"], 6) for at, r in table.items()}
    assert values == {
        ("yes", "seen"): 90, ("yes", "unseen"): 60, ("yes", "drop"): 30, ("yes", "all"): 75,
        ("yes", "gap"): 25,
        ("no", "seen"): 40, ("no", "unseen"): 40, ("no", "drop"): 0, ("no", "all"): 40,
        ("no", "gap"): 45,
    }  # fmt: skip
    assert table["no", "seen"]["tasks"] == 2
    for r in table.values():
        assert r["low"] <= r["value"] <= r["high"]


def test_tasks_that_are_held_out_altogether_are_in_it() -> None:
    right = {k: n for k, n in RIGHT.items() if k[0] == "old" or k[1] == "unseen"}
    scored = cells(results_of(right), [], normaliser="plain", resamples=100, trained=["old"])
    found = {
        (r["trained"], r["wordings"], r["column"]): round(r["value"], 6)
        for r in generalisation(scored)
        if r["language"] == "all" and r["input"] == "speech"
    }
    assert {at[2]: v for at, v in found.items() if at[:2] == ("yes", "both")}.keys() == set(COLUMNS)
    assert {at[2]: v for at, v in found.items() if at[0] == "no"} == {
        "unseen": 40, "all": 40, "gap": 45
    }  # fmt: skip


def test_seeds_give_students_interval() -> None:
    mean, low, high = over_seeds([10.0, 12.0, 14.0])
    # t(0.975, 2) = 4.3027; the standard error is 2 / sqrt(3).
    assert (mean, low, high) == pytest.approx((12, 12 - 4.9683, 12 + 4.9683), abs=1e-3)
    assert over_seeds([3.0]) == (3.0, None, None)


def test_compare_reads_files_and_sets_systems_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    better = RIGHT | {("old", "seen", "speech"): 10}
    for name, right in (("a1", RIGHT), ("a2", better), ("b1", RIGHT)):
        write_json(tmp_path / f"{name}.json", rows_of(right))
    out = tmp_path / "out.json"
    systems = [f"{name[0]}={tmp_path / name}.json" for name in ("a1", "a2", "b1")]
    compare_main([*systems, "--json", str(out)])
    rows = {
        (r["system"], r.get("task"), r["wording"]): r
        for r in json.loads(out.read_text())
        if r["input"] == "speech" and r["language"] == "all" and "wording" in r
    }
    a, b = rows["a", "old", "seen"], rows["b", "old", "seen"]
    assert (a["value"], a["seeds"], b["value"], b["seeds"]) == (95, 2, 90, 1)
    assert a["low"] == pytest.approx(95 - 12.7062 * 5, abs=1e-2)
    own = [r for r in read(tmp_path / "b1.json") if r["task"] == "old" and r["wording"] == "seen"]
    assert b["low"] in {r["low"] for r in own}
    shown = capsys.readouterr().out
    assert "generalisation" in shown
    # Of the scores, all wordings together unless another one is asked for.
    scores = shown.partition("generalisation")[0]
    assert "│ all     │" in scores
    assert "│ seen    │" not in scores
    compare_main([*systems, "--wording", "seen"])
    scores = capsys.readouterr().out.partition("generalisation")[0]
    assert "95.0 [31.5, 158.5]" in scores
    assert "│ seen    │" in scores
    assert any(r["column"] == "gap" for r in json.loads(out.read_text()) if "column" in r)


def test_compare_says_what_does_not_belong_together(tmp_path: Path) -> None:
    rows = rows_of(RIGHT)
    with pytest.raises(cfg.ConfigError, match="is in 1 of the 2 results of 'x'"):
        compare({"x": [rows, rows[1:]]}, ("task", "language", "input", "wording", "metric"))
    (tmp_path / "x.json").write_text('[{"task": "a"}]')
    with pytest.raises(cfg.ConfigError, match=r"no result of train/evaluate\.py"):
        read(tmp_path / "x.json")
    with pytest.raises(cfg.ConfigError, match="does not exist"):
        read(tmp_path / "y.json")


def test_trained_tasks_are_what_the_targets_say(root: Path, shards: ShardSet) -> None:
    from data.shards import write_overlay

    target = {"instruction": "i", "template": "t", "ids": [5], "text": "x", "finished": True}
    rows = [(key, {"targets": [target]}) for key in shards.keys.to_pylist()]
    path = root / "made" / "targets-0.tar"
    path.parent.mkdir()
    meta = {"tasks": ["*"], "counts": {"tasks": {"continue": 3, "who": 1}}}
    write_overlay(path, rows, meta=meta, base=shards)
    saved = {"data": {"targets": [str(path)]}, "behave": {"tasks": ["changed"]}}
    assert trained_tasks(saved) == ("continue", "who")
    assert trained_tasks({**saved, "data": {"targets": ["gone-*.tar"]}}) == ("changed",)
    gone = {"data": {"targets": ["gone-*.tar"]}}
    assert trained_tasks({**gone, "behave": None}) == ()
    # Held-out tasks are not taken by it, and it does not say which they are.
    assert trained_tasks({**gone, "behave": {"tasks": {"*": 2}}}) == ()


ROW = {
    "key": "k", "task": "t", "language": "en", "instruction": "i", "wording": "seen",
    "answer": "a", "metric": "exact",
}  # fmt: skip


def test_task_files_come_back_as_they_were_written(tmp_path: Path) -> None:
    items = [
        Item("k", "t", "en", "line\u2028break", "seen", "a", ("wer", "cer")),
        Item("k", "t", "en", "i", "unseen", "a", ("accuracy",), ("a", "b"), False),
    ]
    assert write_items(tmp_path / "t.jsonl", items) == 2
    assert load_items(tmp_path / "t.jsonl", {"k"}) == items


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"key": "other"}, "'other' is in none of the evaluation's shards"),
        ({"wording": "new"}, "'wording' must be one of"),
        ({"answer": None}, "'answer' must be a string, but is None"),
        ({"option": ["a"]}, "unknown field 'option'"),
        ({"options": ["b", "c"]}, "the answer 'a' is none of its options"),
        ({"options": ["a", "a"]}, "has one twice"),
        ({"metric": []}, "'metric' is empty"),
        ({"metric": 3}, "must be a list of strings"),
        ({"trained": "yes"}, "'trained' must be true or false"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(ROW | {"instruction": "0"}) + "\n" + json.dumps(ROW | change) + "\n")
    with pytest.raises(TaskError, match=r"t\.jsonl:2: ") as caught:
        load_items(path, {"k"})
    assert said in str(caught.value)


def test_a_file_that_is_missing_empty_or_asks_twice(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with pytest.raises(TaskError, match="does not exist"):
        load_items(path, set())
    path.write_text("\n")
    with pytest.raises(TaskError, match="asks nothing"):
        load_items(path, set())
    path.write_text((json.dumps(ROW) + "\n") * 2)
    with pytest.raises(TaskError, match=r"asks .* again"):
        load_items(path, {"k"})
    path.write_text("{")
    with pytest.raises(TaskError, match=r"t\.jsonl:1: "):
        load_items(path, {"k"})


def test_metrics_must_exist_and_have_options_to_choose_from() -> None:
    item = Item("k", "t", "en", "i", "seen", "a", ("rouge",))
    with pytest.raises(cfg.ConfigError, match="metric 'rouge'; known are wer"):
        check([item], Path("t"))
    with pytest.raises(cfg.ConfigError, match="'accuracy', which needs `options`"):
        check([replace(item, metrics=("accuracy",))], Path("t"))
    check([replace(item, metrics=("accuracy", "wer"), options=("a",))], Path("t"))
