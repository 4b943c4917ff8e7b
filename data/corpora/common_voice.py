"""Common Voice: cv-corpus-VERSION/LANGUAGE/{train,dev,test}.tsv and clips/*.mp3.

The official, disjoint splits train, dev and test are read; `validated.tsv`, of which they are
drawn, and `other`, `invalidated` and `reported` are not. Transcripts are as they were read aloud;
quotation marks that their export put around a whole sentence are taken off, those within it that
it doubled are undone, and they are tidied (NFC, single spaces). Case and punctuation stay.
"""

from collections.abc import Iterator
from pathlib import Path

from data.corpora.tables import rows, tidy
from data.corpora.utterance import CorpusError, Fault, Utterance

_SPLITS = ("train", "dev", "test")
_NEEDED = ("client_id", "path", "sentence")
_KEPT = ("age", "gender", "accents", "variant", "sentence_domain")


def read(root: Path) -> Iterator[Utterance | Fault]:
    """`root` is the folder of a language, or the unpacked corpus of one or more of them."""
    folders = [root, *sorted(p for p in (*root.glob("*"), *root.glob("*/*")) if p.is_dir())]
    tables = [folder / f"{split}.tsv" for folder in folders for split in _SPLITS]
    tables = [table for table in tables if table.is_file() and (table.parent / "clips").is_dir()]
    if not tables:
        raise CorpusError(
            f"{root}: not in Common Voice's layout, expected LANGUAGE/{{train,dev,test}}.tsv and "
            "LANGUAGE/clips in it"
        )
    for table in tables:
        for number, row in rows(table):
            where = f"{table.parent.name}/{table.name}:{number}"
            if isinstance(row, str):
                yield Fault(where, row, table.stem)
            elif missing := [name for name in _NEEDED if name not in row]:
                raise CorpusError(f"{table}: no column {missing[0]!r}, found {sorted(row)}")
            else:
                yield _utterance(row, table)


def _utterance(row: dict[str, str], table: Path) -> Utterance:
    audio = table.parent / "clips" / row["path"]
    if not audio.suffix:  # releases before the fourth
        audio = audio.with_suffix(".mp3")
    extra = {name: row[name] for name in _KEPT if row.get(name)}
    language = row.get("locale") or table.parent.name
    raw = row["sentence"]
    return Utterance(
        audio.stem, audio, spoken(raw), raw, language, row["client_id"], table.stem, extra
    )


def spoken(raw: str) -> str:
    """A sentence of its tables as it was read aloud."""
    text = tidy(raw)
    if len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1].replace('""', ""):
        text = text[1:-1]
    return tidy(text.replace('""', '"'))
