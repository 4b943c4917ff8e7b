"""Data that only the claims need: `python -m examples.micro.claims.prepare subsets | ended`.

subsets  the few utterances, the held-out ones, and what is asked about these
ended    the answers that were cut, with an end of sequence on each (BLSP's flaw)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from data.archive import Row, read_meta, write_shard
from data.shards import Overlay, ShardSet, write_overlay
from data.sources import index_address
from examples.micro.claims.systems import (
    ENGLISH,
    FEW,
    FEW_PER_LANGUAGE,
    FULL,
    HELD_OUT,
    HELD_OUT_PER_LANGUAGE,
    MADE,
    WORLD,
)

_COLUMNS = {"num_samples": pa.int64()} | dict.fromkeys(("text", "language", "speaker"), pa.string())
TASKS = Path(MADE) / "tasks.jsonl"


def targets_of(name: str) -> str:
    """The folder of a set of targets."""
    return f"{MADE}/targets/{name}"


def subset(source: str, path: Path, per_language: int) -> list[str]:
    """Copy the first utterances of each language into one shard; returns their keys.

    The members' bytes are the same, so targets of the whole fit the part, too.
    """
    shards = ShardSet.open(source)
    columns = {name: shards.column(name).to_pylist() for name in _COLUMNS}
    taken: dict[str, list[int]] = {}
    for i, language in enumerate(columns["language"]):
        if len(taken.setdefault(language, [])) < per_language:
            taken[language].append(i)
    chosen = sorted(i for found in taken.values() for i in found)

    def rows() -> Iterator[Row]:
        for i in chosen:
            members = {name: shards.read(i, name) for name in ("flac", "json")}
            yield Row(shards.key(i), members, {name: columns[name][i] for name in _COLUMNS})

    write_shard(path, rows(), _COLUMNS, {"subset_of": shards.digest})
    return [shards.key(i) for i in chosen]


def subsets() -> None:
    spoken = set(ShardSet.open(ENGLISH).languages.to_pylist())
    if spoken != {"en"}:
        raise SystemExit(f"{ENGLISH}: expected English alone, found {', '.join(sorted(spoken))}")
    subset(FULL, Path(FEW.replace("*", "000000")), FEW_PER_LANGUAGE)
    path = Path(HELD_OUT.replace("*", "000000"))
    keys = set(subset(f"{WORLD}/shards/test*.tar", path, HELD_OUT_PER_LANGUAGE))
    with Path(f"{WORLD}/tasks.jsonl").open(encoding="utf-8") as lines, TASKS.open("w") as out:
        for line in lines:
            row = json.loads(line)
            if row["key"] in keys:
                # What is said is judged; which option is likelier is another question.
                row["metric"] = ["exact"] if row.pop("options", None) else row["metric"]
                out.write(json.dumps(row, ensure_ascii=False) + "\n")


def ended() -> None:
    shards = ShardSet.open(FULL)
    source = f"{targets_of('cut')}/targets-*.tar"
    cut = Overlay.open(source, shards)

    def records() -> Iterator[tuple[str, dict]]:
        for i in range(len(shards)):
            targets = [target | {"finished": True} for target in cut.record(i)["targets"]]
            yield shards.key(i), {"targets": targets}

    facts = read_meta(index_address(ShardSet.open(source).addresses[0]))
    facts = {name: facts[name] for name in ("teacher", "prompt", "tasks", "max_new_tokens")}
    path = Path(targets_of("cut_ended")) / "targets-000000.tar"
    write_overlay(path, records(), meta=facts | {"ended": "all"}, base=shards)


if __name__ == "__main__":
    {"subsets": subsets, "ended": ended}[sys.argv[1]]()
