"""Before a long run: has every host what the run needs? In under a minute, naming the host.

    deepspeed --hostfile hosts train/preflight.py configs/blsp.yaml --hostfile hosts

Each rank looks at its own host first and reports to rank 0 over a plain TCP store, so that a host
that cannot be reached is named instead of waited for. Then all of them do one collective.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.distributed import Store

from data.shards import ShardSet
from train import config as cfg
from train.cli import arguments, guarded, leave
from train.engine import World, environment, world
from train.feed import open_cache
from train.meeting import open_store
from train.model.build import length_rule, load_tokenizer
from train.ops import library
from train.progress import console
from train.stopping import Stopped
from train.tracking import revision

PACKAGES = ("torch", "deepspeed", "transformers", "webdataset", "mlflow", "numpy")
WAIT = 30.0
"""Seconds that ranks wait for each other."""
_CLOCK_SECONDS = 2.0
_FREE_GB = 20.0
_MB = 64


def look(config: cfg.Config) -> dict[str, Any]:
    """What this rank finds on its own host; `faults` are lines for the user."""
    faults: list[str] = []

    def tried(what: str, check: Callable[[], object]) -> None:
        try:
            check()
        except Exception as error:  # whatever it is, the host is to be named with it
            faults.append(f"{what}: {error}")

    tried("data.shards", lambda: _read_ends(config))
    tried("model.encoder", lambda: length_rule(config.model))
    tried("model.decoder", lambda: load_tokenizer(config.model))
    tried("run.output", lambda: config.run.output.mkdir(parents=True, exist_ok=True))
    free = shutil.disk_usage(config.run.output if config.run.output.exists() else ".").free / 1e9
    if free < _FREE_GB:
        faults.append(f"run.output: {free:.0f} GB free on its disk, want {_FREE_GB:.0f}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if why := library.missing(device):
        faults.append(f"csrc/: {why}")
    return {
        "host": socket.gethostname(),
        "facts": {
            "python": platform.python_version(),
            "code": revision(),
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "faults": faults,
    }


def reported(store: Store, mine: dict[str, Any], hosts: list[str]) -> list[dict[str, Any]]:
    """All ranks' reports, on rank 0 (elsewhere none).

    Args:
        hosts: names of the ranks' hosts, as far as known: to name who is missing.
    Raises:
        ConfigError: some rank did not report in time.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store.set(f"report/{rank}", json.dumps(mine))
    if rank:
        store.wait(["done"], timedelta(seconds=2 * WAIT))
        return []
    deadline = time.monotonic() + WAIT
    waiting = set(range(size))
    while waiting and time.monotonic() < deadline:
        waiting = {r for r in waiting if not store.check([f"report/{r}"])}
        time.sleep(0.1)
    found = [json.loads(store.get(f"report/{r}")) for r in range(size) if r not in waiting]
    store.set("done", "1")
    if waiting:
        names = [f"rank {r} on {hosts[r] if r < len(hosts) else '?'}" for r in sorted(waiting)]
        there = sorted({report["host"] for report in found})
        raise cfg.ConfigError(
            f"no report within {WAIT:.0f} s from {', '.join(names)}; there are "
            f"{', '.join(there)}; check that the others are up and reach "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        )
    time.sleep(0.5)  # the others read "done" before the store goes
    return found


def differing(reports: list[dict[str, Any]]) -> list[str]:
    """One line for each fact in which a host is not like rank 0's, and for each fault."""
    lines = []
    for report in reports:
        host = report["host"]
        lines += [f"{host}: {fault}" for fault in report["faults"]]
        for name, value in report["facts"].items():
            if value != (expected := reports[0]["facts"][name]):
                lines.append(f"{host}: {name} is {value}, rank 0 on {reports[0]['host']} has "
                             f"{expected}; make them the same")  # fmt: skip
    return list(dict.fromkeys(lines))


def collective(here: World) -> list[str]:
    """Clocks, and one sum over all ranks; a table on rank 0. Returns what is wrong."""
    here.barrier()
    now = time.time()
    data = torch.ones(_MB * 250_000, device=here.device)
    here.reduce(data)  # the first one connects
    here.barrier()
    began = time.perf_counter()
    here.reduce(data)
    if here.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    found = here.gather((socket.gethostname(), now, seconds))
    if here.rank:
        return []
    clock = found[0][1]
    table = Table(title=f"all-reduce of {_MB} MB over {here.size} ranks")
    for name in ("rank", "host", "clock, s", "GB/s"):
        table.add_column(name, justify="right")
    for rank, (host, at, took) in enumerate(found):
        table.add_row(str(rank), host, f"{at - clock:+.3f}", f"{_MB / 1e3 / took:.2f}")
    console.print(table)
    wrong = float(data[0]) != here.size**2
    return ([f"the sum over ranks is {float(data[0])}, not {here.size**2}"] if wrong else []) + [
        f"{host}: its clock is {at - clock:+.1f} s from rank 0's; run an NTP client"
        for host, at, _ in found
        if abs(at - clock) > _CLOCK_SECONDS
    ]


def run(config: cfg.Config, hosts: list[str]) -> None:
    environment()
    os.environ.setdefault("DEEPSPEED_TIMEOUT", "1")  # minutes; a collective that hangs ends
    mine = look(config)
    try:
        store = open_store(WAIT)  # kept, so that the world's is served by the same server
    except Stopped as unreached:
        raise cfg.ConfigError(str(unreached)) from None
    faults = differing(reported(store, mine, hosts))
    with world(WAIT) as here:
        faults = here.broadcast(faults) or collective(here)
        if here.rank == 0 and faults:
            raise cfg.ConfigError("\n".join(faults))
        if here.rank == 0:
            console.print(f"preflight: {here.size} ranks are ready")


def ranks_of(hostfile: Path | None) -> list[str]:
    """The host of each rank, from DeepSpeed's `NAME slots=N` lines."""
    if hostfile is None:
        return []
    rows = [line.split() for line in hostfile.read_text().splitlines()]
    return [
        row[0]
        for row in rows
        if row and not row[0].startswith("#")
        for _ in range(int(row[1].removeprefix("slots=")))
    ]


def _read_ends(config: cfg.Config) -> None:
    """Open all indexes, and read audio from the first and the last shard."""
    shards = ShardSet.open(list(config.data.shards), open_cache(config.data))
    for i in (0, len(shards) - 1):
        shards.read(i, "flac" if shards.num_samples[i] else "json")


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--hostfile", type=Path, help="to name the host of a rank that is missing")
    args = parser.parse_args(argv)
    run(cfg.load(args.config, args.set), ranks_of(args.hostfile))


if __name__ == "__main__":
    leave(guarded(main))
