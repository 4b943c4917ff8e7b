"""Where the ranks of one start meet.

A start may fail on one host alone: its disk is full, its driver is gone. The ranks of the others
would wait for it as long as a collective may take, and whoever starts the run again would wait for
them. So they meet first, for a time that is bounded, and say who has not come.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from train.stopping import Stopped


def open_store(limit: float) -> Store:
    """The key-value store at MASTER_ADDR:MASTER_PORT, which is rank 0's, or torchrun's agent's.

    Raises:
        Stopped: it was not there within `limit` seconds.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    elastic = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            address, port, size, is_master=rank == 0 and not elastic, multi_tenant=True,
            timeout=timedelta(seconds=limit), wait_for_workers=False,
        )  # fmt: skip
    except DistError as error:
        raise Stopped(
            f"{socket.gethostname()}: rank {rank} did not reach rank 0 at {address}:{port} within "
            f"{limit:.0f} s ({str(error).splitlines()[0]}); its host's lines say why it did not "
            "start, or name, route and firewall are in the way"
        ) from None
    # The agent's outlives the ranks, and would show the next ones who came before them.
    return PrefixStore(f"start/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def meet(limit: float) -> Store:
    """The store, once every rank has come to it.

    Raises:
        Stopped: some did not come within `limit` seconds; the message names them.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = open_store(limit)
    came = [f"came/{r}" for r in range(size)]
    try:
        store.set(came[rank], socket.gethostname())
        store.wait(came, timedelta(seconds=limit))
    except DistError:
        raise Stopped(_absent(store, came, limit)) from None
    return store


def _absent(store: Store, came: list[str], limit: float) -> str:
    try:
        there = {r: store.get(key).decode() for r, key in enumerate(came) if store.check([key])}
    except DistError:  # rank 0 has said it, and left
        return "rank 0 has left before all ranks had come"
    missing = ", ".join(str(r) for r in range(len(came)) if r not in there)
    hosts = ", ".join(sorted(set(there.values())))
    return (
        f"rank {missing} did not come within {limit:.0f} s (train.hang_seconds); there are ranks "
        f"on {hosts}; the lines of the missing one's host say why"
    )
