"""PromptSource templates: the usable ones are taken over, the broken ones named with the reason."""

from pathlib import Path

import pytest
import yaml

from data.promptsource import broken, hold_out, main, read_promptsource
from data.templates import read_templates

# As PromptSource stores them, tags and all.
TEMPLATE = """\
dataset: news
subset: short
templates:
  {number}: !Template
    answer_choices: {choices}
    id: {number}
    jinja: {jinja}
    metadata: !TemplateMetadata
      choices_in_prompt: true
      languages: {languages}
      metrics: [Accuracy]
      original_task: true
    name: {name}
    reference: ''
"""


def read(tmp_path: Path, jinja: str, choices: str = "good ||| bad", languages="[en]", **options):
    path = tmp_path / "templates.yaml"
    path.write_text(
        TEMPLATE.format(
            number="24e44a81", name="a wording", choices=yaml.safe_dump(choices).split("\n")[0],
            jinja=yaml.safe_dump(jinja, width=10_000).strip().removesuffix("\n..."),
            languages=languages,
        )
    )  # fmt: skip
    return read_promptsource(path, **options)


@pytest.mark.parametrize(
    ("jinja", "instruction"),
    [
        ("{{text}}\nIs it good? ||| {{answer_choices[label]}}", "{input}\nIs it good?"),
        ('Is "{{ text }}" good or bad?', 'Is "{input}" good or bad?'),
        (
            "Choose {{ answer_choices[0] }} or {{ answer_choices | last }}: {{ text }} ||| {{x}}",
            "Choose good or bad: {input}",
        ),
        (
            "{% if text %}Choose from {{ answer_choices | join(', ') }}.{% endif %} {{ text }}|||x",
            "Choose from good, bad. {input}",
        ),
        ("{# of them #}Fill in the ____ of {{ text }}", "Fill in the ____ of {input}"),
    ],
)
def test_usable_templates(tmp_path: Path, jinja: str, instruction: str) -> None:
    taken, refused = read(tmp_path, jinja)
    assert refused == []
    (template,) = taken
    assert template.instruction == instruction
    assert (template.task, template.language) == ("news/short", "en")
    assert template.origin == "PromptSource news/short 24e44a81"


@pytest.mark.parametrize(
    ("jinja", "reason"),
    [
        ("{{ text | join(', ') }} is what?", "takes the transcript for a list"),
        ("{% for c in text %}{{ c }}{% endfor %} is what?", "takes the transcript for a list"),
        ("What is {{ text[:100] }}?", "cuts the transcript"),
        ("What is {{ text[0] }}?", "cuts the transcript"),
        ("What is {{ text.title }}?", "asks the transcript for 'title'"),
        ("What is {{ text.split('.')[0] }}?", "asks the transcript for 'split'"),
        ("What is {{ text | length }}?", "counts the transcript"),
        ("What is {{ text | lower }}?", "changes the transcript"),
        ("What is {{ text | truncate(5) }}?", "the transcript"),
        ("{% if text == 'x' %}a{% endif %}{{ text }} b", "compares the transcript"),
        ("Is {{ text }} of {{ title }}?", "needs more than the transcript: text, title"),
        ("What is it? ||| {{ text }}", "has no place for the transcript"),
        ("{{ text }}", "has no wording"),
        ("{{ text }} and {{ text }}?", "has the transcript 2 times"),
        ("{% if text %}a {{ text }} ||| b{% endif %}", "no Jinja text by itself"),
        ("{{ answer_choices[7] }} or {{ text }}?", "cannot be rendered"),
        ("{{ text }} is <built-in method title of str>", "has a printed method"),
        ("What is c, m, r, h, o of {{ text }}?", "spelled out as a list"),
        ("document_plaintext[:100] {{ text }}", "has a"),
        ("Cmrhoceolmsgretwtuneue4 {{ text }}", "has a garbled word"),
        ("{{ '{{' }} x }} {{ text }}", "has unresolved variables"),
        ("{{ cycler.__init__.__globals__ }} {{ text }}", "sandbox"),
        ("{{ ''.__class__.__mro__ }} {{ text }}", "sandbox"),
        ("{% for i in range(999999999) %}x{% endfor %}{{ text }}", "cannot be rendered"),
        ("{{ 'x' * 2000000000 }}{{ text }}", "to render"),
        ("{{ 'x' | center(2000000000) }}{{ text }}", "to render"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
            "{{ text }}",
            "to render",
        ),
        ("{{ 9 ** (9 ** 9) }}{{ text }}", "to render"),
        ("{{ text }} {{ " + "(" * 500 + "1" + ")" * 500 + "}}", "cannot be rendered"),
    ],
)
def test_broken_templates_are_refused_with_the_reason(
    tmp_path: Path, jinja: str, reason: str
) -> None:
    taken, (refused,) = read(tmp_path, jinja)
    assert taken == []
    assert refused.name == "news/short/a wording"
    assert reason in refused.reason


def test_choices_that_depend_on_the_sample_are_none(tmp_path: Path) -> None:
    _, (refused,) = read(tmp_path, "{{ answer_choices[0] }}? {{ text }}", "{{a}} ||| {{b}}")
    assert "cannot be rendered" in refused.reason


def test_languages_fields_and_tasks(tmp_path: Path) -> None:
    jinja = "In {{ lang }}: {{ text }}"
    assert "lang, text" in read(tmp_path, jinja)[1][0].reason
    jinja = "What is {{ text }}?"
    assert "fits no one language" in read(tmp_path, jinja, languages="[en, es]")[1][0].reason
    (template,), _ = read(tmp_path, jinja, languages="[]", language="es", task="qa", field="text")
    assert (template.task, template.language) == ("qa", "es")


def test_no_objects_are_made_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "templates.yaml"
    path.write_text("templates: !!python/object/apply:os.system ['touch pwned']\n")
    assert main([str(path), str(tmp_path / "out.yaml")]) == 2
    assert not Path("pwned").exists()


def test_the_command_counts_and_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n, jinja in enumerate(["a {{ x }}", "b {{ x }}", "b {{ x }}", "c {{ x[:9] }}"]):
        read(tmp_path, jinja)
        (tmp_path / "templates.yaml").rename(tmp_path / f"{n}.yaml")
    sources = [str(tmp_path / f"{n}.yaml") for n in range(4)]
    assert main([*sources, str(tmp_path / "out.yaml"), "--heldout", "0.5"]) == 0
    said = capsys.readouterr().out
    assert "2 wordings taken, 2 refused" in said
    assert "refused news/short/a wording: repeats the wording of" in said
    assert "1 because it cuts the transcript" in said
    assert [t.instruction for t in read_templates(tmp_path / "out.yaml")] == [
        "a {input}",
        "b {input}",
    ]


def test_held_out_by_name(tmp_path: Path) -> None:
    (one,), _ = read(tmp_path, "a {{ x }}")
    assert [t.heldout for t in hold_out([one], 0.0)] == [False]
    assert [t.heldout for t in hold_out([one], 1.0)] == [True]


@pytest.mark.parametrize(
    "wording",
    ["Say it in German.", "Is it good, bad, or so-so?", "Which of A, B, C, D is it?", "____"],
)
def test_good_wordings_are_not_broken(wording: str) -> None:
    assert broken(wording) is None
