"""`python -m data.walk SHARDS`: which keys each rank gets at each step, without a model.

    python -m data.walk shards/train*.tar --world 8 --steps 100 --state walk.jsonl
    python -m data.walk --state walk.jsonl --ledger

Prints one JSON line per step and rank, {"epoch", "step", "rank", "keys"}. With --state the walk
continues where it was, on however many ranks; --ledger prints what is committed, one line
{"epoch", "step", "keys"} per step. The order is the one of training under the same seed and
budgets, bins being filled by audio seconds alone where there are no targets to count.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from data.ledger import Ledger, LedgerError, committed
from data.plan import Plan, bins_of
from data.shards import ShardSet


def main(arguments: list[str] | None = None) -> int:
    """Walk; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.ledger and not options.state:
        parser.error("--ledger needs --state FILE")
    if not options.ledger and not options.shards:
        parser.error("SHARDS are needed")
    if options.world < 1:
        parser.error(f"--world must be at least 1, but is {options.world}")
    try:
        if options.ledger:
            for line in committed(options.state):
                _print(line)
        else:
            _walk(options)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader, `head` for one, has seen enough
            sys.stderr.close()
            return 0
        print(f"data.walk: {error}", file=sys.stderr)
        return 1
    return 0


def _walk(options: argparse.Namespace) -> None:
    shards = ShardSet.open(options.shards)
    budgets = {
        "seed": options.seed,
        "seconds_per_bin": options.seconds_per_bin,
        "bins_per_step": options.bins_per_step,
        "window_shards": options.window_shards,
    }
    plan = Plan(
        shards.shard_of,
        np.zeros(len(shards), np.int64),
        shards.num_samples,
        tokens_per_bin=1,
        refused=shards.lost,
        **budgets,
    )
    ledger = None
    epoch, step = options.epoch or 0, 0
    if options.state:
        ledger = Ledger(options.state, {"shards": shards.digest, **budgets}, epoch)
        epoch, step = _position(ledger, plan, options)
    for i, reason in plan.skipped(epoch):
        print(f"data.walk: skipped {shards.key(i)}: {reason}", file=sys.stderr)
    last = plan.steps_in_epoch(epoch)
    if options.steps is not None:
        last = min(last, step + options.steps)
    for number in range(step, last):
        bins = plan.step(epoch, number)
        if ledger:
            ledger.commit([shards.key(i) for bin in bins for i in bin.tolist()])
        for rank in range(options.world):
            mine = bins_of(rank, options.world, bins)
            keys = [shards.key(i) for _, bin in mine for i in bin.tolist()]
            _print({"epoch": epoch, "step": number, "rank": rank, "keys": keys})


def _position(ledger: Ledger, plan: Plan, options: argparse.Namespace) -> tuple[int, int]:
    """Where to go on; with --epoch, in the next epoch once the ledger's is complete."""
    complete = ledger.step >= plan.steps_in_epoch(ledger.epoch)
    if options.epoch is not None and options.epoch != ledger.epoch:
        if not (complete and options.epoch == ledger.epoch + 1):
            raise LedgerError(
                f"{options.state}: is at epoch {ledger.epoch}, step {ledger.step} of "
                f"{plan.steps_in_epoch(ledger.epoch)}, so epoch {options.epoch} is not next"
            )
        ledger.epoch, ledger.step = options.epoch, 0
    elif complete:
        print(f"data.walk: epoch {ledger.epoch} is complete", file=sys.stderr)
    return ledger.epoch, ledger.step


def _print(line: dict[str, Any]) -> None:
    print(json.dumps(line, ensure_ascii=False), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.walk",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", nargs="*", help="tar shards: paths, folders, globs, {a..b}")
    parser.add_argument("--world", type=int, default=1, help="number of ranks")
    parser.add_argument("--steps", type=int, help="global steps to walk (default: to the end)")
    parser.add_argument("--epoch", type=int, help="default: 0, or where the state is")
    parser.add_argument("--state", type=Path, help="the ledger to begin or to continue")
    parser.add_argument("--ledger", action="store_true", help="print what --state has, and stop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds-per-bin", type=float, default=60.0)
    parser.add_argument("--bins-per-step", type=int, default=8)
    parser.add_argument("--window-shards", type=int, default=16)
    return parser


if __name__ == "__main__":
    sys.exit(main())
