"""Answers as they come, on the disk before the shard they belong to is whole.

    OUTPUT/.answers/targets-000012/rank-3.jsonl

The first line says how the answers were made; each further line holds answers that were committed
together, [[number, [id, ...], finished], ...]. A line that a kill cut short is as if never written.
The folder goes when its shard is written.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from data.archive import ShardError
from train.model.generate import Answer
from train.teachers.part import Question

Answered = tuple[Question, Answer]


class Journal:
    """One rank's journal of the target shards under `output`, made as `facts` say."""

    def __init__(self, output: Path, facts: dict[str, Any], rank: int):
        self._root = output / ".answers"
        self._facts, self._rank = facts, rank
        self._files: dict[str, BinaryIO] = {}

    def read(self, part: str) -> dict[int, Answer]:
        """What all ranks have committed of a part, by the number of the question.

        Raises:
            ShardError: it was made in another way, or is damaged.
        """
        found: dict[int, Answer] = {}
        for path in sorted((self._root / part).glob("*.jsonl")):
            whole = path.read_bytes().split(b"\n")[:-1]  # after the last newline: cut short
            try:
                header, *lines = map(json.loads, whole or [b"{}"])
                if whole:
                    self._check(path, header)
                for line in lines:
                    found |= {number: Answer(tuple(ids), end) for number, ids, end in line}
            except (ValueError, TypeError) as error:
                raise ShardError(f"{path}: damaged ({error}); remove it") from None
        return found

    def append(self, answered: Sequence[Answered]) -> None:
        """Commit answers together (all of one part): once this returns, no kill loses them."""
        file = self._open(answered[0][0].part)
        line = [[q.number, list(a.ids), a.finished] for q, a in answered]
        file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        _commit(file)

    def discard(self, part: str) -> None:
        """Remove a part's journal, and the folder of all of them once it is empty."""
        shutil.rmtree(self._root / part, ignore_errors=True)
        with contextlib.suppress(OSError):  # other parts are not done, or it is gone
            self._root.rmdir()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _check(self, path: Path, header: dict[str, Any]) -> None:
        if changed := differences(self._facts, header):
            raise ShardError(
                f"{path} was made with another {changed}; remove it, or choose another "
                "behave.output"
            )

    def _open(self, part: str) -> BinaryIO:
        if part not in self._files:
            path = self._root / part / f"rank-{self._rank}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            file = self._files[part] = path.open("a+b", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ShardError(f"{path}: another run is writing it; let it end") from None
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            if file.seek(0, os.SEEK_END) == 0:
                file.write(json.dumps(self._facts).encode() + b"\n")
                _commit(file)
        return self._files[part]


def differences(facts: dict[str, Any], found: dict[str, Any]) -> str:
    """Names of the facts that `found` has otherwise, or "" where its hash is the same."""
    if found.get("hash") == facts["hash"]:
        return ""
    return ", ".join(k for k in facts if k != "hash" and found.get(k) != facts[k]) or "version"


def _commit(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
