"""Where shards lie: patterns to addresses, and bytes by offset from an address.

A `Source` answers `read_at(offset, size)`; local files do so with pread, so that one open file
serves every thread. Remote kinds (HTTP range requests, `pipe:` through a cache) fit in here.
"""

import os
from collections import OrderedDict
from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Protocol

from webdataset.shardlists import expand_urls

from data.archive import ShardError

_MAX_OPEN = 128  # files a process keeps open; the least recently read is closed first


class Source(Protocol):
    """An opened shard."""

    def read_at(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`; fewer only at the end. Raises `OSError`."""

    def close(self) -> None: ...


class LocalFile:
    """A shard on a local disk or a mounted one."""

    def __init__(self, path: str):
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_at(self, offset: int, size: int) -> bytes:
        parts: list[bytes] = []
        while size > 0 and (part := os.pread(self._descriptor, size, offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        os.close(self._descriptor)


class OpenSources:
    """Opened shards by address, at most `_MAX_OPEN` at once; every process opens its own."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._open: OrderedDict[str, Source] = OrderedDict()

    def __getitem__(self, address: str) -> Source:
        if self._pid != os.getpid():  # forked: the parent's files stay the parent's
            self.__init__()  # type: ignore[misc]
        if address in self._open:
            self._open.move_to_end(address)
            return self._open[address]
        while len(self._open) >= _MAX_OPEN:
            self._open.popitem(last=False)[1].close()
        self._open[address] = LocalFile(address)
        return self._open[address]

    def __reduce__(self) -> tuple[type["OpenSources"], tuple[()]]:
        return OpenSources, ()


def expand(patterns: str | Path | Sequence[str | Path]) -> list[str]:
    """Tar addresses from brace patterns, globs, folders and plain paths, in order, each once.

    A folder stands for its `*.tar`. Raises `ShardError` naming a pattern that matches nothing and
    a file that is missing.
    """
    if isinstance(patterns, str | Path):
        patterns = [patterns]
    found: dict[str, None] = {}
    for pattern in patterns:
        for address in expand_urls(str(pattern)):
            if os.path.isdir(address):
                address = os.path.join(address, "*.tar")
            matches = sorted(glob(address)) if has_magic(address) else [address]
            if not matches:
                raise ShardError(f"no shard matches {address!r}; write shards with data.build")
            found.update(dict.fromkeys(matches))
    for address in found:
        if not os.path.isfile(address):
            raise ShardError(f"{address}: no such shard; write shards with data.build")
    return list(found)
