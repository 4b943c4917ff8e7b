"""Put the papers' claims to the micro world: `python -m examples.micro.claims`.

Needs the world and its shards (`make claims` makes them). Finished jobs are kept: stopped
anywhere, the same command goes on. Writes docs/claims.md, docs/claims.json and plots.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from examples.micro.claims import report
from examples.micro.claims.pieces import jobs
from examples.micro.claims.runner import JobFailed, Runner
from examples.micro.claims.systems import RUNS, SYSTEMS, Seeds


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.micro.claims",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="N",
        help=f"of every system (default: {' '.join(map(str, Seeds().every))}, and more "
             f"of {', '.join(Seeds().more)})",
    )  # fmt: skip
    parser.add_argument("--systems", nargs="+", help="only these, and no report")
    parser.add_argument("--ranks", type=int, default=1, help="of each run (default: 1)")
    parser.add_argument("--slots", type=int, default=2, help="runs side by side (default: 2)")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    systems = [system for system in SYSTEMS if not args.systems or system.name in args.systems]
    if unknown := set(args.systems or ()) - {system.name for system in SYSTEMS}:
        parser.error(f"no system {', '.join(sorted(unknown))}: there are "
                     f"{', '.join(system.name for system in SYSTEMS)}")  # fmt: skip
    runner = Runner(Path(RUNS) / ".jobs", args.slots)
    seeds = Seeds(tuple(args.seeds), {}) if args.seeds else Seeds()
    todo = jobs(systems, seeds, args.ranks)
    try:
        took = runner.run(todo)
    except JobFailed as error:
        print(error, file=sys.stderr)
        return 1
    if not args.systems:
        report.write(args.docs, seeds, sum(took.values()) / 60)
    return 0


if __name__ == "__main__":
    sys.exit(main())
