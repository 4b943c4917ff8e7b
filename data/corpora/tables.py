"""Tab-separated tables as corpora ship them, and the spelling that all of them need."""

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

Row = dict[str, str] | str


def tidy(text: str) -> str:
    """Unicode's composed form (NFC), one space where there is white space, none at the ends."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip()


def rows(path: Path, columns: list[str] | None = None) -> Iterator[tuple[int, Row]]:
    """Line numbers with rows by column name, or with why the line is none.

    Without `columns` the first line names them. Quotes are characters like any other.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                fields = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield number, f"not UTF-8: {error}"
                continue
            found = fields.split("\t")
            if columns is None:
                columns = found
            elif len(found) != len(columns):
                yield number, f"wrong columns: expected {len(columns)}, found {len(found)}"
            else:
                yield number, dict(zip(columns, found, strict=True))
