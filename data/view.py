"""`python -m data.view SHARDS`: samples, to look at.

    python -m data.view shards/train*.tar --targets targets/*.tar --words words
    python -m data.view shards/train*.tar --config configs/mtbi.yaml --epoch 1

As they are stored; or, with a config, as its LLM will see them, in the order of an epoch: prompt,
speech as its slots with the words that they hold, words that are read instead, and the answer
with its labels. Slots stand in <>, words to read in {}, labels in [], each in a colour of its own
on a terminal.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice

from rich.console import Console
from rich.text import Text as Line

from data.audio import SAMPLE_RATE
from data.collate import Sample
from data.prompts import Prompt, Speech
from data.shards import Overlay, ShardSet
from data.targets import parse_targets
from data.words import parse_words

SLOTS, READ, LABELS, NAME = "cyan", "yellow", "bold green", "bold"


def show(sample: Sample, prompt: Prompt) -> Line:
    """A sample as the LLM sees it: a line that counts its positions, and its document."""
    prefix, *parts, suffix, answer = sample.document
    counts = {"prompt": 0, "slots": 0, "words to read": 0, "labels": 0}
    line = Line()
    for number, part in enumerate((prefix, *parts, suffix, answer)):
        if isinstance(part, Speech):
            counts["slots"] += part.count
            line.append(f" <{_slots(part, sample, prompt)}>", SLOTS)
            continue
        text = prompt.decode(part.ids).strip()
        if part.labelled:
            counts["labels"] += len(part.ids)
            line.append(f" [{text}]", LABELS)
        elif 0 < number <= len(parts):
            counts["words to read"] += len(part.ids)
            line.append(f" {{{text}}}", READ)
        else:
            counts["prompt"] += len(part.ids)
            line.append(f" {text}")
    known = [f"{count} {name}" for name, count in counts.items() if count]
    head = Line().append(sample.key, NAME)
    return head.append(f": {sum(counts.values())} positions ({', '.join(known)})\n").append(line)


def _slots(part: Speech, sample: Sample, prompt: Prompt) -> str:
    """A run of slots and the words that begin in it."""
    stop = part.start + part.count
    inside = [w.ids for w in sample.words if part.start <= w.start < stop]
    words = prompt.decode([token for ids in inside for token in ids]).strip()
    run = f"slots {part.start}-{stop - 1}" if part.count else "no slots"
    return f"{run}: {words}" if words else run


def stored(shards: ShardSet, targets: Overlay | None, words: Overlay | None, i: int) -> Line:
    """A sample as it lies in the shards."""
    seconds = int(shards.num_samples[i]) / SAMPLE_RATE
    line = Line().append(shards.key(i), NAME)
    line.append(f": {seconds:.2f} s, {shards.languages[i].as_py()}\n")
    record = words.record(i) if words else {}
    if record.get("words"):
        for word in parse_words(record):
            line.append(f" {word.text}").append(f"<{word.start / SAMPLE_RATE:.2f}>", SLOTS)
    else:
        line.append(f" {shards.texts[i].as_py()}")
        line.append(f" (not aligned: {record['unaligned']})" if record else "", SLOTS)
    for target in parse_targets(targets.record(i)) if targets else []:
        line.append(f"\n  {target.instruction}", READ).append(f" [{target.text}]", LABELS)
        line.append(" (ended)" if target.finished else " (cut)")
        line.append(f" (not trained: {target.filtered})" if target.filtered else "")
    return line


def main(arguments: list[str] | None = None) -> int:
    """Print samples; returns the exit status."""
    options = parser().parse_args(arguments)
    if options.config:
        # What a model makes of a sample is for `train` to say, which nothing here may import:
        # its own command takes the same arguments.
        given = sys.argv[1:] if arguments is None else arguments
        return subprocess.run([sys.executable, "-m", "train.view", *given]).returncode
    try:
        if not options.shards:
            raise ValueError("SHARDS are needed where there is no --config")
        shards = ShardSet.open(options.shards)
        targets = Overlay.open(options.targets, shards) if options.targets else None
        words = Overlay.open(options.words, shards, "words.json") if options.words else None
        console = Console(highlight=False, soft_wrap=True)
        for i in islice(chosen(shards, options.key, range(len(shards))), options.count):
            console.print(stored(shards, targets, words, i))
    except (ValueError, OSError) as error:
        print(f"data.view: {error}", file=sys.stderr)
        return 1
    return 0


def chosen(shards: ShardSet, keys: list[str], order: range | list[int]) -> Iterator[int]:
    """The samples of `keys`, or those of `order`; raises `ValueError` on an unknown key."""
    if not keys:
        yield from order
        return
    known = {key: i for i, key in enumerate(shards.keys.to_pylist())}
    for key in keys:
        if key not in known:
            raise ValueError(f"key {key!r} is in none of the shards")
        yield known[key]


def parser() -> argparse.ArgumentParser:
    """The arguments, of both commands."""
    made = argparse.ArgumentParser(
        prog="python -m data.view",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("shards", nargs="*", help="tar shards (default: those of --config)")
    made.add_argument("--config", help="YAML file under configs/: show what its LLM will see")
    made.add_argument("--targets", nargs="+", help="target shards (default: those of --config)")
    made.add_argument("--words", nargs="+", help="word shards (default: those of --config)")
    made.add_argument("--epoch", type=int, default=0, help="of --config's training")
    made.add_argument("--count", type=int, default=5, help="samples to show")
    made.add_argument("--key", action="append", default=[], help="show this one; may be repeated")
    made.add_argument(
        "--set", action="append", default=[], metavar="a.b=value", help="override --config"
    )
    return made


if __name__ == "__main__":
    sys.exit(main())
