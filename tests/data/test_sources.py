"""Remote shards read like local ones; faults of network and disk are retried and then named."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data import remote, retry
from data.archive import ContentError, ShardError, write_shard
from data.cache import Cache
from data.retry import ReadError
from data.shards import Overlay, ShardSet
from data.stream import Stream
from tests.data import made
from tests.data.faulty import FaultyServer, serving
from tests.data.test_stream import build, fingerprint

MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    made.targets(folder / "t", made.shards(folder / "s", [4, 0, 6]))
    return folder


@pytest.fixture
def server(folder):
    with serving(folder) as running:
        yield running


@pytest.fixture(autouse=True)
def _impatient(monkeypatch) -> None:
    monkeypatch.setattr(retry, "PAUSES", (0.0, 0.01, 0.01))
    monkeypatch.setattr(remote, "STALL_SECONDS", 1.0)


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "cache", MEGABYTE)


def local(folder: Path) -> ShardSet:
    return ShardSet.open(folder / "s")


def over_http(server: FaultyServer, cache: Cache | None = None) -> ShardSet:
    return ShardSet.open(f"{server.address}/s/train-{{000000..000002}}.tar?token=x", cache)


def everything(shards: ShardSet) -> list[bytes]:
    return [shards.read(i, member) for i in range(len(shards)) for member in ("flac", "json")]


def first_read(shards: ShardSet) -> bytes:
    return retry.retried(lambda: shards.read(0, "flac"), lambda: "it")


def kept(cache: Cache) -> list[str]:
    return sorted(p.name for p in cache.folder.iterdir() if p.suffix == ".tar")


def test_by_range_requests(folder, server) -> None:
    shards = over_http(server)
    assert shards.digest == local(folder).digest
    assert everything(shards) == everything(local(folder))
    assert all(asked for path, asked in server.requests if path.endswith(".tar"))
    assert "token" not in shards.shard_name(0)


def test_through_the_cache_each_shard_once(folder, server, cache) -> None:
    for _ in range(2):
        assert everything(over_http(server, cache)) == everything(local(folder))
    assert sorted(server.tars()) == ["/s/train-000000.tar", "/s/train-000002.tar"]
    assert len(kept(cache)) == 2


def test_commands_go_through_the_cache(folder, cache) -> None:
    pattern = f"pipe:cat {folder}/s/train-{{000000..000002}}.tar | cat"
    shards = ShardSet.open(pattern, cache)
    assert everything(shards) == everything(local(folder))
    with pytest.raises(ShardError, match="give a cache folder"):
        ShardSet.open(pattern)
    with pytest.raises(ShardError, match=r"names no \.tar"):
        ShardSet.open("pipe:cat x", cache)


def test_overlays_and_streams_over_http(folder, server, cache) -> None:
    base = local(folder)
    here = build(base, Overlay.open(folder / "t", base))
    far = over_http(server)
    addresses = f"{server.address}/t/targets-{{000000..000001}}.tar"
    there = build(far, Overlay.open(addresses, far, cache=cache), workers=2)
    assert fingerprints(there) == fingerprints(here)


def fingerprints(stream: Stream) -> list[list[str]]:
    return [[fingerprint(batch) for batch in step] for step in stream.steps(0)]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("fault", [500, 503, 429, "stall", "cut", "drip"])
def test_transient_faults_are_tried_again(folder, server, cache, fault, cached) -> None:
    server.faults = [fault, fault]
    shards = over_http(server, cache if cached else None)
    started = time.monotonic()
    assert first_read(shards) == local(folder).read(0, "flac")
    assert time.monotonic() - started < 15
    assert len(server.tars()) == 3


def test_less_of_a_range_than_asked_for(folder, server) -> None:
    server.faults = ["short"]
    assert first_read(over_http(server)) == local(folder).read(0, "flac")
    assert len(server.tars()) == 2


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("fault", "told"), [(500, "HTTP 500"), ("stall", "timed out|Timeout")])
def test_lasting_faults_stop_in_one_line(server, cache, fault, told, cached) -> None:
    server.faults = [fault] * 9
    with pytest.raises(ReadError, match=told) as caught:
        first_read(over_http(server, cache if cached else None))
    assert "in 4 tries" in str(caught.value)
    assert "train-000000.tar" in str(caught.value)
    assert "token" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not cached or not kept(cache)


def test_no_server_at_all(folder, server) -> None:
    shards = over_http(server)
    server.shutdown()
    server.server_close()
    with pytest.raises(ReadError, match="refused"):
        first_read(shards)


def test_what_will_not_get_better_is_not_tried_again(folder, server, cache) -> None:
    with pytest.raises(ShardError, match="HTTP 404"):
        ShardSet.open(f"{server.address}/s/none.tar")
    shards = over_http(server)
    server.faults = ["flat"]
    with pytest.raises(ShardError, match=r"range requests.*cache"):
        first_read(shards)
    server.faults = ["garbage"]
    with pytest.raises(ShardError, match="SHA-256"):
        first_read(over_http(server, cache))
    server.faults = ["garbage"]
    with pytest.raises(ContentError, match="does not match its tar"):
        first_read(shards)
    assert kept(cache) == []


def test_another_tar_than_the_indexs(folder, server, cache, tmp_path) -> None:
    tar = folder / "s" / "train-000000.tar"
    whole = tar.read_bytes()
    try:
        tar.write_bytes(whole + b"\0" * 512)
        for shards in (over_http(server), over_http(server, cache)):
            with pytest.raises(ShardError, match="build the shard again"):
                first_read(shards)
        tar.write_bytes(whole[: len(whole) // 2])  # truncated: the good samples are used
        for shards in (over_http(server), over_http(server, cache)):
            assert first_read(shards)
            with pytest.raises(ContentError, match="truncated"):
                shards.read(3, "flac")
    finally:
        tar.write_bytes(whole)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("head -c 2000 {tar}; exit 3", "exit status 3"),
        ("cat {tar} {tar}.none |", r"none.*No such file"),
        ("cat {tar}; sleep 60", "no output for"),
        ("cat {tar}; exec >&- 2>&-; sleep 60", "did not end"),
    ],
)
def test_commands_that_fail(folder, cache, command, told) -> None:
    shards = piped(folder, command, cache)
    started = time.monotonic()
    with pytest.raises(ReadError, match=told):
        first_read(shards)
    assert time.monotonic() - started < 15
    assert kept(cache) == []


def piped(folder: Path, command: str, cache: Cache) -> ShardSet:
    """The index is given as it is; only the tar's command fails, if need be within a pipe."""
    script = folder / "give.sh"
    tar = folder / "s" / "train-000000.tar"
    tail = " | cat" if command.endswith("|") else ""
    failing = command.rstrip("|").format(tar=tar)
    script.write_text(f'case "$1" in *.parquet) cat "$1";; *) {failing};; esac\n')
    return ShardSet.open(f"pipe:bash {script} {tar}{tail}", cache)


def sized(folder: Path, count: int = 6) -> list[int]:
    """Shards of about 60 kB; returns their sizes."""
    for s in range(count):
        rows = [made.row(f"b{s}-{n}", 15_000) for n in range(2)]
        write_shard(folder / f"b-{s:06d}.tar", rows, made.FIELDS, {})
    return [tar.stat().st_size for tar in sorted(folder.glob("*.tar"))]


def test_the_cache_keeps_within_its_limit(tmp_path) -> None:
    sizes = sized(tmp_path / "s")
    cache = Cache(tmp_path / "cache", sum(sizes[:3]) + 1000)
    with serving(tmp_path / "s") as server:
        shards = ShardSet.open(f"{server.address}/b-{{000000..000005}}.tar", cache)
        for i in (0, 2, 4, 0, 6):
            assert shards.read(i, "flac")
        # The second was read longest ago when the fourth came.
        assert [name[:8] for name in kept(cache)] == ["b-000000", "b-000002", "b-000003"]
        assert everything(shards) == everything(ShardSet.open(tmp_path / "s"))
        assert sum(p.stat().st_size for p in cache.folder.iterdir()) <= cache.limit_bytes
        small = ShardSet.open(f"{server.address}/b-000000.tar", Cache(tmp_path / "c", 50_000))
        with pytest.raises(ShardError, match=r"alone, .* is larger than the cache's limit"):
            first_read(small)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("shards_kept", [4, 20])
def test_many_readers_of_one_cache(tmp_path, shards_kept) -> None:
    sizes = sized(tmp_path / "s")
    cache = Cache(tmp_path / "cache", max(sizes) * shards_kept)
    with serving(tmp_path / "s") as server:
        shards = ShardSet.open(f"{server.address}/b-{{000000..000005}}.tar", cache)
        truth = everything(ShardSet.open(tmp_path / "s"))
        found: list[bool] = []
        readers = [
            threading.Thread(target=lambda: found.append(everything(shards) == truth))
            for _ in range(3)
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(60)
        assert shards_kept < 6 or len(server.tars()) == 6  # the others waited for the first
    assert found == [True] * 3
    assert sum(p.stat().st_size for p in cache.folder.iterdir()) <= cache.limit_bytes


def test_a_disk_that_refuses(folder, server, cache, tmp_path) -> None:
    """As a full disk does: the system takes part of a file, and then no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    shards = over_http(server, cache)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ReadError, match="File too large"):
            first_read(shards)
        rows = [made.row("k", 16_000)]
        with pytest.raises(OSError, match="File too large"):
            write_shard(tmp_path / "w" / "t.tar", rows, made.FIELDS, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert kept(cache) == []
    assert not [p for p in cache.folder.iterdir() if p.suffix == ".part"]
    assert list((tmp_path / "w").iterdir()) == []
    assert first_read(shards) == local(folder).read(0, "flac")


def test_what_a_killed_download_left_is_cleared_away(folder, server, cache) -> None:
    server.faults = ["stall"]
    script = (
        "import sys; from pathlib import Path; from data.cache import Cache; "
        "from data.shards import ShardSet; "
        f"ShardSet.open(sys.argv[1], Cache(Path(sys.argv[2]), {MEGABYTE})).read(0, 'flac')"
    )
    address = f"{server.address}/s/train-000000.tar"
    process = subprocess.Popen([sys.executable, "-c", script, address, str(cache.folder)])
    drafts: list[Path] = []
    while not drafts:
        assert process.poll() is None
        time.sleep(0.02)
        drafts = [p for p in cache.folder.glob(".*.part") if p.stat().st_size]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    other = ShardSet.open(f"{server.address}/s/train-000002.tar", cache)
    assert first_read(other)
    assert not drafts[0].exists()
    assert first_read(ShardSet.open(address, cache)) == local(folder).read(0, "flac")
