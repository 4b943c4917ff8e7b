"""Where shards lie: patterns to addresses, and bytes by offset from an address.

An address is a local path, an HTTP(S) address, or `pipe:COMMAND`. A shard's index lies beside it:
the same path or address with `.parquet` for `.tar`, or the same command with that replaced.
Local shards are read by seek; those on a web server by range requests, or, with a cache, whole
and once; commands, which cannot seek, need the cache.
"""

import hashlib
import io
import os
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import requests
from webdataset.shardlists import expand_urls

from data import remote
from data.archive import ShardError, index_path
from data.cache import Cache, Draft
from data.remote import PIPE, is_remote, shown
from data.retry import retried

_MAX_OPEN = 128  # files a process keeps open; the least recently read is closed first


class Source(Protocol):
    """An opened shard."""

    def read_at(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`; fewer only at the end. Raises `OSError`."""

    def close(self) -> None: ...


class LocalFile:
    """A shard on a local disk or a mounted one; one open file serves every thread."""

    def __init__(self, path: str):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115

    def read_at(self, offset: int, size: int) -> bytes:
        return _read_at(self._file.fileno(), offset, size)

    def close(self) -> None:
        self._file.close()


class WebFile:
    """A shard on a web server, read by range requests."""

    def __init__(self, url: str, meta: Mapping[str, Any], session: requests.Session):
        self._url, self._meta, self._session = url, meta, session

    def read_at(self, offset: int, size: int) -> bytes:
        data, total = remote.fetch_range(self._url, offset, size, self._session)
        if total is not None:
            _check_size(self._url, total, self._meta)
        return data

    def close(self) -> None:
        pass


class CachedFile:
    """A remote shard that is read from its copy in the cache.

    The copy is named by the contents that the index tells, so a shard that was built again, under
    the same address, is another one.
    """

    def __init__(
        self, address: str, meta: Mapping[str, Any], cache: Cache, session: requests.Session
    ):
        self._address, self._meta, self._cache, self._session = address, meta, cache, session
        self._name = f"{_stem(address)}-{meta['tar_sha256'][:20]}.tar"

    def read_at(self, offset: int, size: int) -> bytes:
        with self._cache.opened(self._name, self._meta["tar_bytes"], self._download) as descriptor:
            return _read_at(descriptor, offset, size)

    def close(self) -> None:
        pass

    def _download(self, draft: Draft) -> None:
        def sink(data: bytes) -> None:
            _check_size(self._address, draft.size + len(data), self._meta)
            draft.write(data)

        remote.fetch(self._address, sink, self._session)
        draft.file.flush()
        draft.file.seek(0)
        found = hashlib.file_digest(draft.file, "sha256").hexdigest()  # type: ignore[arg-type]
        if draft.size == self._meta["tar_bytes"] and found != self._meta["tar_sha256"]:
            raise ShardError(
                f"{shown(self._address)}: its SHA-256 is {found[:16]}..., but its index says "
                f"{self._meta['tar_sha256'][:16]}...; build the shard again"
            )


class OpenSources:
    """Opened shards by address, at most `_MAX_OPEN` at once; every process opens its own."""

    def __init__(self, metas: Mapping[str, Mapping[str, Any]], cache: Cache | None = None):
        self._metas, self._cache = metas, cache
        self._pid = os.getpid()
        self._open: OrderedDict[str, Source] = OrderedDict()
        self._session = requests.Session()

    def __getitem__(self, address: str) -> Source:
        if self._pid != os.getpid():  # forked: the parent's files and connections stay its own
            self.__init__(self._metas, self._cache)  # type: ignore[misc]
        if address in self._open:
            self._open.move_to_end(address)
            return self._open[address]
        while len(self._open) >= _MAX_OPEN:
            self._open.popitem(last=False)[1].close()
        self._open[address] = self._opened(address)
        return self._open[address]

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenSources, (self._metas, self._cache)

    def _opened(self, address: str) -> Source:
        if not is_remote(address):
            return LocalFile(address)
        if self._cache is not None:
            return CachedFile(address, self._metas[address], self._cache, self._session)
        return WebFile(address, self._metas[address], self._session)


def read_index(address: str) -> Path | bytes:
    """A shard's index: its path where it is local, its bytes where it is not.

    Raises `ShardError` where there is none, `ReadError` where it cannot be had for now.
    """
    if not is_remote(address):
        return index_path(address)
    index = index_address(address)

    def fetched() -> bytes:
        whole = io.BytesIO()
        with requests.Session() as session:
            remote.fetch(index, whole.write, session)
        return whole.getvalue()

    return retried(fetched, lambda: shown(index))


def index_address(address: str) -> str:
    """Where a shard's index lies: a path, a web address, or a command."""
    if not is_remote(address):
        return str(index_path(address))
    if address.startswith(PIPE):
        index, count = re.subn(r"\.tar\b", ".parquet", address)
    else:
        parts = urlsplit(address)
        path, count = re.subn(r"\.tar$", ".parquet", parts.path)
        index = parts._replace(path=path).geturl()
    if not count:
        raise ShardError(f"{shown(address)}: names no .tar, so its index cannot be found")
    return index


def expand(patterns: str | Path | Sequence[str | Path], cache: Cache | None = None) -> list[str]:
    """Tar addresses from brace patterns, globs, folders and plain paths, in order, each once.

    A folder stands for its `*.tar`. Raises `ShardError` naming a pattern that matches nothing, a
    file that is missing, and a command without a cache.
    """
    if isinstance(patterns, str | Path):
        patterns = [patterns]
    found: dict[str, None] = {}
    for pattern in patterns:
        for address in expand_urls(str(pattern)):
            found.update(dict.fromkeys(_matches(address)))
    for address in found:
        if address.startswith(PIPE) and cache is None:
            raise ShardError(f"{shown(address)}: a command cannot seek; give a cache folder")
        if not is_remote(address) and not os.path.isfile(address):
            raise ShardError(f"{address}: no such shard; write shards with data.build")
    return list(found)


def _matches(address: str) -> list[str]:
    if is_remote(address):
        return [address]
    if os.path.isdir(address):
        address = os.path.join(address, "*.tar")
    matches = sorted(glob(address)) if has_magic(address) else [address]
    if not matches:
        raise ShardError(f"no shard matches {address!r}; write shards with data.build")
    return matches


def _stem(address: str) -> str:
    """A readable part of the name of a copy: the last NAME of all NAME.tar in the address."""
    names = re.findall(r"([\w-]+)\.tar\b", address)
    return names[-1][-80:] if names else "shard"


def _check_size(address: str, found: int, meta: Mapping[str, Any]) -> None:
    # A shorter one is a truncated tar, whose good samples are used like a local one's.
    if found > meta["tar_bytes"]:
        raise ShardError(
            f"{shown(address)}: is longer than the {meta['tar_bytes']} bytes that its index was "
            "made for; build the shard again"
        )


def _read_at(descriptor: int, offset: int, size: int) -> bytes:
    parts: list[bytes] = []
    while size > 0 and (part := os.pread(descriptor, size, offset)):
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
