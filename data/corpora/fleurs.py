"""FLEURS: LOCALE/{train,dev,test}.tsv, without a header, and LOCALE/audio/{train,dev,test}/*.wav.

That is `data/` of its repository on the Hugging Face hub with the archives in `audio/` unpacked
where they lie; older releases have the split's folder beside the table. `text` is FLEURS's raw
transcription, tidied (NFC, single spaces), with case and punctuation; its own normalised one is
kept as `transcription`. `sentence` is the number that all languages' readings of one sentence
share. The language is the locale's first part: `en` of `en_us`, `cmn` of `cmn_hans_cn`.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data.corpora.tables import rows, tidy
from data.corpora.utterance import CorpusError, Fault, Utterance

_SPLITS = ("train", "dev", "test")
_COLUMNS = [
    "sentence",
    "file",
    "raw_transcription",
    "transcription",
    "characters",
    "num_samples",
    "gender",
]


def read(root: Path) -> Iterator[Utterance | Fault]:
    """`root` is the folder of a locale, or one that contains some, or their `data` folder."""
    tables = _tables(root)
    if not tables:
        raise CorpusError(
            f"{root}: not in FLEURS's layout, expected LOCALE/{{train,dev,test}}.tsv in it"
        )
    for table in tables:
        yield from _read_split(table)


def _read_split(table: Path) -> Iterator[Utterance | Fault]:
    locale, split = table.parent.resolve().name, table.stem
    folder = table.parent / "audio" / split
    if not folder.is_dir():
        folder = table.parent / split
    if not folder.is_dir():
        archive = table.parent / "audio" / f"{split}.tar.gz"
        hint = f"; unpack {archive} where it lies" if archive.is_file() else ""
        raise CorpusError(f"{table.parent}: no folder audio/{split} beside {table.name}{hint}")
    for number, row in rows(table, _COLUMNS):
        if isinstance(row, str):
            yield Fault(f"{locale}/{table.name}:{number}", row, split)
            continue
        audio, raw = folder / row["file"], row["raw_transcription"]
        extra = {
            "sentence": row["sentence"],
            "transcription": row["transcription"],
            "gender": row["gender"],
            "locale": locale,
        }
        key, language = f"{locale}-{audio.stem}", locale.partition("_")[0]
        yield Utterance(key, audio, tidy(raw), raw, language, None, split, extra)


def with_translations(utterances: list[Utterance], root: Path) -> list[Utterance]:
    """The utterances, each with its sentence in the other languages as `translation_LANGUAGE`.

    All tables under `root` are read for that, whether their audio is there or not.
    """
    texts: dict[tuple[str, str], dict[str, str]] = {}
    for table in _tables(root):
        language = table.parent.resolve().name.partition("_")[0]
        for _, row in rows(table, _COLUMNS):
            if not isinstance(row, str):
                of = texts.setdefault((table.stem, row["sentence"]), {})
                of.setdefault(language, tidy(row["raw_transcription"]))
    return [
        replace(u, extra=u.extra | {
            f"translation_{language}": text
            for language, text in texts[u.split or "", u.extra["sentence"]].items()
            if language != u.language
        })
        for u in utterances
    ]  # fmt: skip


def _tables(root: Path) -> list[Path]:
    folders = [root, *sorted(p for p in (*root.glob("*"), *root.glob("data/*")) if p.is_dir())]
    tables = [folder / f"{split}.tsv" for folder in folders for split in _SPLITS]
    return [table for table in tables if table.is_file()]
