"""Instruction data as Alpaca has it: text alone, `instruction`, `input` and `output` in each row.

A file of JSON lines, or one JSON list (`alpaca_data.json` as it is published). A row's text is
what the LLM is asked, put together as BLSP's preparation puts it (2309.00916): the instruction, a
full stop where it ends without a mark, and the input behind a space where there is one. Its answer
stays in the row as `output`, for a template of `answer: output`. Optional: `key` (else the file's
name and the row's number), `language`, `split`; whatever else a row has is kept.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.corpora.utterance import CorpusError, Fault, Utterance

_OPTIONAL = ("key", "input", "language", "split")


def read(path: Path) -> Iterator[Utterance | Fault]:
    """`path` is a .jsonl or .json file; rows that cannot be read come as faults with their number.

    Rows are counted from 1 (in JSON lines: the file's lines).
    """
    if not path.is_file():
        raise CorpusError(f"{path}: no such file of instructions")
    if path.suffix not in (".json", ".jsonl"):
        raise CorpusError(f"{path}: instructions end in .json or .jsonl, found {path.suffix!r}")
    for number, row in _rows(path):
        if fault := _fault(row):
            yield Fault(f"{path.name}:{number}", fault, None)
            continue
        key = row.get("key") or f"{path.stem}-{number:07d}"
        extra = {k: v for k, v in row.items() if k not in ("key", "language", "split")}
        language, split = row.get("language") or None, row.get("split") or None
        text = request(row["instruction"], row.get("input") or "")
        yield Utterance(key, None, text, text, language, None, split, extra)


def request(instruction: str, given: str) -> str:
    """What the LLM is asked: an instruction and its input, if it has one, as one text."""
    instruction, given = instruction.strip(), given.strip()
    if not instruction.endswith((".", "!", "?")):
        instruction += "."
    return f"{instruction} {given}" if given else instruction


def _fault(row: Any) -> str | None:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        return "not JSON: an object is expected"
    for name in ("instruction", "output"):
        if name not in row:
            return f"no field: {name!r} is missing, found {sorted(row)}"
    for name in ("instruction", "output", *_OPTIONAL):
        if not isinstance(row.get(name) or "", str):
            return f"wrong field: {name!r} must be a string, but is {row[name]!r:.40}"
    for name in ("instruction", "output"):
        if not (row[name] or "").strip():
            return f"empty field: {name!r}"
    return None


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows with their numbers; what is not JSON comes as the reason."""
    if path.suffix == ".json":
        try:
            rows = json.loads(path.read_bytes())
        except ValueError as error:
            raise CorpusError(f"{path}: not JSON: {error}") from None
        if not isinstance(rows, list):
            raise CorpusError(f"{path}: must hold one list of rows, found {type(rows).__name__}")
        yield from enumerate(rows, 1)
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    yield number, f"not JSON: {error}"
