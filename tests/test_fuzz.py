"""A short run of every fuzzer, the kept corpus first; `python -m tests.fuzz` is the long one."""

from __future__ import annotations

import os
import pickle
import random
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fuzz.harness import fuzz, tried
from tests.fuzz.readers import READERS, Reader


@pytest.mark.parametrize("name", READERS)
def test_strangers_files_are_taken_or_refused(name: str) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    found = fuzz(READERS[name], 200, seed)
    assert found["taken"]
    assert found["refused"]


def escape(data: bytes, folder: Path) -> None:
    (folder / "../../escaped").write_bytes(data)


def swallow(data: bytes, folder: Path) -> None:
    with suppress(OSError):
        escape(data, folder)


@pytest.mark.parametrize(
    ("read", "raised"),
    [
        (escape, PermissionError), (swallow, AssertionError),
        (lambda data, folder: (folder / "../left").write_bytes(data), PermissionError),
        (lambda data, folder: pickle.loads(pickle.dumps(Path("x"))), PermissionError),
        (lambda data, folder: os.system("true"), PermissionError),
        (lambda data, folder: b"x" * (8 << 30), MemoryError),
        (lambda data, folder: {}["x"], KeyError),
    ],
)  # fmt: skip
def test_the_fuzzer_sees_what_is_forbidden(read, raised, tmp_path: Path) -> None:
    reader = Reader("broken", lambda: [b""], read, (ValueError,))
    with pytest.raises(raised):
        tried(reader, b"", tmp_path)
    assert not (tmp_path.parent / "escaped").exists()
