"""Multi-node, as multi-node: two hosts with two ranks each, by every way of starting them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from tests import hosts as nodes
from tests.hosts import Host
from tests.launch import free_port
from tests.train.conftest import STEPS, Workspace

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
PORT = "29517"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    if reason := nodes.why_not():
        if "FORBIDDEN" in reason:
            pytest.skip(reason)
        pytest.fail(reason)
    with nodes.two_hosts(tmp_path_factory.mktemp("hosts")) as pair:
        yield pair


@pytest.fixture(scope="module")
def hostfile(hosts: tuple[Host, Host], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hostfile, with the environment of every node in a `.deepspeed_env` beside it."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "hostfile").write_text("".join(f"{host.name} slots=2\n" for host in hosts))
    (folder / "env").write_text("GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\nHF_HUB_OFFLINE=1\n")
    return folder / "hostfile"


@pytest.fixture(scope="module")
def server(hosts: tuple[Host, Host], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow tracking server on the first host, which the second reaches, too."""
    folder = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    process = hosts[0].start(
        BIN / "mlflow", "server", "--host", "0.0.0.0", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--allowed-hosts", "*",
        "--artifacts-destination", folder, log=folder / "server.log",
    )  # fmt: skip
    uri = f"http://{hosts[0].address}:{port}"
    probe = f"import urllib.request as u; u.urlopen('{uri}/health')"
    deadline = time.monotonic() + 90
    while subprocess.run(
        hosts[1].command(sys.executable, "-c", probe), capture_output=True
    ).returncode:
        assert time.monotonic() < deadline, (folder / "server.log").read_text()
        time.sleep(0.5)
    yield f"{uri} sqlite:///{folder}/mlflow.db"
    os.killpg(process.pid, signal.SIGTERM)
    process.wait()


def across(hosts: tuple[Host, Host], hostfile: Path, script: str, *args: str | Path) -> str:
    """`deepspeed --hostfile`, from the first host through pdsh."""
    return hosts[0].run(
        BIN / "deepspeed", "--hostfile", hostfile, "--master_port", PORT, script, *args,
        DS_ENV_FILE=str(hostfile.with_name("env")),
    )  # fmt: skip


def same_curve(workspace: Workspace, name: str, reference: str) -> None:
    """As in test_two_ranks_equal_one: the same bins, summed in another order."""
    for (step, found), (_, expected) in zip(
        workspace.curve(name), workspace.curve(reference), strict=True
    ):
        assert found == pytest.approx(expected, rel=2e-4 if step else 2e-6), step


def test_all_stages_across_two_hosts(
    workspace: Workspace, uninterrupted: str, tasks: Path, hosts: tuple[Host, Host], hostfile: Path
) -> None:
    config = workspace.config("hosts", behave__output=str(workspace.root / "targets-of-two"))
    across(hosts, hostfile, "train/behave.py", config)
    written = sorted((workspace.root / "targets-of-two").glob("*.tar"))
    assert [p.read_bytes() for p in written] == [
        p.read_bytes() for p in sorted((workspace.root / "targets").glob("*.tar"))
    ]
    said = across(hosts, hostfile, "train/main.py", config)
    assert "on 4 ranks" in said
    assert {f"node{n}" for n in (1, 2)} <= set(re.findall(r"^(node\d):", said, re.MULTILINE))
    same_curve(workspace, "hosts", uninterrupted)
    rows = workspace.root / "hosts.json"
    across(
        hosts, hostfile, "train/evaluate.py", config, "--json", rows,
        "--set", f"evaluate={{shards: ['{workspace.root}/shards/train-*.tar'], tasks: {tasks}}}",
    )  # fmt: skip
    assert '"speech"' in rows.read_text()


def test_one_run_on_a_server_that_both_reach(
    workspace: Workspace, hosts: tuple[Host, Host], hostfile: Path, server: str
) -> None:
    uri, database = server.split()
    config = workspace.config("served", train__schedule="constant")
    here = ("--set", f"run.tracking_uri={uri}")
    half = ("--set", f"train.steps={STEPS // 2}")
    across(hosts, hostfile, "train/main.py", config, *here, *half)
    across(hosts, hostfile, "train/main.py", config, *here)
    client = mlflow.MlflowClient(database)
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
    (run,) = client.search_runs([experiment.experiment_id])
    steps = [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(steps) == list(range(STEPS))


def test_a_copy_of_the_weights_in_each_node(
    workspace: Workspace, uninterrupted: str, hosts: tuple[Host, Host], hostfile: Path
) -> None:
    policy = json.loads(Path("configs/ds/zero3_nodes.json").read_text())
    policy["zero_optimization"]["zero_hpz_partition_size"] = 2  # the ranks of a node, here
    path = workspace.root / "nodes.json"
    path.write_text(json.dumps(policy))
    across(hosts, hostfile, "train/main.py", workspace.config("hpz", train__engine=str(path)))
    same_curve(workspace, "hpz", uninterrupted)


def started(hosts: tuple[Host, Host], log: Path, commands: list[list[str]], **extra: str) -> None:
    """One command on each host (some of them twice), all to a good end."""
    ends = [
        hosts[n % 2].start(*command, log=log.with_suffix(f".{n}"), GLOO_SOCKET_IFNAME="eth0",
                           **{k: v.split(",")[n] if "," in v else v for k, v in extra.items()})
        for n, command in enumerate(commands)
    ]  # fmt: skip
    for n, process in enumerate(ends):
        said = log.with_suffix(f".{n}")
        assert process.wait(timeout=200) == 0, said.read_text()[-4000:]


def test_without_ssh_node_by_node(
    workspace: Workspace, uninterrupted: str, hosts: tuple[Host, Host], hostfile: Path
) -> None:
    config = workspace.config("no-ssh")
    command = [
        str(BIN / "deepspeed"), "--hostfile", str(hostfile), "--no_ssh", "--master_addr",
        hosts[0].address, "--master_port", PORT,
    ]  # fmt: skip
    started(
        hosts, workspace.root / "no-ssh.log",
        [[*command, "--node_rank", str(n), "train/main.py", str(config)] for n in (0, 1)],
    )  # fmt: skip
    same_curve(workspace, "no-ssh", uninterrupted)


def test_by_torchrun(workspace: Workspace, uninterrupted: str, hosts: tuple[Host, Host]) -> None:
    config = workspace.config("torchrun")
    command = [
        str(BIN / "torchrun"), "--nnodes", "2", "--nproc_per_node", "2", "--master_addr",
        hosts[0].address, "--master_port", PORT,
    ]  # fmt: skip
    started(
        hosts, workspace.root / "torchrun.log",
        [[*command, "--node_rank", str(n), "train/main.py", str(config)] for n in (0, 1)],
    )  # fmt: skip
    same_curve(workspace, "torchrun", uninterrupted)


def test_by_srun(workspace: Workspace, uninterrupted: str, hosts: tuple[Host, Host]) -> None:
    # What srun gives its tasks, for two nodes with two tasks each; tasks 0 and 2 on node 1 here.
    config = workspace.config("srun")
    started(
        hosts, workspace.root / "srun.log",
        [[sys.executable, "train/main.py", str(config)]] * 4,
        SLURM_STEP_ID="0", SLURM_NTASKS="4", SLURM_PROCID="0,2,1,3", SLURM_LOCALID="0,0,1,1",
        SLURM_STEP_TASKS_PER_NODE="2(x2)", MASTER_ADDR=hosts[0].address, MASTER_PORT=PORT,
    )  # fmt: skip
    same_curve(workspace, "srun", uninterrupted)


def test_preflight_finds_all_in_order(
    workspace: Workspace, hosts: tuple[Host, Host], hostfile: Path
) -> None:
    config = workspace.config("ready")
    said = across(hosts, hostfile, "train/preflight.py", config, "--hostfile", hostfile)
    assert "4 ranks are ready" in said
    assert "node2" in said


def test_preflight_names_the_host_that_fails(
    workspace: Workspace, hosts: tuple[Host, Host], hostfile: Path
) -> None:
    # The second host has lost a shard: it sees another folder in its place.
    one, two = (host.start for host in hosts)
    config = workspace.config("not-ready")
    shards = str(workspace.root / "shards" / "train-*.tar")
    slurm = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0",
             "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "MASTER_ADDR": hosts[0].address,
             "MASTER_PORT": PORT, "GLOO_SOCKET_IFNAME": "eth0"}  # fmt: skip
    command = [sys.executable, "train/preflight.py", str(config), "--set"]
    log = workspace.root / "not-ready.log"
    good = one(*command, f"data.shards=['{shards}']", log=log, SLURM_PROCID="0", **slurm)
    bad = two(
        *command, "data.shards=['/nowhere/train-*.tar']", log=log.with_suffix(".2"),
        SLURM_PROCID="1", **slurm,
    )  # fmt: skip
    assert good.wait(timeout=100) == 2
    bad.wait(timeout=100)
    assert "node2: data.shards: " in log.read_text()
    assert "node1" not in log.read_text()
    # And one that is not there at all.
    hostlist = workspace.root / "hostlist"
    hostlist.write_text("node1 slots=1\nnode2 slots=1\n")
    alone = one(
        *command, f"data.shards=['{shards}']", "--hostfile", hostlist, log=log, SLURM_PROCID="0",
        **slurm,
    )  # fmt: skip
    assert alone.wait(timeout=100) == 2
    assert "no report within 30 s from rank 1 on node2" in log.read_text()
