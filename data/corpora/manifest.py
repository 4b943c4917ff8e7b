"""A plain manifest: JSON lines (.jsonl), or tab-separated values with a header line (.tsv).

Fields: `key`, `audio` (a path, relative to the manifest), `text`; optional `language`, `speaker`,
`split`; whatever else a row has is kept. Transcripts are taken as they are.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.corpora.utterance import CorpusError, Fault, Utterance
from data.parsing import parse_json

_REQUIRED = ("key", "audio", "text")
_OPTIONAL = ("language", "speaker", "split")


def read(path: Path) -> Iterator[Utterance | Fault]:
    """`path` is a .jsonl or .tsv file; rows that cannot be read come as faults with their line."""
    if not path.is_file():
        raise CorpusError(f"{path}: no such manifest file")
    rows = {".jsonl": _json_rows, ".tsv": _tsv_rows}.get(path.suffix)
    if rows is None:
        raise CorpusError(f"{path}: a manifest ends in .jsonl or .tsv, found {path.suffix!r}")
    for number, row in rows(path):
        fault = row if isinstance(row, str) else _fault(row)
        if fault or isinstance(row, str):
            yield Fault(f"{path.name}:{number}", fault or "", None)
            continue
        extra = {k: v for k, v in row.items() if k not in (*_REQUIRED, *_OPTIONAL)}
        language, speaker, split = (row.get(name) or None for name in _OPTIONAL)
        text = row["text"]
        audio = path.parent / row["audio"]
        yield Utterance(row["key"], audio, text.strip(), text, language, speaker, split, extra)


def _fault(row: dict[str, Any]) -> str | None:
    for name in _REQUIRED:
        if name not in row:
            return f"no field: {name!r} is missing, found {sorted(row)}"
    for name in (*_REQUIRED, *_OPTIONAL):
        if not isinstance(row.get(name, ""), str | None):
            return f"wrong field: {name!r} must be a string, but is {row[name]!r:.40}"
    for name in _REQUIRED:
        if row[name] is None:
            return f"no field: {name!r} is null"
    return None


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                yield number, str(error)
                continue
            yield number, row if isinstance(row, dict) else "not JSON: an object is expected"


def _tsv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        for number, row in enumerate(reader, 2):
            if None in row or None in row.values():
                columns = len(reader.fieldnames or ())
                yield number, f"wrong columns: the header has {columns}, this line has not"
            else:
                yield number, dict(row)
