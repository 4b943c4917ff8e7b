"""Two hosts on one machine: network namespaces with a cable between them and an sshd in each.

They share the disk, as the nodes of a cluster do. Needs root, iproute2, openssh-server and pdsh.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.launch import ROOT, environment

BIN = Path(sys.executable).parent
PORT = "29517"  # of the ranks' first meeting

_PACKAGES = {"ip": "iproute2", "sshd": "openssh-server", "pdsh": "pdsh"}


@dataclass(frozen=True)
class Host:
    """A namespace, the name that the others know it by, and its address."""

    namespace: str
    name: str
    address: str

    def command(self, *args: str | Path) -> list[str]:
        """`args`, to be run on this host."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname {self.name} && exec "$@"', "sh"]
        return ["ip", "netns", "exec", self.namespace, *named, *map(str, args)]

    def start(self, *args: str | Path, log: Path, **extra: str) -> subprocess.Popen[bytes]:
        """Start on this host, in a session of its own."""
        with log.open("wb") as out:
            return subprocess.Popen(
                self.command(*args), cwd=ROOT, env=environment() | extra, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def run(self, *args: str | Path, timeout: float = 240, **extra: str) -> str:
        """Run on this host to a good end; returns what it printed."""
        done = subprocess.run(
            self.command(*args), cwd=ROOT, env=environment() | extra, text=True, timeout=timeout,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:]
        return done.stdout


def why_not() -> str | None:
    """What two hosts on this machine lack, and the fix; None where nothing is missing."""
    missing = [package for name, package in _PACKAGES.items() if not _found(name)]
    if missing:
        return f"two hosts need {', '.join(missing)}: apt-get install {' '.join(missing)}"
    probe = f"hearken-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return (
            f"NETWORK NAMESPACES ARE FORBIDDEN HERE, so nothing multi-node is tested: {made.stderr}"
        )
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Both hosts up and reachable from each other by name and by ssh without a password."""
    hosts = tuple(Host(f"hearken-{os.getpid()}-{n}", f"node{n}", f"10.213.7.{n}") for n in (1, 2))
    with ExitStack() as stack:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            stack.callback(_ip, "netns", "del", host.namespace)
        _cable(hosts)
        _credentials(folder)
        for host in hosts:
            # `ip netns exec` mounts what is here over /etc, for that namespace alone.
            etc = Path("/etc/netns") / host.namespace
            (etc / "ssh").mkdir(parents=True)
            stack.callback(shutil.rmtree, etc)
            names = "".join(f"{h.address} {h.name}\n" for h in hosts)
            (etc / "hosts").write_text("127.0.0.1 localhost\n" + names)
            (etc / "ssh/ssh_config").write_text(
                f"Host *\n  IdentityFile {folder}/key\n  StrictHostKeyChecking no\n"
                "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
            )
            daemon = host.start("/usr/sbin/sshd", "-D", "-e", "-f", folder / "sshd_config",
                                log=folder / f"{host.name}.sshd.log")  # fmt: skip
            stack.callback(daemon.kill)
        for host in hosts:
            _wait_for_ssh(hosts[0], host)
        yield hosts[0], hosts[1]


def across(hosts: tuple[Host, Host], hostfile: Path, script: str, *args: str | Path) -> str:
    """`deepspeed --hostfile`, from the first host through pdsh; an `env` lies beside the file."""
    return hosts[0].run(
        BIN / "deepspeed", "--hostfile", hostfile, "--master_port", PORT, script, *args,
        DS_ENV_FILE=str(hostfile.with_name("env")),
    )  # fmt: skip


def _cable(hosts: tuple[Host, ...]) -> None:
    one, two = hosts
    # Both ends carry the same name: one GLOO_SOCKET_IFNAME holds for every node.
    _ip("link", "add", "eth0", "netns", one.namespace, "type", "veth",
        "peer", "name", "eth0", "netns", two.namespace)  # fmt: skip
    for host in hosts:
        _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
        _ip("-n", host.namespace, "link", "set", "eth0", "up")
        _ip("-n", host.namespace, "link", "set", "lo", "up")


def _credentials(folder: Path) -> None:
    for name in ("key", "host_key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True
        )
    shutil.copy(folder / "key.pub", folder / "authorized_keys")
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\nPidFile none\n"
        "MaxStartups 100\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)


def _wait_for_ssh(start: Host, end: Host) -> None:
    deadline = time.monotonic() + 10
    while subprocess.run(start.command("ssh", end.name, "true"), capture_output=True).returncode:
        assert time.monotonic() < deadline, f"no ssh from {start.name} to {end.name}"
        time.sleep(0.1)


def _found(name: str) -> bool:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is not None


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True)
