"""Instruction templates: one YAML list of wordings with task, language and origin."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path

import yaml


class TemplateError(ValueError):
    """A template file is missing, malformed, or has nothing for what was asked."""


@dataclass(frozen=True)
class Template:
    """One wording of one task."""

    name: str
    task: str
    language: str
    """Language of the utterances it fits, or `*` for any."""
    instruction: str
    heldout: bool = False
    """Kept out of training, to measure how unseen wordings are followed."""
    origin: str = ""


def load_templates(path: Path, tasks: tuple[str, ...]) -> list[Template]:
    """The templates of `tasks` that are not held out, in the file's order.

    Raises:
        TemplateError: the file is missing or malformed, or has none for one of `tasks`.
    """
    try:
        rows = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise TemplateError(f"template file {path} does not exist") from None
    except yaml.YAMLError as e:
        raise TemplateError(
            f"template file {path} is not YAML: {' '.join(str(e).split())}"
        ) from None
    known = {f.name for f in fields(Template)}
    templates = []
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        if not isinstance(row, dict) or not {"name", "task", "language", "instruction"} <= set(row):
            raise TemplateError(
                f"{path}: entry {number} must have name, task, language, instruction; found {row!r}"
            )
        if set(row) - known:
            raise TemplateError(f"{path}: entry {number} has unknown {sorted(set(row) - known)}")
        templates.append(Template(**row))
    chosen = [t for t in templates if t.task in tasks and not t.heldout]
    for task in tasks:
        if not any(t.task == task for t in chosen):
            raise TemplateError(
                f"{path} has no template of task {task!r} to train with; "
                f"it has {sorted({t.task for t in templates})}"
            )
    return chosen


def choose(templates: list[Template], key: str, language: str, seed: int) -> Template:
    """The template of one utterance: any that fits its language, drawn from (seed, key) alone.

    Raises:
        TemplateError: none fits.
    """
    fitting = [t for t in templates if t.language in ("*", language)]
    if not fitting:
        raise TemplateError(f"no template fits language {language!r} of utterance {key!r}")
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    return fitting[int.from_bytes(digest, "big") % len(fitting)]
