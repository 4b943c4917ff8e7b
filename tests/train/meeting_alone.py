"""One rank of a start: `meeting_alone.py SECONDS`, with its place in the environment."""

from __future__ import annotations

import os
import sys

from train.cli import guarded, leave
from train.meeting import meet


def main() -> None:
    store = meet(float(sys.argv[1]))
    print("all are there", flush=True)
    # Rank 0 serves the store, so it leaves last; in a run the process group sees to that.
    store.set(f"leaves/{os.environ['RANK']}", "")
    if os.environ["RANK"] == "0":
        store.wait([f"leaves/{rank}" for rank in range(int(os.environ["WORLD_SIZE"]))])


if __name__ == "__main__":
    leave(guarded(main))
