"""`python -m data.align SHARDS OUT --model PATH`: when each word is spoken, as word shards.

    python -m data.align shards/train words/train --model facebook/wav2vec2-base-960h
    python -m data.align shards/train words/train --model facebook/mms-1b-all \\
        --languages en=eng de=deu

CTC forced alignment of the transcripts, on any Hugging Face model with a CTC head (see
`data.ctc`); the encoder itself, where it has one. OUT/words-NAME.tar and its index for each shard
NAME.tar, an overlay with a record for every utterance (see `data.words`). What cannot be aligned
is in it with the reason, listed in OUT/unaligned.jsonl and counted. Run again, it does what is
missing or out of date; the same input gives the same bytes.
"""

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from data.archive import ContentError, ShardError, index_path, read_meta
from data.audio import SAMPLE_RATE, AudioError, decode
from data.convert import write_text
from data.ctc import Aligner, AlignError, Unaligned
from data.pool import advance, run_jobs
from data.remote import shown
from data.retry import retried
from data.shards import Overlay, ShardSet, write_overlay
from data.words import words_record

_METHOD = "ctc-1"  # changes when the same model would give other times
_MAX_SECONDS = 600.0  # longer recordings are not aligned, whatever their index says

_aligner: Aligner | None = None  # in a worker: what aligns


@dataclass(frozen=True)
class Job:
    """A shard to align, and the word shard that it becomes."""

    address: str
    path: Path
    facts: Mapping[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Align; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(stderr=True)
    set_verbosity_error()
    disable_progress_bar()
    torch.set_num_threads(1)  # there is one process per core, and sums keep their order
    try:
        _align(options, console)
    except BrokenProcessPool:
        _complain(
            console,
            "a worker process was killed (out of memory?); run the same command again, with fewer "
            "--workers; finished shards are kept",
        )
    except (AlignError, ShardError, OSError) as error:
        _complain(console, " ".join(str(error).split()))
    else:
        return 0
    return 1


def _align(options: argparse.Namespace, console: Console) -> None:
    global _aligner
    shards = ShardSet.open(options.shards)
    languages = dict(options.languages)
    aligner = Aligner(options.model, options.device, languages)
    aligner.check_languages(shards.languages.unique().to_pylist())
    facts: dict[str, Any] = {
        "model": options.model,
        "weights": aligner.weights,
        "languages": languages,
        "method": _METHOD,
    }
    facts["hash"] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    jobs = plan_jobs(shards, options.out, facts)
    waiting = [job for job in jobs if not is_done(job)]
    sizes = dict(zip(shards.addresses, shards.shard_starts[1:] - shards.shard_starts[:-1]))  # noqa: B905
    total = int(sum(sizes[job.address] for job in waiting))
    _aligner = aligner  # forked workers share its memory
    try:
        run_jobs(
            waiting,
            _work,
            total=total,
            console=console,
            workers=options.workers,
            here=options.workers == 1 or len(waiting) < 2,
            spawn=options.device != "cpu",  # there, each worker loads the model anew
            start=_start_worker,
            given=(options.model, options.device, languages),
        )
    finally:
        _aligner = None
    _report(shards, jobs, len(jobs) - len(waiting), options.out, console)


def plan_jobs(shards: ShardSet, out: Path, facts: Mapping[str, Any]) -> list[Job]:
    """A job per shard; raises `ShardError` where two shards would become the same file."""
    jobs: dict[str, Job] = {}
    for address in shards.addresses:
        name = Path(shown(address)).stem
        if name in jobs:
            raise ShardError(
                f"{shown(jobs[name].address)} and {shown(address)} have the same name; align them "
                "into folders of their own"
            )
        jobs[name] = Job(address, out / f"words-{name}.tar", facts)
    return list(jobs.values())


def is_done(job: Job) -> bool:
    """Whether this word shard is there (its index appears last, so it is whole) and up to date.

    Raises `ShardError` where it was made in another way.
    """
    index = index_path(job.path)
    if not index.exists() or not job.path.exists():
        return False
    found = read_meta(index)
    changed = [name for name in job.facts if name != "hash" and found.get(name) != job.facts[name]]
    if changed:
        raise ShardError(
            f"{job.path}: was made with another {', '.join(changed)}; remove it, or choose another "
            "OUT"
        )
    return bool(found["base_digest"] == ShardSet([job.address]).digest)


def align_shard(job: Job, aligner: Aligner) -> None:
    """Write the word shard of one job."""
    base = ShardSet([job.address])
    texts, languages = base.texts.to_pylist(), base.languages.to_pylist()
    records: dict[int, dict[str, Any]] = {}
    # By language, so that a model with an adapter for each seldom changes it.
    for i in sorted(range(len(base)), key=lambda i: (languages[i], i)):
        try:
            data = retried(lambda i=i: base.read(i, "flac"), lambda i=i: base.shard_name(i))  # type: ignore[misc]
            planned = int(base.num_samples[i]) / SAMPLE_RATE + 1
            wave = decode(data, max_seconds=min(planned, _MAX_SECONDS))
            records[i] = words_record(aligner(wave, texts[i], languages[i]))
        except (Unaligned, ContentError, AudioError) as fault:
            records[i] = {"words": [], "unaligned": str(fault)}
        advance(1)

    def items() -> Iterator[tuple[str, dict[str, Any]]]:
        for i, key in enumerate(base.keys.to_pylist()):
            yield key, records[i]

    write_overlay(job.path, items(), "words.json", job.facts, base=base)


def _start_worker(model: str, device: str, languages: dict[str, str]) -> None:
    global _aligner
    if _aligner is None:
        _aligner = Aligner(model, device, languages)


def _work(job: Job) -> None:
    assert _aligner is not None
    align_shard(job, _aligner)


def _report(shards: ShardSet, jobs: list[Job], reused: int, out: Path, console: Console) -> None:
    """List what is not aligned and print counts, from the indexes of all the word shards."""
    overlay = Overlay.open([job.path for job in jobs], shards, "words.json")
    reasons = overlay.column("unaligned").to_pylist()
    unspelled = overlay.column("unspelled").to_pylist()
    lines = [
        {"key": shards.key(i), "reason": reason, "unspelled": words}
        for i, (reason, words) in enumerate(zip(reasons, unspelled, strict=True))
        if reason or words
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(out / "unaligned.jsonl", text)
    words = overlay.column("word_starts").combine_chunks()
    table = Table("", "", title="Word times", show_header=False)
    table.add_row("shards", f"{len(jobs)} ({reused} were there)")
    table.add_row("utterances aligned", f"{reasons.count('')} of {len(shards)}")
    table.add_row("words", str(len(words.flatten())))
    table.add_row("placed, but not spelled", _count(sum(map(len, unspelled)), unspelled))
    console.print(table)
    faults = Counter(reason.partition(":")[0] for reason in reasons if reason)
    if faults:
        listed = Table("not aligned because", "count", "for example", title="Not aligned")
        for kind, count in faults.most_common():
            i = next(i for i, reason in enumerate(reasons) if reason.startswith(kind))
            listed.add_row(Text(kind), str(count), Text(f"{shards.key(i)}: {reasons[i]}"))
        console.print(listed)


def _count(count: int, unspelled: list[list[str]]) -> Text:
    example = next((words[0] for words in unspelled if words), None)
    return Text(f"{count}, such as {example!r}" if example else "0")


def _complain(console: Console, message: str) -> None:
    console.print(Text(f"data.align: {message}", style="red"), soft_wrap=True)


def _pair(text: str) -> tuple[str, str]:
    ours, sign, theirs = text.partition("=")
    if not (ours and sign and theirs):
        raise argparse.ArgumentTypeError(f"must be CORPUS=MODEL such as en=eng, but is {text!r}")
    return ours, theirs


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but is {text}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.align",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("shards", nargs="+", help="tar shards: paths, folders, globs, {a..b}")
    parser.add_argument("out", type=Path, help="the folder to write word shards to")
    parser.add_argument("--model", required=True, help="hub name or folder of a CTC model")
    parser.add_argument(
        "--languages",
        nargs="+",
        type=_pair,
        default=[],
        metavar="CORPUS=MODEL",
        help="the model's names of the corpus' languages, for MMS: en=eng de=deu",
    )
    parser.add_argument("--workers", type=_positive, default=1 if cuda else _cores())
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    return parser


def _cores() -> int:
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    sys.exit(main())
