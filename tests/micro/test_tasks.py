"""Tasks: what is asked, in which words, and the answers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml

from data.tasks import parse
from data.templates import load_templates
from examples.micro import grammar, tasks, vocabulary
from examples.micro.grammar import Meaning
from examples.micro.lexicon import LANGUAGES

MEANING = Meaning(subject=3, verb=5, object=1, place=2, adverb=0)


def test_held_out_wordings_are_in_no_training() -> None:
    trained = [text for texts, _ in tasks.WORDINGS.values() for text in texts]
    unseen = [text for _, texts in tasks.WORDINGS.values() for text in texts]
    assert len(set(trained + unseen)) == len(trained + unseen), "a wording asks for two tasks"
    for texts, held in tasks.WORDINGS.values():
        assert len(texts) >= 2
        assert held


@pytest.mark.parametrize(
    ("task", "language", "answer"),
    [
        ("repeat", "en", "the doctor gladly loses the cheese in the kitchen"),
        ("translate_de", "es", "die ärztin verliert gern den käse in der küche"),
        ("summarise", "es", "la doctora pierde el queso"),
        ("topic", "de", "food"),
        ("sentiment", "en", "bad"),
        ("who", "de", "die ärztin"),
        ("what", "de", "den käse"),
        ("where", "es", "en la cocina"),
        ("when", "en", "unknown"),
        (
            "continue",
            "en",
            "but the farmer gladly loses nothing"
            " because in the kitchen the doctor smells the cheese",
        ),
    ],
)
def test_answers(task: str, language: str, answer: str) -> None:
    assert tasks.answer(task, MEANING, language) == answer


def test_the_instruction_decides_the_answer() -> None:
    meaning = next(grammar.meanings(random.Random(0), heldout=True))
    answers = [tasks.answer(task, meaning, "en") for task in tasks.tasks("en")]
    assert len(set(answers)) > len(answers) - 2  # where and when may both be unknown


def test_evaluation_rows_ask_every_task_in_seen_and_unseen_words() -> None:
    rows = tasks.evaluation_rows("900-9001-0000", MEANING, "en", index=5)
    assert {row["task"] for row in rows} == set(tasks.WORDINGS) - {"translate_en"}
    for row in rows:
        trained, unseen = tasks.WORDINGS[row["task"]]
        assert row["instruction"] in (trained if row["wording"] == "seen" else unseen)
        item = parse(row)
        assert item.row() | {"metric": list(item.metrics)} == row
        assert ("accuracy" in item.metrics) == bool(item.options)


def test_prompt_file_is_one_that_stage_1_reads(tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(yaml.safe_dump(tasks.prompt_rows(), allow_unicode=True))
    templates = load_templates(path, ("continue", "translate_de"))
    assert {t.instruction for t in templates if t.task == "continue"} == set(
        tasks.WORDINGS["continue"][0]
    )
    assert {t.language for t in templates if t.task == "translate_de"} == {"en", "es"}
    assert len({row["name"] for row in tasks.prompt_rows()}) == len(tasks.prompt_rows())


def test_the_tokenizer_knows_every_word_and_joins_seamlessly() -> None:
    tokenizer = vocabulary.tokenizer()
    for language in LANGUAGES:
        for task in tasks.tasks(language):
            answer = tasks.answer(task, MEANING, language)
            ids = tokenizer.encode(answer)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == answer
    whole = tasks.PROMPT_TEMPLATE.format(instruction="answer who", input="the girl finds the cat")
    before, after = tasks.PROMPT_TEMPLATE.split("{input}")
    pieces = [before.format(instruction="answer who"), "the girl finds the cat", after]
    joined = [id_ for piece in pieces for id_ in tokenizer.encode(piece)]
    assert joined == tokenizer.encode(whole)


def test_the_tokenizer_forgives_case_and_punctuation() -> None:
    tokenizer = vocabulary.tokenizer()
    assert tokenizer.encode("Say it in Spanish.") == tokenizer.encode("say it in spanish")
