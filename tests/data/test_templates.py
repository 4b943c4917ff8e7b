"""Wordings as data: which an utterance gets, and what a file must not hold."""

from collections import Counter
from pathlib import Path

import pytest
import yaml

from data.templates import (
    Choice,
    Template,
    TemplateError,
    load_templates,
    read_templates,
    write_templates,
)


def rows(*changes: dict) -> list[dict]:
    base = {"task": "t", "language": "*", "instruction": "do it"}
    return [{"name": f"n{i}"} | base | change for i, change in enumerate(changes)]


def file(path: Path, *changes: dict) -> Path:
    path.write_text(yaml.safe_dump(rows(*changes)))
    return path


def wordings(count: int, **fields: object) -> list[Template]:
    made = {"task": "t", "language": "*", "instruction": "do"} | fields
    return [Template(f"n{i}", **made) for i in range(count)]  # type: ignore[arg-type]


def names(choice: Choice, key: str, language: str = "en") -> list[str | None]:
    return [template and template.name for _, template in choice.of(key, language)]


def test_tasks_may_be_patterns(tmp_path: Path) -> None:
    path = file(
        tmp_path / "p.yaml", {"task": "tr_de"}, {"task": "tr_en"}, {"task": "sum"},
        {"task": "tr_fr", "heldout": True},
    )  # fmt: skip
    assert [t.task for t in load_templates(path, ["tr_*"])] == ["tr_de", "tr_en"]
    assert [t.task for t in load_templates(path, ["sum|tr_de"])] == ["tr_de", "sum"]
    with pytest.raises(TemplateError, match=r"no template of task 'tr_fr' to train with"):
        load_templates(path, ["tr_fr"])


@pytest.mark.parametrize(
    ("language", "fits", "not_fits"),
    [
        ("*", ["en", "xx"], []),
        ("en", ["en", "en_us", "en-GB"], ["de", "eng"]),
        (("en", "de"), ["de_at", "en"], ["es"]),
        ("pt-BR", ["pt-BR"], ["pt", "pt-PT"]),
        ("!de", ["en", "xx"], ["de", "de_at"]),
    ],
)
def test_languages(language: object, fits: list[str], not_fits: list[str]) -> None:
    (template,) = wordings(1, language=language)
    assert all(map(template.fits, fits))
    assert not any(map(template.fits, not_fits))


def test_wordings_are_drawn_without_replacement_and_evenly() -> None:
    choice = Choice(wordings(10), {"t": 3}, seed=1)
    counts: Counter = Counter()
    for n in range(2000):
        drawn = names(choice, f"key{n}")
        assert len(set(drawn)) == 3
        counts.update(drawn)
    assert len(counts) == 10
    # 600 each; five standard deviations of a binomial are about 103.
    assert all(abs(count - 600) < 103 for count in counts.values())


def test_the_draw_depends_on_seed_and_key_alone() -> None:
    keys = [f"k{n}" for n in range(50)]
    drawn = [names(Choice(wordings(10), {"t": 2}, seed=1), key) for key in keys]
    again = Choice(wordings(10), {"t": 2}, seed=1)
    assert [names(again, key) for key in reversed(keys)] == drawn[::-1]
    assert [names(Choice(wordings(10), {"t": 2}, seed=2), key) for key in keys] != drawn


def test_a_wording_of_another_language_is_never_drawn() -> None:
    templates = [
        *wordings(3, language="de"),
        Template("en", "t", "en", "do"),
        Template("any", "t", "*", "do"),
    ]
    choice = Choice(templates, {"t": 2}, seed=3)
    for n in range(100):
        assert set(names(choice, f"k{n}", "en_us")) == {"en", "any"}


def test_too_few_wordings_and_none() -> None:
    choice = Choice(wordings(1, language="de"), {"t": 2}, seed=0)
    assert list(choice.of("k", "sw")) == [("t", None)] * 2
    with pytest.raises(TemplateError, match=r"asks for 2 wordings of 't'.* only 1 fit language"):
        list(choice.of("k", "de"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"color": 1}, "unknown"),
        ({"language": False}, "language must be quoted text, found False"),
        ({"heldout": "yes"}, "heldout"),
        ({"answer": "nobody"}, "answer must be llm, transcript or output"),
        ({"instruction": "{input} {input}"}, "may hold {input} once"),
        ({"name": "n0"}, r"names must be unique, but ['n0'] come twice"),
    ],
)
def test_faults_of_a_file(tmp_path: Path, change: dict, said: str) -> None:
    path = file(tmp_path / "p.yaml", {}, change)
    with pytest.raises(TemplateError) as error:
        read_templates(path)
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_what_is_written_is_read(tmp_path: Path) -> None:
    templates = [
        Template("a", "t", ("en", "de"), "Say {input} für mich", heldout=True, origin="o"),
        Template("b", "t", "no", "", answer="transcript", answer_language="*"),
    ]
    write_templates(tmp_path / "p.yaml", templates)
    assert read_templates(tmp_path / "p.yaml") == templates
