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

from tests.hosts import BIN, PORT, Host, across
from tests.launch import free_port
from tests.train.conftest import STEPS, Workspace

pytestmark = pytest.mark.slow


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


Curve = list[tuple[int, float]]


def same_curve(one: Curve, other: Curve) -> None:
    """As in test_two_ranks_equal_one: the same bins, summed in another order."""
    assert [step for step, _ in one] == [step for step, _ in other] == list(range(STEPS))
    for (step, found), (_, expected) in zip(one, other, strict=True):
        assert found == pytest.approx(expected, rel=2e-4 if step else 2e-6), step


def test_all_stages_across_two_hosts(
    workspace: Workspace,
    uninterrupted: str,
    tasks: Path,
    hosts: tuple[Host, Host],
    hostfile: Path,
    one_each: Path,
    server: str,
) -> None:
    """With a copy of the weights in each node, and on a tracking server that both reach."""
    policy = json.loads(Path("configs/ds/zero3_nodes.json").read_text())
    policy["zero_optimization"]["zero_hpz_partition_size"] = 2  # the ranks of a node, here
    engine = workspace.root / "nodes.json"
    engine.write_text(json.dumps(policy))
    uri, database = server.split()
    targets = workspace.root / "targets-of-two"
    config = workspace.config("hosts", train__engine=str(engine), behave__output=str(targets))
    on_server = ("--set", f"run.tracking_uri={uri}")

    across(hosts, one_each, "train/behave.py", config, *on_server)
    assert [p.read_bytes() for p in sorted(targets.glob("*.tar"))] == [
        p.read_bytes() for p in sorted((workspace.root / "targets").glob("*.tar"))
    ]

    said = across(hosts, hostfile, "train/main.py", config, *on_server)
    assert "on 4 ranks" in said
    assert {f"node{n}" for n in (1, 2)} <= set(re.findall(r"^(node\d):", said, re.MULTILINE))
    client = mlflow.MlflowClient(database)
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
    training = "tags.`hearken.stage` = 'train'"
    (run,) = client.search_runs([experiment.experiment_id], training)
    history = client.get_metric_history(run.info.run_id, "train/loss")
    same_curve(sorted((m.step, m.value) for m in history), workspace.curve(uninterrupted))

    rows = workspace.root / "hosts.json"
    across(
        hosts, one_each, "train/evaluate.py", config, *on_server, "--json", rows,
        "--set", f"evaluate={{shards: ['{workspace.root}/shards/train-*.tar'], tasks: {tasks}}}",
    )  # fmt: skip
    assert '"speech"' in rows.read_text()


def started(hosts: tuple[Host, Host], log: Path, commands: list[list[str]], **extra: str) -> None:
    """One command on each host, all to a good end. One rank a host: that of pdsh had two."""
    ends = [
        hosts[n].start(*command, log=log.with_suffix(f".{n}"), GLOO_SOCKET_IFNAME="eth0",
                           **{k: v.split(",")[n] if "," in v else v for k, v in extra.items()})
        for n, command in enumerate(commands)
    ]  # fmt: skip
    for n, process in enumerate(ends):
        said = log.with_suffix(f".{n}")
        assert process.wait(timeout=200) == 0, said.read_text()[-4000:]


def test_without_ssh_node_by_node(
    workspace: Workspace, uninterrupted: str, hosts: tuple[Host, Host], one_each: Path
) -> None:
    config = workspace.config("no-ssh")
    command = [
        str(BIN / "deepspeed"), "--hostfile", str(one_each), "--no_ssh", "--master_addr",
        hosts[0].address, "--master_port", PORT,
    ]  # fmt: skip
    started(
        hosts, workspace.root / "no-ssh.log",
        [[*command, "--node_rank", str(n), "train/main.py", str(config)] for n in (0, 1)],
    )  # fmt: skip
    same_curve(workspace.curve("no-ssh"), workspace.curve(uninterrupted))


def test_by_torchrun(workspace: Workspace, uninterrupted: str, hosts: tuple[Host, Host]) -> None:
    config = workspace.config("torchrun")
    command = [
        str(BIN / "torchrun"), "--nnodes", "2", "--nproc_per_node", "1", "--master_addr",
        hosts[0].address, "--master_port", PORT,
    ]  # fmt: skip
    started(
        hosts, workspace.root / "torchrun.log",
        [[*command, "--node_rank", str(n), "train/main.py", str(config)] for n in (0, 1)],
    )  # fmt: skip
    same_curve(workspace.curve("torchrun"), workspace.curve(uninterrupted))


def test_by_srun(workspace: Workspace, uninterrupted: str, hosts: tuple[Host, Host]) -> None:
    # What srun gives its tasks, for two nodes with one task each.
    config = workspace.config("srun")
    started(
        hosts, workspace.root / "srun.log",
        [[sys.executable, "train/main.py", str(config)]] * 2,
        SLURM_STEP_ID="0", SLURM_NTASKS="2", SLURM_PROCID="0,1", SLURM_LOCALID="0",
        SLURM_STEP_TASKS_PER_NODE="1(x2)", MASTER_ADDR=hosts[0].address, MASTER_PORT=PORT,
    )  # fmt: skip
    same_curve(workspace.curve("srun"), workspace.curve(uninterrupted))
