"""Shards as one table: columns from the indexes, members by seek, overlays joined by key.

A `ShardSet` numbers its samples 0..N-1 in the order of its shards; every index `i` elsewhere is
that number. An `Overlay` is a `ShardSet` made from another one (targets, word times) and answers
by the base's numbers.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.archive import (
    TAR_BLOCK,
    ContentError,
    Row,
    ShardError,
    column,
    index_path,
    read_meta,
    readable_index,
    write_shard,
)
from data.cache import Cache
from data.columns import check_column
from data.parsing import parse_json
from data.remote import is_remote, shown
from data.sources import OpenSources, expand, index_address, read_index
from data.targets import INDEXED

MAX_MEMBER = 1 << 30
"""Bytes of one member; hours of FLAC."""
_PLACE = ("offset", "size")


class ShardSet:
    """Samples of many shards; columns are read when first asked for and kept."""

    def __init__(self, addresses: list[str], cache: Cache | None = None):
        self.addresses = addresses
        with ThreadPoolExecutor(8) as pool:
            self._indexes = list(pool.map(read_index, addresses))
            names = [shown(index_address(address)) for address in addresses]
            self.metas = list(pool.map(read_meta, names, map(_file, self._indexes)))
            self._bytes_found = list(pool.map(_size, addresses))
        self._columns: dict[str, pa.ChunkedArray] = {}
        self._sources = OpenSources(dict(zip(addresses, self.metas, strict=True)), cache)
        for s, meta in enumerate(self.metas):
            found = self._bytes_found[s]
            if found is not None and found != meta["tar_bytes"]:
                self._check_truncated(s, found, meta["tar_bytes"])

    @classmethod
    def open(
        cls, patterns: str | Path | Sequence[str | Path], cache: Cache | None = None
    ) -> "ShardSet":
        """Shards by brace pattern, glob, folder, path, web address or `pipe:` command.

        Reads the indexes' metadata only; remote shards are copied into `cache` when first read.
        Raises `ShardError` where a shard or its index is missing, or is not the other's. Of a
        truncated tar the samples that it still holds are used; `lost` names the others.
        """
        return cls(expand(patterns, cache), cache)

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the shards' contents in their order, wherever they lie."""
        whole = hashlib.sha256()
        for meta, found in zip(self.metas, self._bytes_found, strict=True):
            whole.update(meta["tar_sha256"].encode())
            if found is not None and found != meta["tar_bytes"]:
                whole.update(f"truncated to {found}".encode())
        return whole.hexdigest()

    @cached_property
    def lost(self) -> dict[int, str]:
        """Samples that truncated tars no longer hold, with the reason."""
        reasons: dict[int, str] = {}
        for s, (meta, found) in enumerate(zip(self.metas, self._bytes_found, strict=True)):
            if found is not None and found < meta["tar_bytes"]:
                gone = np.flatnonzero(self._ends(s) > found) + self.shard_starts[s]
                reason = f"truncated tar: {self.addresses[s]} has {found} of {meta['tar_bytes']}"
                reasons |= dict.fromkeys(gone.tolist(), f"{reason} bytes")
        return reasons

    @cached_property
    def shard_starts(self) -> np.ndarray:
        """[shards + 1] int64: shard s holds samples shard_starts[s] .. shard_starts[s + 1] - 1."""
        counts = []
        for address, index in zip(self.addresses, self._indexes, strict=True):
            with readable_index(shown(index_address(address))):
                counts.append(pq.read_metadata(_file(index)).num_rows)
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

    @cached_property
    def shard_of(self) -> np.ndarray:
        """[N] int64: each sample's shard."""
        return np.repeat(np.arange(len(self.addresses)), np.diff(self.shard_starts))

    @cached_property
    def keys(self) -> pa.ChunkedArray:
        """[N] strings; unique, else `ShardError` names the key and both shards."""
        keys = self.column("key")
        if len(pc.unique(keys)) != len(keys):
            values, counts = np.unique(keys.to_numpy(), return_counts=True)
            key = values[counts > 1][0]
            first, second = np.flatnonzero(keys.to_numpy() == key)[:2]
            raise ShardError(
                f"key {key!r} is in {self.shard_name(first)} and in {self.shard_name(second)}; "
                "keys must be unique over all shards that are read together"
            )
        return keys

    @cached_property
    def num_samples(self) -> np.ndarray:
        """[N] int64: waveform samples at 16 kHz."""
        return self.column("num_samples").to_numpy().astype(np.int64)

    @property
    def texts(self) -> pa.ChunkedArray:
        """[N] strings: transcripts."""
        return self.column("text")

    @property
    def languages(self) -> pa.ChunkedArray:
        """[N] strings: language codes."""
        return self.column("language")

    def column(self, name: str) -> pa.ChunkedArray:
        """[N] values of an index column; raises `ShardError` where an index has none, or bad ones.

        An index may be a stranger's: what is taken from it here has the type that it should have,
        no gaps, and no key that a tar of ours could not hold.
        """
        if name not in self._columns:
            parts: list[pa.Array] = []
            for address, index in zip(self.addresses, self._indexes, strict=True):
                where = shown(index_address(address))
                with readable_index(where), pq.ParquetFile(_file(index)) as file:
                    names = file.schema_arrow.names
                    if name in names:
                        found = file.read([name], use_threads=False).column(0)
                        if len(found) != file.metadata.num_rows:
                            raise ShardError(
                                f"{where}: column {name!r} has {len(found)} values, but there are "
                                f"{file.metadata.num_rows} samples; build the shard again"
                            )
                        check_column(found, name, where)
                        parts += found.chunks
                    elif file.metadata.num_rows:
                        raise ShardError(f"{where}: no column {name!r}, found {names}")
            self._columns[name] = pa.chunked_array(parts) if parts else pa.chunked_array([[]])
        return self._columns[name]

    def key(self, i: int) -> str:
        """Sample i's key."""
        return self.column("key")[int(i)].as_py()

    def shard_name(self, i: int) -> str:
        """The name of sample i's shard, for messages."""
        return shown(self._address(i))

    def place(self, i: int, member: str) -> tuple[int, int]:
        """Byte offset and size of sample i's member in its tar."""
        i = int(i)
        offsets, sizes = self.column(column(member, "offset")), self.column(column(member, "size"))
        return offsets[i].as_py(), sizes[i].as_py()

    def read(self, i: int, member: str) -> bytes:
        """The bytes of sample i's `member` ("flac", "json", ...), by seek.

        Raises `ContentError` where the tar does not hold there what its index says, `OSError`
        where it cannot be read.
        """
        offset, size = self.place(i, member)
        if offset < 0:
            raise ContentError(f"the tar has no member {member!r} for it")
        whole = self.metas[self._shard(i)]["tar_bytes"]
        if offset < TAR_BLOCK or offset + size > whole or size > MAX_MEMBER:
            raise ContentError(
                f"the index places {member!r} at bytes {offset} to {offset + size} of {whole}"
                + (f", more than the {MAX_MEMBER} that one may have" if size > MAX_MEMBER else "")
            )
        # The header is read along: a tar of the same size that was put in place is noticed here.
        raw = self._sources[self._address(i)].read_at(offset - TAR_BLOCK, TAR_BLOCK + size)
        if len(raw) < TAR_BLOCK + size:
            raise ContentError(f"truncated tar: {member} ends after {len(raw)} bytes")
        # The plain header's name; names that it cannot hold stand whole in a PAX header before it.
        name = f"{self.key(i)}.{member}".encode("ascii", "replace")[:100]
        if raw[:100].rstrip(b"\0") != name:
            raise ContentError("the index does not match its tar: another member is in its place")
        kind, octal = raw[156:157], raw[124:136].strip(b"\0 ")
        if kind not in b"0\0" or octal.lstrip(b"0") != (b"%o" % size).lstrip(b"0"):
            raise ContentError(
                f"the index does not match its tar: {member} is no plain file of {size} bytes there"
            )
        return raw[TAR_BLOCK:]

    def read_json(self, i: int, member: str = "json") -> dict[str, Any]:
        """Sample i's JSON member; raises `ContentError` where it is not a JSON object."""
        try:
            value = parse_json(self.read(i, member))
        except ContentError:
            raise
        except ValueError as error:
            raise ContentError(f"{member} is {error}") from None
        if not isinstance(value, dict):
            raise ContentError(f"{member} is {type(value).__name__}, expected an object")
        return value

    def _shard(self, i: int) -> int:
        return int(np.searchsorted(self.shard_starts, i, side="right")) - 1

    def _address(self, i: int) -> str:
        return self.addresses[self._shard(i)]

    def _ends(self, s: int) -> np.ndarray:
        """[samples of shard s] int64: where each one's last member ends in the tar."""
        first, last = self.shard_starts[s : s + 2].tolist()
        ends = np.zeros(last - first, dtype=np.int64)
        for name in self._members(s):
            offset, size = (self.column(column(name, what))[first:last] for what in _PLACE)
            ends = np.maximum(ends, offset.to_numpy() + size.to_numpy())
        return ends

    def _members(self, s: int) -> list[str]:
        """Names of the members that shard s's index places."""
        where = shown(index_address(self.addresses[s]))
        with readable_index(where):
            names = pq.read_schema(_file(self._indexes[s])).names
        found = [name.removesuffix("_offset") for name in names if name.endswith("_offset")]
        return [name.replace("_", ".") for name in found]

    def _check_truncated(self, s: int, found: int, expected: int) -> None:
        """Raise `ShardError` unless the index matches what is left of shard s."""
        fits = self._ends(s) <= found
        left = np.flatnonzero(fits) if found < expected else fits[:0]
        try:
            for row in (*left[:1], *left[-1:]):
                i = int(self.shard_starts[s] + row)
                for member in self._members(s):
                    if self.place(i, member)[0] >= 0:
                        self.read(i, member)
        except ContentError:
            left = left[:0]
        if not len(left):
            raise ShardError(
                f"{index_path(self.addresses[s])}: made for a tar of {expected} bytes, but "
                f"{self.addresses[s]} has {found}; build the shard again"
            )


class Overlay:
    """Records made from a `ShardSet`'s samples, answered by the base's numbers."""

    def __init__(self, shards: ShardSet, base: ShardSet, rows: np.ndarray, member: str):
        self.shards = shards
        self.member = member
        self._base = base
        self._rows = rows

    @classmethod
    def open(
        cls,
        patterns: str | Path | Sequence[str | Path],
        base: ShardSet,
        member: str = "targets.json",
        cache: Cache | None = None,
    ) -> "Overlay":
        """Join overlay shards to `base` by key.

        Raises `ShardError`, naming both files, where a sample of the base has no record, or the
        record was made from another version of the sample.
        """
        shards = ShardSet.open(patterns, cache)
        at = pc.index_in(base.keys, value_set=shards.keys)
        if at.null_count:
            i = pc.index(pc.is_null(at), True).as_py()
            raise ShardError(
                f"{_names(shards)}: no {member} for {at.null_count} of {len(base)} samples, the "
                f"first is {base.key(i)!r} of {base.shard_name(i)}; make the overlay for all of "
                "these shards"
            )
        rows = at.to_numpy().astype(np.int64)
        stale = pc.not_equal(shards.column("base_sha").take(at), base.column("sha"))
        if i_stale := pc.sum(stale).as_py():
            i = pc.index(stale, True).as_py()
            raise ShardError(
                f"{shards.shard_name(rows[i])}: stale, {i_stale} of {len(base)} records were made "
                f"from other contents than now in {base.shard_name(i)} (first {base.key(i)!r}); "
                "make the overlay again"
            )
        return cls(shards, base, rows, member)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the overlay's contents."""
        return self.shards.digest

    @cached_property
    def lost(self) -> dict[int, str]:
        """The base's samples whose records a truncated tar no longer holds, with the reason."""
        reasons = self.shards.lost
        gone = np.flatnonzero(np.isin(self._rows, list(reasons))).tolist() if reasons else []
        return {i: reasons[int(self._rows[i])] for i in gone}

    @property
    def metas(self) -> list[dict[str, Any]]:
        """What each overlay shard says of how it was made (teacher, template, decoding, ...)."""
        return self.shards.metas

    def column(self, name: str) -> pa.ChunkedArray:
        """[N] values of the overlay's index column, in the base's order."""
        return self.shards.column(name).take(pa.array(self._rows))

    def record(self, i: int) -> dict[str, Any]:
        """The record of the base's sample i; raises like `ShardSet.read_json`."""
        return self.shards.read_json(int(self._rows[i]), self.member)

    def read(self, i: int) -> bytes:
        """The bytes of the base's sample i's record; raises like `ShardSet.read`."""
        return self.shards.read(int(self._rows[i]), self.member)

    def shard_name(self, i: int) -> str:
        """The overlay shard that holds the record of the base's sample i."""
        return self.shards.shard_name(int(self._rows[i]))


def write_overlay(
    path: str | Path,
    items: Iterable[tuple[str, Mapping[str, Any] | bytes]],
    member: str = "targets.json",
    meta: Mapping[str, Any] | None = None,
    *,
    base: ShardSet,
) -> int:
    """Write one overlay shard: (key, record) pairs made from `base`'s samples of those keys.

    A record is JSON's, or bytes that are written as they are.

    `meta` (teacher, template, decoding, ...) goes into the index. Returns the number of records.
    Raises `ShardError` on a key that `base` does not have, or that comes twice.
    """
    fields, columns_of = INDEXED.get(member, ({}, lambda record: {}))
    rows_of = {key: i for i, key in enumerate(base.keys.to_pylist())}
    shas = base.column("sha")

    def rows() -> Iterable[Row]:
        for key, record in items:
            if key not in rows_of:
                raise ShardError(f"{path}: key {key!r} is in none of {_names(base)}")
            facts = {"base_sha": shas[rows_of[key]].as_py()}
            if not isinstance(record, bytes):
                facts |= columns_of(record)
                record = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
            yield Row(key, {member: record}, facts)

    own = {"kind": member, "base_digest": base.digest}
    return write_shard(path, rows(), {"base_sha": pa.string(), **fields}, {**(meta or {}), **own})


def _file(index: Path | bytes) -> Path | pa.BufferReader:
    return pa.BufferReader(index) if isinstance(index, bytes) else index


def _size(address: str) -> int | None:
    """Bytes of a local tar; a remote one tells its size when it is first read."""
    return None if is_remote(address) else Path(address).stat().st_size


def _names(shards: ShardSet) -> str:
    more = len(shards.addresses) - 1
    return shown(shards.addresses[0]) + (f" and {more} more" if more else "")
