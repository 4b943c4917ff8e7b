"""Instruction templates as data: YAML lists of wordings, and which of them an utterance gets.

    - name: mtbi-translate-de-1     unique in its file
      task: translate_de            what it asks for; a held-out task has held-out wordings alone
      language: [en, es]            of the utterances it fits: a code, a list of them, "*" for all,
                                    or "!de" for all but one
      instruction: "Say it in German."
      origin: "our own"             paper, data set or author
      heldout: false                kept out of training, to measure unseen wordings
      answer: llm                   `llm` answers, or the target is the `transcript` itself, or the
                                    row's own `output` (of instruction data, see `data.corpora`)
      answer_language: de           what the answer must be in: a code, "*" for the utterance's
                                    own, or "" for any (see `data.filters`)

An instruction stands before the input, where the run's prompt has `{instruction}`. One that holds
`{input}` itself says where the input goes, in the prompt's place (see `data.prompts`). With the
empty instruction the LLM just answers what is said (AZeroS, 2601.06086).
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml

from data.parsing import brief, parse_yaml


class TemplateError(ValueError):
    """A template file is missing, malformed, or has nothing for what was asked."""


@dataclass(frozen=True)
class Template:
    """One wording of one task; the fields are the file's."""

    name: str
    task: str
    language: str | tuple[str, ...]
    instruction: str
    heldout: bool = False
    origin: str = ""
    answer: Literal["llm", "transcript", "output"] = "llm"
    answer_language: str = ""

    def fits(self, language: str) -> bool:
        """Whether it can be put to an utterance in `language`: "en" also fits "en_us"."""
        own = (self.language,) if isinstance(self.language, str) else self.language
        codes = (language, primary(language))
        return any(
            code[1:] not in codes if code.startswith("!") else code in ("*", *codes) for code in own
        )


def primary(language: str) -> str:
    """The code without script and region: "en_us" and "en-GB" give "en"."""
    return language.replace("_", "-").partition("-")[0].lower()


def load_templates(path: Path, tasks: Sequence[str]) -> list[Template]:
    """The templates of `tasks` that are not held out, in the file's order.

    A task may be a pattern, or several joined by "|": `translate_*|summarise`.

    Raises:
        TemplateError: the file is missing or malformed, or has none for one of `tasks`.
    """
    templates = read_templates(path)
    trained = [t for t in templates if not t.heldout]
    for task in tasks:
        if not any(matches(t, task) for t in trained):
            raise TemplateError(
                f"{path} has no template of task {task!r} to train with; "
                f"it has {sorted({t.task for t in templates})}"
            )
    return [t for t in trained if any(matches(t, task) for task in tasks)]


def matches(template: Template, task: str) -> bool:
    """Whether the template is of a task, or of one that the pattern names."""
    return any(fnmatchcase(template.task, pattern) for pattern in task.split("|"))


def read_templates(path: Path) -> list[Template]:
    """All templates of a file, those held out among them; raises `TemplateError`."""
    try:
        rows = parse_yaml(Path(path).read_bytes())
    except FileNotFoundError:
        raise TemplateError(f"template file {path} does not exist") from None
    except ValueError as e:
        raise TemplateError(f"template file {path} is {e}") from None
    numbered = enumerate(rows if isinstance(rows, list) else [rows])
    templates = [_template(row, f"{path}: entry {number}") for number, row in numbered]
    twice = [name for name, n in Counter(t.name for t in templates).items() if n > 1]
    if twice:
        raise TemplateError(f"{path}: names must be unique, but {brief(twice)} come twice")
    return templates


def _template(row: Any, where: str) -> Template:
    known = {f.name for f in fields(Template)}
    kind: Any
    if not isinstance(row, dict) or not {"name", "task", "language", "instruction"} <= set(row):
        raise TemplateError(
            f"{where} must have name, task, language, instruction; found {brief(row)}"
        )
    if set(row) - known:
        raise TemplateError(f"{where} has unknown {brief(sorted(map(str, set(row) - known)))}")
    if isinstance(row["language"], list):
        row = row | {"language": tuple(row["language"])}
    for name, value in row.items():
        kind = {"heldout": bool, "language": str | tuple}.get(name, str)
        codes = value if name == "language" and isinstance(value, tuple) else ()
        if not isinstance(value, kind) or not all(isinstance(code, str) for code in codes):
            # YAML reads a bare `no` (Norwegian) as False.
            raise TemplateError(f"{where}: {name} must be quoted text, found {brief(value)}")
    if row.get("answer", "llm") not in ("llm", "transcript", "output"):
        raise TemplateError(
            f"{where}: answer must be llm, transcript or output, found {brief(row['answer'])}"
        )
    if row["instruction"].count("{input}") > 1:
        raise TemplateError(f"{where}: instruction may hold {{input}} once, found {brief(row)}")
    return Template(**row)


def write_templates(path: Path, templates: Sequence[Template]) -> None:
    """Write a file that `read_templates` reads; what has its default is left out."""
    defaults = {f.name: f.default for f in fields(Template)}
    rows = [
        {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(template).items()
            if value != defaults[name]
        }
        for template in templates
    ]
    text = yaml.safe_dump(rows, allow_unicode=True, sort_keys=False, width=10_000)
    Path(path).write_text(text, encoding="utf-8")


class Choice:
    """Which wordings each utterance gets: `tasks` says how many of which task or pattern.

    Drawn without replacement from those that fit the utterance's language, by (seed, key) alone.
    """

    def __init__(self, templates: Sequence[Template], tasks: Mapping[str, int], seed: int):
        self.templates = list(templates)
        self.tasks, self._seed = dict(tasks), seed
        self._fitting: dict[tuple[str, str], list[Template]] = {}

    def of(self, key: str, language: str) -> Iterator[tuple[str, Template | None]]:
        """(task, template) of each target, in order; None where no wording fits the language.

        Raises:
            TemplateError: a task has fewer fitting wordings than targets are asked of it.
        """
        for task, count in self.tasks.items():
            fitting = self._of_task(task, language)
            if not fitting:
                yield from [(task, None)] * count
                continue
            if len(fitting) < count:
                raise TemplateError(
                    f"behave.tasks asks for {count} wordings of {task!r} an utterance, but only "
                    f"{len(fitting)} fit language {language!r}; add wordings, or ask for fewer"
                )
            for number in _sample(len(fitting), count, f"{self._seed}/{task}/{key}"):
                yield task, fitting[number]

    def _of_task(self, task: str, language: str) -> list[Template]:
        if (task, language) not in self._fitting:
            self._fitting[task, language] = [
                t for t in self.templates if matches(t, task) and t.fits(language)
            ]
        return self._fitting[task, language]


def _sample(n: int, count: int, address: str) -> list[int]:
    """`count` distinct numbers below n: the same ones for one address, in any Python."""
    left = list(range(n))
    for at in range(count):
        digest = hashlib.blake2b(f"{address}/{at}".encode(), digest_size=8).digest()
        other = at + int.from_bytes(digest, "big") % (n - at)
        left[at], left[other] = left[other], left[at]
    return left[:count]
