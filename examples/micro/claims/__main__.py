"""Put the papers' claims to the micro world: `python -m examples.micro.claims`.

Needs the world and its shards (`make claims` makes them). Finished jobs are kept: stopped
anywhere, the same command goes on. Writes docs/claims.md, docs/claims.json and plots.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from examples.micro.claims import report
from examples.micro.claims.pieces import jobs
from examples.micro.claims.runner import JobFailed, Runner
from examples.micro.claims.systems import CLOSE, RUNS, SYSTEMS, Seeds


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.micro.claims",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="N",
        help=f"of every system (default: {' '.join(map(str, Seeds().every))}, and more of "
             f"{' and '.join(CLOSE)})",
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
    began = time.monotonic()
    runner = Runner(Path(RUNS) / ".jobs", args.slots)
    seeds = Seeds(tuple(args.seeds), ()) if args.seeds else Seeds()
    todo = jobs(systems, seeds, args.ranks)
    pending = len(runner.pending(todo))
    try:
        runner.run(todo)
    except JobFailed as error:
        print(error, file=sys.stderr)
        return 1
    if not args.systems:
        took = Path(RUNS) / "minutes.json"  # of all of it in one piece
        if 0 < pending < len(todo):
            took.unlink(missing_ok=True)
        elif pending:
            took.write_text(json.dumps((time.monotonic() - began) / 60))
        minutes = json.loads(took.read_text()) if took.exists() else None
        report.write(args.docs, seeds, minutes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
