"""CoVoST 2: covost_v2.SOURCE_TARGET.tsv in a Common Voice release (officially the fourth).

    LANGUAGE/validated.tsv, LANGUAGE/clips/*.mp3                  Common Voice
    covost_v2.en_de.tsv                  path, translation, split: as it is downloaded, or
    covost_v2.en_de.{train,dev,test}.tsv   path, translation, ...: as its own script splits it

Audio, sentence and speaker are Common Voice's; the splits are CoVoST's, whose `train` takes in
what it has added (`train_covost`). Each utterance comes once, with its translation into every
TARGET as `translation_TARGET`. Translations are tidied (NFC, single spaces), and the backslashes
that escape their quotation marks are taken off.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.corpora.common_voice import spoken
from data.corpora.tables import rows, tidy
from data.corpora.utterance import CorpusError, Fault, Utterance

_NAME = re.compile(r"covost_v2\.(?P<source>[^_.]+)_(?P<target>[^_.]+)(\.(?P<split>\w+))?\.tsv")
_SPLITS = {"train": "train", "train_covost": "train", "dev": "dev", "test": "test"}


@dataclass
class _Entry:
    """What CoVoST's tables say of one clip."""

    split: str
    translations: dict[str, str] = field(default_factory=dict)


def read(root: Path) -> Iterator[Utterance | Fault]:
    """`root` is a language's folder or contains some; the tables lie in any of these."""
    folders = [root, *sorted(p for p in (*root.glob("*"), *root.glob("*/*")) if p.is_dir())]
    folders = [folder for folder in folders if folder.name != "clips"]
    voices = {f.resolve().name: f for f in folders if (f / "validated.tsv").is_file()}
    tables = [table for f in folders for table in sorted(f.glob("covost_v2.*.tsv"))]
    named = [(table, m) for table in tables if (m := _NAME.fullmatch(table.name))]
    # The script's splits repeat what the whole table has.
    whole = {(m["source"], m["target"]) for _, m in named if not m["split"]}
    named = [(t, m) for t, m in named if not m["split"] or (m["source"], m["target"]) not in whole]
    sources = sorted({m["source"] for _, m in named})
    if not sources:
        raise CorpusError(
            f"{root}: not in CoVoST 2's layout, expected covost_v2.SOURCE_TARGET.tsv in it"
        )
    for source in sources:
        if source not in voices:
            raise CorpusError(
                f"{root}: no Common Voice beside covost_v2.{source}_*.tsv, expected "
                f"{source}/validated.tsv and {source}/clips"
            )
        entries: dict[str, _Entry] = {}
        for table, match in named:
            if match["source"] == source:
                yield from _read_table(table, match["target"], match["split"], entries)
        yield from _join(voices[source] / "validated.tsv", source, entries)


def _read_table(
    table: Path, target: str, split: str | None, entries: dict[str, _Entry]
) -> Iterator[Fault]:
    """Add a table's translations to `entries`; yields its lines that cannot be read."""
    for number, row in rows(table):
        where = f"{table.name}:{number}"
        if isinstance(row, str):
            yield Fault(where, row, split)
            continue
        for name in ("path", "translation", *(() if split else ("split",))):
            if name not in row:
                raise CorpusError(f"{table}: no column {name!r}, found {sorted(row)}")
        found = _SPLITS.get(split or row["split"])
        if found is None:
            continue  # clips that CoVoST leaves out
        entry = entries.setdefault(row["path"], _Entry(found))
        if entry.split != found:
            yield Fault(where, f"two splits: {found} here, {entry.split} in another table", found)
            continue
        translation = tidy(re.sub(r"\\(.)", r"\1", row["translation"]))
        if translation:
            entry.translations[target] = translation
        else:
            yield Fault(where, "empty translation", found)


def _join(table: Path, source: str, entries: dict[str, _Entry]) -> Iterator[Utterance | Fault]:
    """The clips of Common Voice that CoVoST translates."""
    left = dict(entries)
    for number, row in rows(table):
        if isinstance(row, str):
            yield Fault(f"{source}/{table.name}:{number}", row, None)
            continue
        for name in ("client_id", "path", "sentence"):
            if name not in row:
                raise CorpusError(f"{table}: no column {name!r}, found {sorted(row)}")
        entry = left.pop(row["path"], None)
        if entry is None or not entry.translations:
            continue
        audio = table.parent / "clips" / row["path"]
        if not audio.suffix:  # releases before the fourth
            audio = audio.with_suffix(".mp3")
        extra = {f"translation_{t}": text for t, text in sorted(entry.translations.items())}
        raw = row["sentence"]
        yield Utterance(
            audio.stem, audio, spoken(raw), raw, source, row["client_id"], entry.split, extra
        )
    for path, entry in left.items():
        yield Fault(path, f"no clip: {source}/{table.name} does not have it", entry.split)
