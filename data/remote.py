"""Bytes from elsewhere: a web server, in whole or by range, or the output of a command.

One try each, that ends: whoever sends nothing for `STALL_SECONDS`, or crawls, is given up. What
may work later raises `OSError`; what will not (no such file, no permission) raises `ShardError`.
"""

import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import IO
from urllib.parse import urlsplit

import requests

from data.archive import ShardError
from data.secrets import redacted

PIPE = "pipe:"
STALL_SECONDS = 30.0
_CRAWL = 10_000  # bytes per second; a transfer may take STALL_SECONDS more than at this pace
_CHUNK = 1 << 20
_FOR_GOOD = {400, 401, 403, 404, 405, 410, 451}
Sink = Callable[[bytes], object]


def is_remote(address: str) -> bool:
    """Whether this is a web address or a command, rather than a path."""
    return address.startswith((PIPE, "http://", "https://"))


def shown(address: str) -> str:
    """An address as messages name it: without its query, which may hold secrets, or any others."""
    if not address.startswith("http"):
        return redacted(address)
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def fetch(address: str, sink: Sink, session: requests.Session) -> None:
    """All bytes of a web address, or of a command's output, in order into `sink`."""
    if address.startswith(PIPE):
        _run(address, sink)
        return
    with _get(address, {"Accept-Encoding": "identity"}, session) as response:
        for chunk in _body(response, address):
            sink(chunk)


def fetch_range(
    url: str, offset: int, size: int, session: requests.Session
) -> tuple[bytes, int | None]:
    """Up to `size` bytes from `offset`, fewer only at the end, and the file's size if told."""
    asked = {"Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"}
    with _get(url, asked, session) as response:
        told = re.fullmatch(
            r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", "")
        )
        total = int(told[2]) if told and told[2] != "*" else None
        if response.status_code == 416:
            return b"", total
        if response.status_code != 206 or told is None or told[1] != str(offset):
            raise ShardError(
                f"{shown(url)}: the server does not answer range requests (HTTP "
                f"{response.status_code}); give a cache folder, to fetch whole shards into"
            )
        parts = b"".join(_body(response, url))
    expected = size if total is None else max(0, min(size, total - offset))
    if len(parts) != expected:
        raise OSError(f"{shown(url)}: sent {len(parts)} bytes of the {expected} asked for")
    return parts, total


def _get(url: str, headers: dict[str, str], session: requests.Session) -> requests.Response:
    try:
        response = session.get(url, headers=headers, stream=True, timeout=STALL_SECONDS)
    except requests.RequestException as error:
        raise OSError(f"{shown(url)}: {_cause(error)}") from None
    code = response.status_code
    if code < 400 or code == 416:
        return response
    response.close()
    message = f"{shown(url)}: HTTP {code} {response.reason}"
    if code in _FOR_GOOD:
        raise ShardError(f"{message}; check the address and the permission to read it")
    raise OSError(message)


def _body(response: requests.Response, url: str) -> Iterator[bytes]:
    """The body as it comes; raises `OSError` where it stalls, crawls or ends too early."""
    started, found = time.monotonic(), 0
    while True:
        try:
            chunk = response.raw.read1(_CHUNK)
        except Exception as error:  # urllib3 has many, none of them an OSError
            raise OSError(f"{shown(url)}: {_cause(error)} after {found} bytes") from None
        if not chunk:
            return
        found += len(chunk)
        if time.monotonic() - started > STALL_SECONDS + found / _CRAWL:
            raise OSError(f"{shown(url)}: too slow, {found} bytes in {STALL_SECONDS:g} s and more")
        yield chunk


def _cause(error: BaseException) -> str:
    """The innermost of nested errors, in one line: the others only wrap it."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    reason = getattr(error, "reason", None)
    if isinstance(reason, BaseException):
        return _cause(reason)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _run(address: str, sink: Sink) -> None:
    """The output of a shell command; any part of its pipe that fails makes it fail."""
    command = address.removeprefix(PIPE)
    process = subprocess.Popen(
        ["bash", "-o", "pipefail", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # so that the whole pipe can be ended
    )
    assert process.stdout
    assert process.stderr
    complaint = b""
    try:
        for stream, data in _outputs(process.stdout, process.stderr, address):
            if stream is process.stdout:
                sink(data)
            else:
                complaint = (complaint + data)[-500:]
        status = process.wait(STALL_SECONDS)
    except subprocess.TimeoutExpired:
        raise OSError(f"{shown(address)}: closed its output but did not end") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()
        process.stderr.close()
    if status:
        said = redacted(" ".join(complaint.decode(errors="replace").split()))
        raise OSError(f"{shown(address)}: exit status {status}: {said or 'it said nothing'}")


def _outputs(out: IO[bytes], err: IO[bytes], address: str) -> Iterator[tuple[IO[bytes], bytes]]:
    """What a command writes, as it comes; raises `OSError` where nothing comes."""
    with selectors.DefaultSelector() as selector:
        for stream in (out, err):
            selector.register(stream, selectors.EVENT_READ, stream)
        while selector.get_map():
            ready = selector.select(STALL_SECONDS)
            if not ready:
                raise OSError(f"{shown(address)}: no output for {STALL_SECONDS:g} s")
            for key, _ in ready:
                data = os.read(key.fd, _CHUNK)
                if data:
                    yield key.data, data
                else:
                    selector.unregister(key.fileobj)
