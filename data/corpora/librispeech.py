"""LibriSpeech: SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac and SPEAKER-CHAPTER.trans.txt.

Its transcripts are in capitals throughout; they are lowered, and kept as found beside it.
Multilingual LibriSpeech and others who took over the layout need no more than this.
"""

from collections.abc import Iterator
from pathlib import Path

from data.corpora.utterance import CorpusError, Fault, Utterance

_TRANSCRIPTS = "*/*/*.trans.txt"


def read(root: Path) -> Iterator[Utterance | Fault]:
    """`root` is the unpacked `LibriSpeech` folder, what contains it, or one split of it."""
    root = root / "LibriSpeech" if (root / "LibriSpeech").is_dir() else root
    folders = [root, *sorted(path for path in root.glob("*") if path.is_dir())]
    splits = [folder for folder in folders if next(folder.glob(_TRANSCRIPTS), None)]
    if not splits:
        raise CorpusError(
            f"{root}: not in LibriSpeech's layout, expected SPLIT/SPEAKER/CHAPTER/*.trans.txt in it"
        )
    for split in splits:
        for chapter in sorted({path.parent for path in split.glob("*/*/*") if path.is_file()}):
            yield from _read_chapter(chapter, split.resolve().name)


def _read_chapter(chapter: Path, split: str) -> Iterator[Utterance | Fault]:
    untold = {path.stem for path in chapter.glob("*.flac")}
    for transcripts in sorted(chapter.glob("*.trans.txt")):
        for number, line in enumerate(transcripts.read_bytes().splitlines(), 1):
            try:
                key, _, raw = line.decode("utf-8").strip().partition(" ")
            except UnicodeDecodeError as error:
                yield Fault(f"{transcripts}:{number}", f"not UTF-8: {error}", split)
                continue
            if not key:
                continue
            untold.discard(key)
            text = raw.lower() if raw.isupper() else raw
            audio = chapter / f"{key}.flac"
            yield Utterance(key, audio, text, raw, None, chapter.parent.name, split)
    for key in sorted(untold):
        yield Fault(key, f"no transcript: {chapter} has audio but no line for it", split)
