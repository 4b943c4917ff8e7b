"""One shard on disk: a tar that webdataset reads, and beside it a Parquet index that plans read.

    NAME.tar       KEY.flac KEY.json KEY.flac KEY.json ...
    NAME.parquet   one row per key, in the tar's order: `key`, `sha` (of the members' bytes),
                   `flac_offset`, `flac_size`, `json_offset`, `json_size`, ... and what else the
                   writer adds; in its metadata the tar's size and SHA-256

The same rows give the same bytes: times, owners, modes and order are ours. A file appears under
its name only when whole, and the index appears last, so an index stands for a finished shard.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from webdataset import TarWriter

from data.parsing import parse_json

FORMAT = 1
TAR_BLOCK = 512
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_META = b"hearken"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEY = re.compile(r"(?!/)[^.\x00-\x1f\x7f]+(?<!/)")


class ShardError(ValueError):
    """A shard, index or overlay that is not what it should be; the message names the files."""


class ContentError(ValueError):
    """A fault in one sample's stored bytes; the message is the reason, without the key."""


@dataclass(frozen=True)
class Row:
    """One sample to write: its members by extension ("flac": bytes), its index columns."""

    key: str
    members: Mapping[str, bytes]
    columns: Mapping[str, Any]


def key_fault(key: str) -> str | None:
    """Why `key` cannot name a sample in a tar, or None where it can."""
    if not _KEY.fullmatch(key):
        return (
            f"key {key!r} must be non-empty, without '.' (webdataset takes what follows as the "
            "extension), control characters, and '/' at either end"
        )
    return None


def index_path(tar: str | Path) -> Path:
    """NAME.tar -> NAME.parquet."""
    return Path(tar).with_suffix(".parquet")


def column(member: str, what: str) -> str:
    """The index column of a member's "offset" or "size": "targets.json" -> "targets_json_size"."""
    return f"{member.replace('.', '_')}_{what}"


def write_shard(
    path: str | Path, rows: Iterable[Row], fields: Mapping[str, pa.DataType], meta: dict[str, Any]
) -> int:
    """Write `path` (NAME.tar) and its index; returns the number of samples.

    `fields` types the rows' own columns; `meta` (JSON) goes into the index. Raises `ShardError` on
    a key that cannot be written or comes twice, `OSError` where the disk refuses; neither leaves a
    file under its final name.
    """
    path = Path(path)
    with drafted(path) as file:
        written = _write_tar(file, rows, path)
        table = _index(file, written, fields, meta)
        index_path(path).unlink(missing_ok=True)  # an old index never stands beside a new tar
    with drafted(index_path(path)) as file:
        pq.write_table(table, file)
    return len(written)


@contextmanager
def drafted(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes its name only once it is whole and on the disk.

    Raises `ShardError` where another process is writing the same file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
    with draft.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardError(f"{path}: another process is writing it; let it end") from None
        try:
            file.truncate(0)  # what a killed process may have left
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(draft, path)
        except BaseException as error:
            draft.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                error.filename = str(path)  # a write does not know what it was writing
            raise


@contextmanager
def readable_index(index: str | Path) -> Iterator[None]:
    """Turns whatever pyarrow says of a file that is no index of ours into a `ShardError`."""
    try:
        yield
    # OSError: what Parquet cannot decode; it does not tell that from a disk that cannot be read.
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ShardError(f"{index}: not a shard index ({reason}); build the shard again") from None


def read_meta(index: str | Path, file: Any = None) -> dict[str, Any]:
    """An index's own metadata, from `file` where it is open already.

    Raises `ShardError` where it is no index of ours, or promises more than its tar can hold.
    """
    with readable_index(index):
        footer = pq.read_metadata(index if file is None else file)
        text = (footer.metadata or {}).get(_META, b"{}")
    try:
        meta = parse_json(text)
    except ValueError as error:
        raise ShardError(f"{index}: metadata is {error}; build the shard again") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else meta
        raise ShardError(
            f"{index}: index format is {found!r:.40}, expected {FORMAT}; build the shard again"
        )
    size, sha256 = meta.get("tar_bytes"), meta.get("tar_sha256")
    if type(size) is not int or size < 0 or not _SHA256.fullmatch(str(sha256)):
        raise ShardError(
            f"{index}: tar_bytes is {size!r:.40} and tar_sha256 {sha256!r:.40}, expected a size "
            "and 64 hexadecimal digits; build the shard again"
        )
    # A few bytes of Parquet can promise any number of rows; each has a header of 512 in the tar.
    if footer.num_rows * TAR_BLOCK > size:
        raise ShardError(
            f"{index}: has {footer.num_rows} samples, but its tar of {size} bytes cannot; build "
            "the shard again"
        )
    return meta


def _write_tar(file: BinaryIO, rows: Iterable[Row], path: Path) -> list[Row]:
    """Write the members; returns the rows with the members' bytes let go, plus their hash."""
    kept: dict[str, Row] = {}
    tar = TarWriter(file, user="hearken", group="hearken", mtime=0, encoder=False)
    with tar:
        for row in rows:
            fault = key_fault(row.key) or (
                f"key {row.key!r} comes twice" if row.key in kept else None
            )
            if fault:
                raise ShardError(f"{path}: {fault}")
            tar.write({"__key__": row.key, **row.members})
            digest = hashlib.sha256()
            for member in sorted(row.members):
                digest.update(f"{member} {len(row.members[member])}\n".encode())
                digest.update(row.members[member])
            sizes = dict.fromkeys(row.members, b"")
            kept[row.key] = Row(row.key, sizes, {"sha": digest.hexdigest()[:16], **row.columns})
    file.flush()
    return list(kept.values())


def _index(
    tar: BinaryIO, rows: list[Row], fields: Mapping[str, pa.DataType], meta: dict[str, Any]
) -> pa.Table:
    """The index of a written tar: where each member lies is read back from the tar itself."""
    tar.seek(0)
    with tarfile.open(fileobj=tar) as opened:
        places = {info.name: (info.offset_data, info.size) for info in opened}
    members = sorted({member for row in rows for member in row.members})
    columns: dict[str, pa.Array] = {
        "key": pa.array([row.key for row in rows], pa.string()),
        "sha": pa.array([row.columns["sha"] for row in rows], pa.string()),
    }
    for name, dtype in fields.items():
        columns[name] = pa.array([row.columns[name] for row in rows], dtype)
    for member in members:
        found = [places.get(f"{row.key}.{member}", (-1, 0)) for row in rows]
        columns[column(member, "offset")] = pa.array([at for at, _ in found], pa.int64())
        columns[column(member, "size")] = pa.array([size for _, size in found], pa.int64())
    tar.seek(0)
    sha256 = hashlib.file_digest(tar, "sha256").hexdigest()  # type: ignore[arg-type]
    own = {"format": FORMAT, "tar_bytes": tar.tell(), "tar_sha256": sha256}
    table = pa.table(columns)
    return table.replace_schema_metadata({_META: json.dumps(meta | own, sort_keys=True).encode()})
