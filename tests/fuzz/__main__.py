"""Strangers' files, bent in every way: each reader takes them, or refuses them in a line.

    python -m tests.fuzz shard --inputs 100000
    python -m tests.fuzz all --inputs 2000 --seed 7

Nothing else may happen: no other exception, no hang, no gigabytes, no file outside the folder it
was given, no pickle, no process, no connection. An input that breaks this is printed; keep it
under tests/corpus/READER, where it is tried first from then on.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
from concurrent.futures import ProcessPoolExecutor, as_completed

from tests.fuzz.harness import report
from tests.fuzz.readers import READERS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reader", choices=[*READERS, "all"])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="readers at once (cores)"
    )
    args = parser.parse_args()
    names = list(READERS) if args.reader == "all" else [args.reader]
    # A process each: what one reader leaves behind is not held against the next.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, spawn, max_tasks_per_child=1) as pool:
        running = [pool.submit(report, name, args.inputs, args.seed) for name in names]
        for ended in as_completed(running):
            ended.result()


if __name__ == "__main__":
    main()
