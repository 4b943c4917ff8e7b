"""GigaSpeech: GigaSpeech.json and the long recordings that it cuts, audio/SOURCE/P0000/*.opus.

Its training subsets contain each other (XS in S in M in L in XL). Each utterance goes into one
split, named by the smallest subset that has it: `xs`, `s`, `m`, `l`, `xl`; so the M subset is the
shards of `xs`, `s` and `m` together. `dev` and `test` stay apart.

Transcripts are in capitals, with punctuation spelt as tags: they are lowered, and the tags become
their marks. Utterances of noise, music or silence, tagged as such, are left out.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.corpora.tables import tidy
from data.corpora.utterance import CorpusError, Fault, Utterance

_SPLITS = ("dev", "test", "xs", "s", "m", "l", "xl")  # an utterance goes to the first it is in
_MARKS = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}
_GARBAGE = ("<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>")


def read(root: Path) -> Iterator[Utterance | Fault]:
    """`root` is the folder with GigaSpeech.json in it."""
    table = root / "GigaSpeech.json"
    if not table.is_file():
        raise CorpusError(f"{root}: not in GigaSpeech's layout, expected GigaSpeech.json in it")
    try:
        recordings = json.loads(table.read_bytes())["audios"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"{table}: not GigaSpeech's metadata: {error!r}") from None
    for recording in recordings:
        for segment in recording["segments"]:
            yield _utterance(segment, recording, root)


def _utterance(segment: dict[str, Any], recording: dict[str, Any], root: Path) -> Utterance | Fault:
    subsets = {name.strip("{}").lower() for name in segment["subsets"]}
    split = next((name for name in _SPLITS if name in subsets), None)
    key, raw = segment["sid"], segment["text_tn"]
    if split is None:
        return Fault(key, f"no subset: {sorted(subsets)} is none of {list(_SPLITS)}", "none")
    if tag := next((tag for tag in _GARBAGE if tag in raw), None):
        return Fault(key, f"no speech: tagged {tag}", split)
    extra = {"recording": recording["aid"], "source": recording.get("source", "")}
    speaker = segment.get("speaker")
    return Utterance(
        key,
        root / recording["path"],
        _text(raw),
        raw,
        "en",
        None if speaker in (None, "", "N/A") else speaker,
        split,
        extra | {"begin": segment["begin_time"], "end": segment["end_time"]},
        (segment["begin_time"], segment["end_time"]),
    )


def _text(raw: str) -> str:
    text = raw
    for tag, mark in _MARKS.items():
        text = re.sub(rf"\s*{tag}", mark, text)
    return tidy(text.lower())
