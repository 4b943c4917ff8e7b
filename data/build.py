"""`python -m data.build KIND SRC OUT`: a corpus on disk to shards.

    python -m data.build librispeech LibriSpeech/ shards/ --language en
    python -m data.build manifest train.jsonl shards/ --workers 8

OUT/SPLIT-000000.tar and so on, each with its index beside it, one set per split of the corpus,
and OUT/SPLIT.skipped.jsonl with what was left out and why. Utterances lie in an order drawn from
their keys. Run again, it does what is missing or out of date; the same input gives the same bytes.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.archive import ShardError, index_path
from data.convert import Job, Outcome, convert, write_text
from data.corpora import READERS, CorpusError, Fault, Utterance
from data.pool import run_jobs

_LONGEST = 200
"""Bytes of a split's name: a file's may have 255, and shards add to it."""


@dataclass
class Split:
    """One split's utterances, and the entries that never became one."""

    utterances: dict[str, Utterance] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)


def main(arguments: list[str] | None = None) -> int:
    """Build; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(stderr=True)
    try:
        splits = scan(READERS[options.kind](options.src), options)
        jobs = {name: plan_jobs(name, split, options) for name, split in splits.items()}
        outcomes = _run(jobs, options.workers, console)
        return _report(splits, jobs, outcomes, options, console)
    except (CorpusError, ShardError, OSError) as error:
        _complain(console, str(error))
    except BrokenProcessPool:
        _complain(
            console,
            "a worker process was killed (out of memory?); run the same command again, finished "
            "shards are kept",
        )
    return 1


def scan(found: Iterable[Utterance | Fault], options: argparse.Namespace) -> dict[str, Split]:
    """Sort a corpus into its splits; a key that comes again in a split is skipped there."""
    default = options.split or (options.src.stem if options.src.is_file() else options.src.name)
    splits: dict[str, Split] = {}
    for item in found:
        name = item.split or default
        if options.split and name != options.split:
            continue
        split = splits.setdefault(name, Split())
        if isinstance(item, Fault):
            split.skipped.append({"key": item.where, "audio": "", "reason": item.reason})
        elif item.key in split.utterances:
            first = split.utterances[item.key].audio or "another row"
            reason = f"duplicate key: {first} has it already"
            skip = {"key": item.key, "audio": str(item.audio or ""), "reason": reason}
            split.skipped.append(skip)
        else:
            language = item.language or options.language
            split.utterances[item.key] = replace(item, split=name, language=language)
    if not splits:
        wanted = f" of split {options.split!r}" if options.split else ""
        raise CorpusError(f"{options.src}: no utterance{wanted} found")
    for name in splits:
        if not re.fullmatch(r"[\w-]+", name) or len(name.encode()) > _LONGEST:
            shown = name if len(name) < 80 else f"{name[:80]}..."
            raise CorpusError(
                f"{options.src}: split {shown!r} cannot name a file, use letters, digits, - and _, "
                f"{_LONGEST} bytes at most"
            )
    return splits


def plan_jobs(name: str, split: Split, options: argparse.Namespace) -> list[Job]:
    """The shards of a split, its utterances in the order of their keys' hashes."""
    ordered = sorted(
        split.utterances.values(),
        key=lambda u: hashlib.sha256(u.key.encode("utf-8", "surrogatepass")).digest(),
    )
    size = options.samples_per_shard
    return [
        Job(
            options.out / f"{name}-{first // size:06d}.tar",
            tuple(ordered[first : first + size]),
            options.max_seconds,
        )
        for first in range(0, len(ordered), size)
    ]


def _run(jobs: dict[str, list[Job]], workers: int, console: Console) -> dict[Path, Outcome]:
    """All jobs, each in one of `workers` processes; by the shard's path."""
    every = [job for split in jobs.values() for job in split]
    total = sum(len(job.utterances) for job in every)
    done = run_jobs(every, convert, total=total, console=console, workers=workers)
    return {outcome.path: outcome for outcome in done}


def _report(
    splits: dict[str, Split],
    jobs: dict[str, list[Job]],
    outcomes: dict[Path, Outcome],
    options: argparse.Namespace,
    console: Console,
) -> int:
    """Remove shards of an earlier, larger build, list the skips, print tables; the exit status."""
    table = Table("split", "shards", "reused", "utterances", "hours", "skipped", title="Shards")
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    status = 0
    for name, split in splits.items():
        made = [outcomes[job.path] for job in jobs[name]]
        _remove_outdated(name, len(made), options.out)
        skipped = split.skipped + [skip for outcome in made for skip in outcome.skipped]
        skipped.sort(key=lambda skip: (skip["key"], skip["audio"]))
        lines = [json.dumps(skip, ensure_ascii=False) + "\n" for skip in skipped]
        write_text(options.out / f"{name}.skipped.jsonl", "".join(lines))
        for skip in skipped:
            kind = skip["reason"].partition(":")[0]
            reasons[kind] += 1
            examples.setdefault(kind, f"{skip['key']}: {skip['reason']}")
        samples = sum(outcome.samples for outcome in made)
        hours = sum(outcome.seconds for outcome in made) / 3600
        reused = sum(outcome.reused for outcome in made)
        row = (len(made), reused, samples, f"{hours:.2f}", len(skipped))
        table.add_row(name, *map(str, row))
        share = len(skipped) / (samples + len(skipped))
        if share > options.max_skipped:
            _complain(
                console,
                f"{name}: {share:.1%} of the utterances are skipped, over the limit of "
                f"{options.max_skipped:.1%}; see {options.out / name}.skipped.jsonl, mend them or "
                "raise --max-skipped",
            )
            status = 1
    console.print(table)
    if reasons:
        listed = Table("skipped because", "count", "for example", title="Skipped")
        for kind, count in reasons.most_common():
            listed.add_row(Text(kind), str(count), Text(examples[kind]))
        console.print(listed)
    return status


def _complain(console: Console, message: str) -> None:
    console.print(Text(f"data.build: {message}", style="red"), soft_wrap=True)


def _remove_outdated(name: str, shards: int, out: Path) -> None:
    """Remove this split's shards beyond the last one, where an earlier build of ours left them."""
    for tar in sorted(out.glob(f"{name}-*.tar")):
        number = re.fullmatch(re.escape(name) + r"-(\d{6,})", tar.stem)
        if number and int(number[1]) >= shards:
            record = out / ".build" / f"{tar.stem}.json"
            if not record.exists():
                raise ShardError(f"{tar}: not from this build, but its name is; move it away")
            for path in (record, index_path(tar), tar):
                path.unlink(missing_ok=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=sorted(READERS), help="how the corpus lies on disk")
    parser.add_argument("src", type=Path, help="the corpus: a folder, or a manifest file")
    parser.add_argument("out", type=Path, help="the folder to write shards to")
    parser.add_argument("--language", help="of utterances whose corpus does not say")
    parser.add_argument("--split", help="build only this split (default: all, each apart)")
    parser.add_argument("--samples-per-shard", type=_positive(int), default=1000)
    parser.add_argument("--workers", type=_positive(int), default=len(os.sched_getaffinity(0)))
    parser.add_argument("--max-seconds", type=_positive(float), default=30.0)
    parser.add_argument(
        "--max-skipped", type=float, default=0.05, help="share of skipped utterances to allow"
    )
    return parser


def _positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"must be above 0, but is {text}")
        return value

    return parse


if __name__ == "__main__":
    sys.exit(main())
