"""Two hosts of two ranks, what they need from others, and one supervised run on them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests import hosts as nodes
from tests import tiny
from tests.hosts import Host
from tests.launch import free_port

BIN = Path(sys.executable).parent
SLOTS = 2
_DISK = "64m"


@dataclass
class Cluster:
    """What stays up while runs come and go."""

    root: Path
    hosts: tuple[Host, Host]
    shards: str
    """Address of the shards' server."""
    tracker_port: int
    _tracker: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def disk(self) -> Path:
        """Where runs keep what they write: so small that it can be filled."""
        return self.root / "disk"

    @property
    def tracker(self) -> str:
        return f"http://{self.hosts[0].address}:{self.tracker_port}"

    @property
    def database(self) -> str:
        """The tracker's own, for those who need not ask it."""
        return f"sqlite:///{self.root}/mlflow.db"

    def start_tracker(self) -> None:
        self._tracker.append(self.hosts[0].start(
            BIN / "mlflow", "server", "--host", "0.0.0.0", "--port", str(self.tracker_port),
            "--workers", "1", "--backend-store-uri", self.database, "--allowed-hosts", "*",
            "--artifacts-destination", self.root / "artifacts", log=self.root / "tracker.log",
        ))  # fmt: skip

    def stop_tracker(self) -> None:
        os.killpg(self._tracker.pop().pid, signal.SIGKILL)

    def config(self, name: str, steps: int) -> Path:
        """A run of its own, on the small disk."""
        tree = tiny.config(
            self.root,
            data__shards=[f"{self.shards}/train-{{000000..000003}}.tar",
                          f"{self.shards}/texts-000000.tar"],
            data__bins_per_step=6, data__workers=1, train__steps=steps, train__hang_seconds=30.0,
            train__checkpoint_every=25, train__schedule="constant",
        )  # fmt: skip
        tree["run"] |= {
            "name": name, "output": str(self.disk / name), "tracking_uri": self.tracker,
            "ledger": True,
        }  # fmt: skip
        return tiny.write_config(self.root / f"{name}.yaml", tree)


@contextmanager
def cluster(root: Path) -> Iterator[Cluster]:
    """Both hosts and both servers up, a tiny world made, its targets written."""
    with ExitStack() as stack:
        (root / "hosts").mkdir()
        (root / "disk").mkdir()
        # Before the hosts are up: they do not see what is mounted later.
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", root / "disk"], check=True
        )
        stack.callback(subprocess.run, ["umount", "-l", root / "disk"], check=False)
        hosts = stack.enter_context(nodes.two_hosts(root / "hosts"))
        tiny.shards(root)
        texts = root / "texts.jsonl"
        texts.write_text("".join(
            json.dumps({"instruction": f"{a} {b}", "output": f"{b} {a}"}) + "\n"
            for a in tiny.WORDS[:4] for b in tiny.WORDS[4:8]
        ))  # fmt: skip
        tiny.encoder(root / "encoder")
        tiny.llm(root / "llm")
        tiny.prompts(root / "prompts.yaml")
        _python("-m", "data.build", "instructions", texts, root / "shards", "--language", "en",
                "--workers", "1")  # fmt: skip
        whole = tiny.config(root, data__shards=[str(root / "shards/*.tar")])
        _python("train/behave.py", tiny.write_config(root / "targets.yaml", whole))
        port = free_port()
        server = hosts[0].start(
            sys.executable, "-m", "tests.chaos.shards", root / "shards", str(port),
            log=root / "shards.log",
        )  # fmt: skip
        stack.callback(server.kill)
        made = Cluster(root, hosts, f"http://{hosts[0].address}:{port}", free_port())
        made.start_tracker()
        stack.callback(made.stop_tracker)
        (root / "hostfile").write_text("".join(f"{h.name} slots={SLOTS}\n" for h in hosts))
        (root / "env").write_text(
            f"GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\nHF_HUB_OFFLINE=1\nHEARKEN_CHAOS={root}\n"
        )
        try:
            yield made
        finally:
            for host in hosts:
                for pid in pids(host):
                    _kill(pid, signal.SIGKILL)


class Run:
    """One run under the supervisor, on the first host."""

    def __init__(self, cluster: Cluster, name: str, steps: int):
        self.cluster, self.name, self.steps = cluster, name, steps
        self.config = cluster.config(name, steps)
        self.folder = cluster.disk / name
        self.log = cluster.root / f"{name}.log"
        self.log.touch()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or start it once more, as a scheduler does."""
        log = self.cluster.root / f"{self.name}.part"
        self._keep()
        self._process = self.cluster.hosts[0].start(
            sys.executable, "-m", "train.supervise", self.folder, "--", BIN / "deepspeed",
            "--hostfile", self.cluster.root / "hostfile", "--master_port", "29517",
            "tests/chaos/entry.py", self.config,
            log=log, DS_ENV_FILE=str(self.cluster.root / "env"),
        )  # fmt: skip

    def status(self) -> int | None:
        """The supervisor's exit status, once it has ended."""
        assert self._process is not None
        return self._process.poll()

    def said(self) -> str:
        """All that was printed so far."""
        part = self.cluster.root / f"{self.name}.part"
        return self.log.read_text() + (part.read_text(errors="replace") if part.exists() else "")

    def _keep(self) -> None:
        part = self.cluster.root / f"{self.name}.part"
        if part.exists():
            with self.log.open("a") as log:
                log.write(part.read_text(errors="replace"))
            part.unlink()

    def step(self) -> int:
        """Steps that were ever finished, trained again or not."""
        try:
            tail = (self.folder / "metrics.jsonl").read_bytes()[-20_000:]
        except FileNotFoundError:
            return 0
        found = re.findall(rb'^\{"step": (\d+)', tail, re.MULTILINE)
        return int(found[-1]) + 1 if found else 0

    def supervisor(self) -> psutil.Process:
        """`unshare … sh … python -m train.supervise`: what it became."""
        assert self._process is not None
        return psutil.Process(self._process.pid)

    def launcher(self) -> psutil.Process | None:
        """`deepspeed --hostfile`, if it is up."""
        return next(
            (p for p in _on(self.cluster.hosts[0]) if "--hostfile" in p.cmdline()[2:]
             and "train.supervise" not in p.cmdline()), None,
        )  # fmt: skip

    def ranks(self) -> dict[int, psutil.Process]:
        """Rank -> its process; their data workers have the same words, and a rank as parent."""
        found = {}
        for host in self.cluster.hosts:
            for process in filter(_is_rank, _on(host)):
                with suppress(psutil.Error):
                    if not _is_rank(process.parent()):
                        found[int(process.environ()["RANK"])] = process
        return found

    def node(self, host: Host) -> list[psutil.Process]:
        """All of the run that is on this host: supervisor, launchers and ranks."""
        return [p for p in _on(host) if str(self.config) in p.cmdline()]


def _is_rank(process: psutil.Process | None) -> bool:
    return process is not None and process.cmdline()[1:3] == ["-u", "tests/chaos/entry.py"]


def pids(host: Host) -> list[int]:
    said = subprocess.run(["ip", "netns", "pids", host.namespace], capture_output=True, text=True)
    return [int(pid) for pid in said.stdout.split()]


def _on(host: Host) -> Iterator[psutil.Process]:
    """The host's processes, without those that end just now."""
    for pid in pids(host):
        try:
            process = psutil.Process(pid)
            if process.cmdline():
                yield process
        except psutil.Error:
            continue


def _kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _python(*args: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, cwd=nodes.ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
