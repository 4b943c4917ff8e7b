"""Evaluate a trained adapter on every task, from speech, with its bounds beside it.

    deepspeed train/evaluate.py configs/micro/blsp.yaml --checkpoint runs/micro/blsp

`text` gives the LLM the transcript (upper bound), `cascade` the encoder's own transcript,
`shuffled` another utterance's audio (floor), `none` no input at all.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from data.audio import decode
from data.shards import ShardSet
from train import checkpoint as ckpt
from train import config as cfg
from train.cli import arguments, guarded
from train.engine import World, world
from train.feed import open_cache
from train.metrics import score
from train.model.respond import Question, Responder
from train.model.transcribe import Transcriber
from train.progress import Bar, bar, console
from train.tracking import Tracker, run_tags


@dataclass(frozen=True)
class Item:
    """One question about one utterance."""

    key: str
    task: str
    language: str
    instruction: str
    wording: str
    answer: str
    metric: str


@dataclass(frozen=True)
class Result:
    item: Item
    input: str
    answer: str


def load_items(path: Path, known: set[str]) -> list[Item]:
    """Rows of the task file, each about a key of the evaluation shards.

    Raises:
        ConfigError: the file is missing, or a row is malformed or about an unknown key.
    """
    items = []
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise cfg.ConfigError(f"evaluate.tasks: {path} does not exist") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            item = Item(**{name: row[name] for name in Item.__dataclass_fields__})
        except (json.JSONDecodeError, KeyError, TypeError) as e:
            raise cfg.ConfigError(f"{path}:{number}: not a task row ({e}): {line[:100]}") from None
        if item.key not in known:
            raise cfg.ConfigError(f"{path}:{number}: {item.key!r} is in none of evaluate.shards")
        items.append(item)
    return items


class Evaluation:
    """The questions of some clips, asked with every kind of input."""

    def __init__(self, config: cfg.Config, evaluate: cfg.Evaluate, responder: Responder):
        self.evaluate, self.responder = evaluate, responder
        self.max_seconds = config.data.max_seconds
        self.transcriber = None
        if "cascade" in evaluate.inputs:
            self.transcriber = Transcriber(config.model.encoder.path, responder.device)

    def results(
        self, shards: ShardSet, clips: list[int], items: dict[str, list[Item]], shown: Bar
    ) -> Iterator[Result]:
        """Answers to all `items` about `clips` (indices into `shards`)."""
        waves = [decode(shards.read(i, "flac"), max_seconds=self.max_seconds) for i in clips]
        slots = self.responder.listen(waves)
        heard = self.transcriber(waves) if self.transcriber else []
        pending: list[tuple[Item, str, Question]] = []
        for at, i in enumerate(clips):
            inputs: dict[str, str | torch.Tensor] = {
                "speech": slots[at],
                # The neighbour's audio: as natural as the right one, and wrong.
                "shuffled": slots[at - 1],
                "text": shards.texts[i].as_py(),
                "cascade": heard[at] if heard else "",
                "none": "",
            }
            for item in items[shards.key(i)]:
                for kind in self.evaluate.inputs:
                    pending.append((item, kind, Question(item.instruction, inputs[kind])))
        # Answers of like length end together, so little of a batch is spent on waiting.
        pending.sort(key=lambda p: (len(p[0].answer), p[0].key, p[0].task, p[1]))
        for start in range(0, len(pending), self.evaluate.batch_size):
            batch = pending[start : start + self.evaluate.batch_size]
            answers = self.responder.answer(
                [q for _, _, q in batch], max_new_tokens=self.evaluate.max_new_tokens
            )
            for (item, source, _), answer in zip(batch, answers, strict=True):
                yield Result(item, source, answer)
            shown.advance(len(batch))


def summarise(results: list[Result]) -> list[dict[str, Any]]:
    """Rows {task, language, input, metric, value, count}; language `all` pools the languages."""
    groups: dict[tuple[str, str, str, str], list[Result]] = defaultdict(list)
    for r in results:
        for language in (r.item.language, "all"):
            groups[r.item.task, language, r.input, r.item.metric].append(r)
    return [
        {
            "task": task,
            "language": language,
            "input": source,
            "metric": metric,
            "value": score(metric, [r.answer for r in group], [r.item.answer for r in group]),
            "count": len(group),
        }
        for (task, language, source, metric), group in sorted(groups.items())
    ]


def print_table(rows: list[dict[str, Any]], kinds: tuple[str, ...]) -> None:
    table = Table(title="evaluation (all languages)")
    for name in ("task", "metric", "count", *kinds):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    cells: dict[tuple[str, str, int], dict[str, float]] = defaultdict(dict)
    for r in rows:
        if r["language"] == "all":
            cells[r["task"], r["metric"], r["count"]][r["input"]] = r["value"]
    for (task, metric, count), values in sorted(cells.items()):
        shown = [f"{values[kind]:.1f}" if kind in values else "" for kind in kinds]
        table.add_row(task, metric, str(count), *shown)
    console.print(table)


def track(
    config: cfg.Config,
    evaluate: cfg.Evaluate,
    state: ckpt.State,
    rows: list[dict[str, Any]],
    results: list[Result],
    shards: ShardSet,
) -> str:
    """An evaluation run in the tracker, with metrics, tables and clips; returns its id."""
    tracker = Tracker(
        config.run.tracking_uri,
        config.run.experiment,
        f"{config.run.name}-evaluation",
        params=config.flat() | {"checkpoint.step": str(state.step)},
        tags=run_tags("evaluate") | {"hearken.trained_by": state.tracker_run},
    )
    tracker.values(
        {
            f"eval/{r['input']}/{r['task']}_{r['metric']}": r["value"]
            for r in rows
            if r["language"] == "all"
        }
    )
    tracker.table("evaluation", {name: [r[name] for r in rows] for name in rows[0]})
    spoken = [r for r in results if r.input == "speech"]
    spoken.sort(key=lambda r: (r.item.key, r.item.task))
    heard = sorted({r.item.key for r in spoken})
    wanted = heard[:: max(1, len(heard) // max(1, evaluate.samples))][: evaluate.samples]
    index = {key: i for i, key in enumerate(shards.keys.to_pylist())}
    folder = config.run.output / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    for key in wanted:
        path = folder / f"{key}.flac"
        path.write_bytes(shards.read(index[key], "flac"))
        tracker.file(path, "samples")
    shown = [r for r in spoken if r.item.key in set(wanted)]
    columns = {
        "audio": [f"samples/{r.item.key}.flac" for r in shown],
        "transcript": [shards.texts[index[r.item.key]].as_py() for r in shown],
        "task": [r.item.task for r in shown],
        "instruction": [r.item.instruction for r in shown],
        "expected": [r.item.answer for r in shown],
        "answer": [r.answer for r in shown],
    }
    tracker.table("samples", columns)
    tracker.close()
    return tracker.run_id


def run(config: cfg.Config, checkpoint: Path, json_path: Path | None, here: World) -> None:
    evaluate = config.evaluate
    if evaluate is None:
        raise cfg.ConfigError("the config has no `evaluate` section")
    shards = ShardSet.open(list(evaluate.shards), open_cache(config.data))
    items: dict[str, list[Item]] = defaultdict(list)
    keys = shards.keys.to_pylist()
    for item in load_items(evaluate.tasks, set(keys)):
        items[item.key].append(item)
    found = ckpt.find(checkpoint)
    responder = Responder(config, found.weights, here.device)
    evaluation = Evaluation(config, evaluate, responder)
    clips = [i for i, key in enumerate(keys) if key in items]
    size = evaluate.batch_size
    chunks = [clips[at : at + size] for at in range(0, len(clips), size)][here.rank :: here.size]
    total = sum(len(items[keys[i]]) for chunk in chunks for i in chunk)
    mine: list[Result] = []
    with bar("questions", total * len(evaluate.inputs), enabled=here.rank == 0) as shown:
        for chunk in chunks:
            mine += evaluation.results(shards, chunk, items, shown)
    results = [r for rank in here.gather(mine) for r in rank]
    if here.rank == 0:
        rows = summarise(results)
        print_table(rows, evaluate.inputs)
        if json_path is not None:
            json_path.parent.mkdir(parents=True, exist_ok=True)
            json_path.write_text(json.dumps(rows, indent=1) + "\n")
        run_id = track(config, evaluate, found.state, rows, results, shards)
        console.print(
            f"evaluated {len(clips)} utterances with {found.path}; tracker run {run_id}; to look: "
            f"mlflow ui --backend-store-uri {config.run.tracking_uri}"
        )


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint or run folder (run.output)")
    parser.add_argument("--json", type=Path, help="write the rows as JSON, too")
    args = parser.parse_args(argv)
    config = cfg.load(args.config, args.set)
    with world() as here:
        run(config, args.checkpoint or config.run.output, args.json, here)


if __name__ == "__main__":
    sys.exit(guarded(main))
