"""One shard of a build: utterances in, a tar with its index and a record of the work out.

`.build/NAME.json` beside the shards remembers what a shard was made from and which utterances it
left out, so that a second run skips what is done and still reports all of it.
"""

import errno
import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from data.archive import (
    FORMAT,
    Row,
    ShardError,
    drafted,
    index_path,
    key_fault,
    read_meta,
    write_shard,
)
from data.audio import SAMPLE_RATE, AudioError, decode, encode_flac, is_silent
from data.corpora import Utterance
from data.pool import advance

FIELDS = {
    "num_samples": pa.int64(),
    "text": pa.string(),
    "language": pa.string(),
    "speaker": pa.string(),
    # Of a shard of texts, which has no such member; else the index fills them in.
    "flac_offset": pa.int64(),
    "flac_size": pa.int64(),
}
_NO_AUDIO = {"num_samples": 0, "flac_offset": -1, "flac_size": 0}


@dataclass(frozen=True)
class Job:
    """A shard to write: `path`, from `utterances` in this order."""

    path: Path
    utterances: tuple[Utterance, ...]
    max_seconds: float

    @property
    def record(self) -> Path:
        """Where this shard's record is kept."""
        return self.path.parent / ".build" / f"{self.path.stem}.json"


@dataclass(frozen=True)
class Outcome:
    """What became of a job; `skipped` as {"key", "audio", "reason"}."""

    path: Path
    samples: int
    seconds: float
    skipped: list[dict[str, str]]
    reused: bool


def convert(job: Job) -> Outcome:
    """Write the shard unless it is there already, made from the same."""
    fingerprint = _fingerprint(job)
    if (outcome := _finished(job, fingerprint)) is not None:
        advance(len(job.utterances))
        return outcome
    skipped: list[dict[str, str]] = []
    seconds = 0.0

    def rows() -> Iterator[Row]:
        nonlocal seconds
        for utterance in job.utterances:
            row = _row(utterance, job.max_seconds)
            if isinstance(row, Row):
                seconds += row.columns["num_samples"] / SAMPLE_RATE
                yield row
            else:
                where = {"key": utterance.key, "audio": str(utterance.audio or "")}
                skipped.append({**where, "reason": row})
            advance(1)

    samples = write_shard(job.path, rows(), FIELDS, {})
    facts = {"fingerprint": fingerprint, "samples": samples, "seconds": seconds, "skipped": skipped}
    write_text(job.record, json.dumps(facts, ensure_ascii=False, indent=1))
    return Outcome(job.path, samples, seconds, skipped, reused=False)


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file or none; what has no UTF-8 is written as JSON would escape it."""
    with drafted(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def _row(utterance: Utterance, max_seconds: float) -> Row | str:
    """The utterance's row, or why it is left out: a word or two, a colon, and the particulars."""
    if fault := key_fault(utterance.key):
        return f"bad key: {fault}"
    if not utterance.text:
        return "empty transcript"
    if not utterance.language:
        return "no language: neither the corpus nor --language gives one"
    wave = None
    if utterance.audio is not None:
        if not _exists(utterance.audio):
            return "missing file"
        try:
            wave = decode(utterance.audio, max_seconds=max_seconds, span=utterance.span)
        except AudioError as error:
            return str(error)
        if is_silent(wave):
            return "silence: quieter than -70 dBFS throughout"
    about = {
        **utterance.extra,
        "text": utterance.text,
        "raw_text": utterance.raw_text,
        "language": utterance.language,
        "speaker": utterance.speaker,
        "split": utterance.split,
        "duration": 0.0 if wave is None else len(wave) / SAMPLE_RATE,
    }
    try:
        encoded = json.dumps({"key": utterance.key, **about}, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"not Unicode: {error}"
    columns = _NO_AUDIO | {name: about[name] for name in ("text", "language", "speaker")}
    if wave is None:
        return Row(utterance.key, {"json": encoded}, columns)
    members = {"flac": encode_flac(wave), "json": encoded}
    return Row(utterance.key, members, columns | {"num_samples": len(wave)})


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except ValueError:  # a NUL byte in the name
        return False
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False


def _fingerprint(job: Job) -> str:
    """SHA-256 of all that the shard depends on; a file by its size and time of change."""
    whole = hashlib.sha256(f"{FORMAT} {job.max_seconds}".encode())
    for utterance in job.utterances:
        file: list[Any] = [str(utterance.audio or "")]
        if utterance.audio is not None:
            with suppress(OSError, ValueError):  # not there, or a NUL byte in the name
                stat = utterance.audio.stat()
                file += [stat.st_size, stat.st_mtime_ns]
        facts = [
            *(value for name, value in vars(utterance).items() if name != "audio"),
            file,
        ]
        whole.update(json.dumps(facts, sort_keys=True).encode())
    return whole.hexdigest()


def _finished(job: Job, fingerprint: str) -> Outcome | None:
    """The outcome of an earlier run, where shard, index and record are there and agree."""
    try:
        facts = json.loads(job.record.read_text(encoding="utf-8"))
        whole = read_meta(index_path(job.path))["tar_bytes"] == job.path.stat().st_size
    except (OSError, ValueError, ShardError):
        return None
    if not whole or facts["fingerprint"] != fingerprint:
        return None
    return Outcome(job.path, facts["samples"], facts["seconds"], facts["skipped"], reused=True)
