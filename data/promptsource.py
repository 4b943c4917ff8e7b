"""PromptSource's and xP3's templates as ours, where they can be put to a transcript.

    python -m data.promptsource templates.yaml prompts.yaml --language es --heldout 0.1

PromptSource keeps a data set's templates in one YAML file: Jinja text, in which `|||` parts the
prompt from the answer. The answers are the LLM's own here, so the prompt alone is read. It must
have one place for the transcript and need nothing else; what the published multi-instruction sets
got wrong (they rendered placeholders: 27 of BLOOMZMMS's 209 wordings that are no translation pairs
are letters of a field's name, or a `<built-in method`) is refused here, by name and with the
reason. Templates are strangers' programs: they run in Jinja's sandbox.
"""

import argparse
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import yaml
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.bounded import bounded
from data.parsing import brief, parse_yaml
from data.templates import Template, TemplateError, write_templates

_MARK = "\ue000Transcript\ue001"  # of private use: no template has it; in two cases of letters
_LONGEST = 2000  # characters of an instruction
_LONGEST_SOURCE = 20_000  # of a template
_SECONDS, _BYTES = 2.0, 256 << 20  # what rendering one may take


class Unfit(Exception):
    """Why one template cannot be used."""


@dataclass(frozen=True)
class Refused:
    """A template that was not taken over."""

    name: str
    reason: str


class _Transcript:
    """Stands for the transcript while a template is rendered: all that it can do is be printed.

    A string here would let through what the published sets are full of: a field that is looped
    over letter by letter, cut at a number of characters, or asked for a method.
    """

    def __str__(self) -> str:
        return _MARK

    def __html__(self) -> str:
        return _MARK

    def __iter__(self) -> Any:
        raise Unfit("takes the transcript for a list")

    def __getitem__(self, at: object) -> Any:
        raise Unfit("cuts the transcript, or takes a part of it")

    def __bool__(self) -> bool:
        return True  # no transcript is empty

    def __len__(self) -> int:
        raise Unfit("counts the transcript")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise Unfit(f"asks the transcript for {name!r}")

    def __eq__(self, other: object) -> bool:
        raise Unfit("compares the transcript")

    __hash__ = None  # type: ignore[assignment]


class _Loader(yaml.SafeLoader):
    """Reads PromptSource's own tags as plain mappings; makes no objects."""


def _mapping(loader: Any, node: Any) -> Any:
    return loader.construct_mapping(node, deep=True)


for _tag in ("!Template", "!TemplateMetadata"):
    _Loader.add_constructor(_tag, _mapping)


def read_promptsource(
    path: Path,
    *,
    language: str | None = None,
    task: str | None = None,
    field: str | None = None,
    known: Sequence[Template] = (),
) -> tuple[list[Template], list[Refused]]:
    """The usable templates of one file, and the others with the reason.

    Args:
        language: of the utterances they fit; None takes the templates' own, where it is one.
        task: None takes the data set's name.
        field: the Jinja variable that is the transcript; None takes the only one of a prompt.
        known: what other files had; wordings are not repeated, nor are names.

    Raises:
        TemplateError: it is no such file.
    """
    try:
        tree = parse_yaml(path.read_bytes(), _Loader)
    except FileNotFoundError:
        raise TemplateError(f"template file {path} does not exist") from None
    except ValueError as error:
        raise TemplateError(f"{path} is {error}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("templates"), dict):
        raise TemplateError(f"{path}: expected a mapping with `templates`, as PromptSource writes")
    named = [tree[part] for part in ("dataset", "subset") if tree.get(part)]
    dataset = "/".join(part if isinstance(part, str) else brief(part) for part in named)
    taken: list[Template] = []
    refused: list[Refused] = []
    seen = {(t.instruction, t.language): t.name for t in known}
    for number, raw in tree["templates"].items():
        own = raw.get("name", number) if isinstance(raw, dict) else number
        name = f"{dataset}/{own if isinstance(own, str) else brief(own)}"
        try:
            instruction = _instruction(raw, field)
            code = language or _language(raw)
            if first := seen.get((instruction, code)):
                raise Unfit(f"repeats the wording of {first}")
        except Unfit as unfit:
            refused.append(Refused(name, str(unfit)))
            continue
        seen[instruction, code] = name
        origin = f"PromptSource {dataset} {number if isinstance(number, str) else brief(number)}"
        taken.append(
            Template(
                _unique(name, [*known, *taken]), task or dataset, code, instruction, origin=origin
            )
        )
    return taken, refused


def hold_out(templates: Sequence[Template], share: float) -> list[Template]:
    """The same templates, about `share` of them marked as held out, by their names alone."""

    def drawn(name: str) -> float:
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2.0**64

    return [replace(t, heldout=drawn(t.name) < share) for t in templates]


def _instruction(raw: Any, field: str | None) -> str:
    """A template's prompt with `{input}` for the transcript; raises `Unfit`."""
    if not isinstance(raw, dict) or not isinstance(raw.get("jinja"), str):
        raise Unfit("has no Jinja text")
    source = raw["jinja"].partition("|||")[0]
    if len(source) > _LONGEST_SOURCE:
        raise Unfit(f"is longer than {_LONGEST_SOURCE} characters")
    try:
        # Reading it is enough to run it: Jinja computes what is constant.
        with bounded(_SECONDS, _BYTES):
            text = _rendered(source, _choices(raw), field)
    except Unfit:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise Unfit(f"its prompt is no Jinja text by itself ({error.message})") from None
    except jinja2.exceptions.SecurityError as error:
        raise Unfit(f"does what the sandbox forbids ({error})") from None
    except (TimeoutError, MemoryError):
        raise Unfit(f"takes more than {_SECONDS} s or {_BYTES >> 20} MB to render") from None
    except Exception as error:  # a stranger's program: whatever Python can raise
        raise Unfit(f"cannot be rendered ({' '.join(str(error).split())[:200]})") from None
    return _checked(text.strip())


def _rendered(source: str, choices: list[str], field: str | None) -> str:
    """The prompt with a mark for the transcript; raises `Unfit`, and whatever Jinja does."""
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    needed = meta.find_undeclared_variables(environment.parse(source)) - {"answer_choices"}
    needed -= set(environment.globals)
    if not needed:
        raise Unfit("has no place for the transcript")
    transcript = field or (next(iter(needed)) if len(needed) == 1 else None)
    if transcript is None or needed - {transcript}:
        others = ", ".join(sorted(needed - {transcript}))
        raise Unfit(f"needs more than the transcript: {others}")
    if transcript not in needed:
        raise Unfit(f"has no place for {transcript!r}")
    values = {transcript: _Transcript(), "answer_choices": choices}
    return environment.from_string(source).render(values)


def _checked(text: str) -> str:
    """A rendered prompt, as an instruction; raises `Unfit` where it is broken."""
    if (found := text.count(_MARK)) != 1:
        raise Unfit("changes the transcript" if not found else f"has the transcript {found} times")
    wording = text.replace(_MARK, " ")
    if not wording.strip():
        raise Unfit("has no wording beside the transcript")
    if fault := broken(wording):
        raise Unfit(fault)
    if len(wording) > _LONGEST:
        raise Unfit(f"is longer than {_LONGEST} characters")
    return text.replace(_MARK, "{input}")


_BROKEN = (
    (re.compile(r"<(built-in|bound) method|<function |object at 0x"), "has a printed method"),
    (re.compile(r"\{\{|\}\}|\{%|%\}|\{(input|instruction)\}"), "has unresolved variables"),
    (re.compile(r"\w\[[\w'\"]*:?\s*\d*\]"), "has a program's brackets"),
    (re.compile(r"(\b\w, ){4,}\w\b"), "has a word spelled out as a list"),
    (re.compile(r"\b(?=\w*[a-z])(?=\w*\d)\w{16,}\b"), "has a garbled word"),
    (re.compile(r"\b[a-z]+_[a-z]\w*\b"), "has a field's name"),
    (re.compile(r"\ufffd|[\x00-\x08\x0e-\x1f]"), "has broken characters"),
)


def broken(wording: str) -> str | None:
    """What is wrong with a wording that has been rendered already, or None.

    For sets that are handed on in that form (as BLOOMZMMS's is), where the mistakes of whoever
    rendered them can only be told by their looks.
    """
    for pattern, fault in _BROKEN:
        if found := pattern.search(wording):
            return f"{fault}: {found[0]!r}"
    return None


def _choices(raw: dict[str, Any]) -> list[str]:
    """The template's fixed answer choices; choices that depend on the sample are none."""
    text = raw.get("answer_choices") or ""
    if not isinstance(text, str):
        raise Unfit(f"has answer choices that are no text: {brief(text)}")
    return [] if "{{" in text or "{%" in text else [part.strip() for part in text.split("|||")]


def _language(raw: dict[str, Any]) -> str:
    about = raw.get("metadata")
    named = about.get("languages") if isinstance(about, dict) else None
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise Unfit(f"fits no one language: its own are {brief(named or [])}; name one")
    return named[0]


def _unique(name: str, taken: Sequence[Template]) -> str:
    names = {t.name for t in taken}
    number = 2
    while name in names:
        name = f"{name.removesuffix(f'-{number - 1}')}-{number}"
        number += 1
    return name


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, nargs="+", help="PromptSource's templates.yaml")
    parser.add_argument("output", type=Path, help="the YAML list to write")
    parser.add_argument("--language", help="of the utterances (default: each template's own)")
    parser.add_argument("--task", help="name of the task (default: the data set's)")
    parser.add_argument("--field", help="the variable that is the transcript (default: the only)")
    parser.add_argument("--heldout", type=float, default=0.0, help="share of wordings to hold out")
    args = parser.parse_args(argv)
    taken: list[Template] = []
    refused: list[Refused] = []
    try:
        for path in args.source:
            more, faulty = read_promptsource(
                path, language=args.language, task=args.task, field=args.field, known=taken
            )
            taken += more
            refused += faulty
    except TemplateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for each in refused:
        print(f"refused {each.name}: {each.reason}")
    reasons = Counter(re.split("[:(]", each.reason)[0].strip() for each in refused)
    print(f"{len(taken)} wordings taken, {len(refused)} refused")
    for reason, count in reasons.most_common():
        print(f"  {count} because it {reason}")
    write_templates(args.output, hold_out(taken, args.heldout))
    return 0


if __name__ == "__main__":
    sys.exit(main())
