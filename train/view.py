"""`python -m data.view ... --config CONFIG` (which see): samples as this config's LLM sees them."""

from __future__ import annotations

import json
import sys
from itertools import islice

from rich.console import Console

from data.view import chosen, parser, show
from train import config as cfg
from train.cli import guarded
from train.feed import open_feed


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    given = {"shards": args.shards, "targets": args.targets, "words": args.words}
    paths = [f"data.{name}={json.dumps(value)}" for name, value in given.items() if value]
    stream = open_feed(cfg.load(args.config, [*args.set, *paths])).stream
    console = Console(highlight=False, soft_wrap=True)
    order = [int(i) for step in stream.plan.iterate(args.epoch) for bin in step for i in bin]
    targets = stream.lengths.target_of(args.epoch)
    try:
        for i in islice(chosen(stream.shards, args.key, order), args.count):
            console.print(show(stream.read(i, int(targets[i]), args.epoch), stream.prompt))
    except ValueError as e:
        raise cfg.ConfigError(str(e)) from None


if __name__ == "__main__":
    sys.exit(guarded(main))
