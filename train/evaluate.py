"""Evaluate a trained adapter on every task, from speech, with its bounds beside it.

    deepspeed train/evaluate.py configs/micro/blsp.yaml --checkpoint runs/micro/blsp

What is asked stands in a task file (`data.tasks`), with which inputs in `train.evaluation`, how it
is scored in `train.metrics`. `python -m train.compare` puts several results side by side.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from data.audio import SAMPLE_RATE
from data.secrets import redacted
from data.shards import ShardSet
from data.tasks import Item, load_items
from train import checkpoint as ckpt
from train import config as cfg
from train.cli import arguments, guarded, leave
from train.engine import World, world
from train.evaluation import Evaluation, Result
from train.feed import open_cache
from train.generalisation import generalisation
from train.metrics import CHOICES, METRICS
from train.model.build import length_rule
from train.model.respond import Responder
from train.pictures import of_clips
from train.progress import bar, console
from train.provenance import check_checkpoint, targets_say
from train.report import (
    answer_rows,
    print_generalisation,
    print_scores,
    sampled,
    track,
    write_json,
)
from train.scores import cells
from train.states import Measured


def check(items: list[Item], path: Path) -> None:
    """Raise `ConfigError` on a metric that there is not, or that an item gives nothing to."""
    for item in items:
        for name in item.metrics:
            if name not in METRICS:
                raise cfg.ConfigError(
                    f"{path}: task {item.task!r} has metric {name!r}; known are "
                    f"{', '.join(METRICS)}"
                )
            if name in CHOICES and not item.options:
                raise cfg.ConfigError(
                    f"{path}: task {item.task!r} has metric {name!r}, which needs `options` to "
                    f"choose from; {item.key!r} has none"
                )


def check_clips(config: cfg.Config, shards: ShardSet, clips: list[int]) -> None:
    """Raise `ConfigError` on a clip that the model cannot hear, before the first is heard."""
    samples, most = shards.num_samples[clips], config.data.max_seconds
    long = samples > most * SAMPLE_RATE
    unheard = long | (length_rule(config.model).slots(samples) < 1)
    if unheard.any():
        i = int(unheard.argmax())
        bound = f"data.max_seconds is {most:g}" if long[i] else "too short for one adapter slot"
        raise cfg.ConfigError(
            f"evaluate.shards: {unheard.sum()} of {len(clips)} clips are too long or too short, "
            f"first {shards.key(clips[i])!r} of {samples[i] / SAMPLE_RATE:.2f} s ({bound}); "
            f"leave them out of {config.evaluate.tasks if config.evaluate else 'the tasks'}"
        )


def trained_tasks(config: dict[str, Any]) -> tuple[str, ...]:
    """The tasks whose targets a checkpoint was trained on; none if unknown.

    Args:
        config: the resolved configuration in the checkpoint. What its target shards count is
            preferred; where they are gone, its `behave.tasks`, unless a pattern there may stand
            for any task, also for the held-out ones that it does not take.
    """
    metas = targets_say(config["data"]["targets"])
    if metas and all("counts" in meta for meta in metas):
        return tuple(sorted({task for meta in metas for task in meta["counts"]["tasks"]}))
    named = tuple((config.get("behave") or {}).get("tasks") or ())
    return () if any("*" in pattern for pattern in named) else named


def run(
    config: cfg.Config,
    checkpoint: Path,
    json_path: Path | None,
    answers_path: Path | None,
    here: World,
) -> None:
    evaluate = config.evaluate
    if evaluate is None:
        raise cfg.ConfigError("the config has no `evaluate` section")
    shards = ShardSet.open(list(evaluate.shards), open_cache(config.data))
    keys = shards.keys.to_pylist()
    listed = load_items(evaluate.tasks, set(keys))
    check(listed, evaluate.tasks)
    items: dict[str, list[Item]] = defaultdict(list)
    for item in listed:
        items[item.key].append(item)
    found = ckpt.find(checkpoint)
    check_checkpoint(config, found.state, str(found.path))
    clips = [i for i, key in enumerate(keys) if key in items]
    check_clips(config, shards, clips)
    responder = Responder(config, found.weights, here.device)
    evaluation = Evaluation(config, evaluate, responder, shards, items, clips)
    size = evaluate.batch_size
    chunks = [clips[at : at + size] for at in range(0, len(clips), size)][here.rank :: here.size]
    total = sum(len(items[keys[i]]) for chunk in chunks for i in chunk)
    mine: tuple[list[Result], list[Measured]] = [], []
    with bar("questions", total * len(evaluate.inputs), enabled=here.rank == 0) as shown:
        for chunk in chunks:
            results, measured = evaluation.results(chunk, shown)
            mine[0].extend(results)
            mine[1].extend(measured)
    gathered = here.gather(mine)
    if here.rank == 0:
        all_results = [r for results, _ in gathered for r in results]
        scored = cells(
            all_results,
            [m for _, measured in gathered for m in measured],
            normaliser=evaluate.normaliser,
            resamples=evaluate.resamples,
            trained=trained_tasks(found.state.config),
        )
        general = generalisation(scored)
        rows = [cell.row for cell in scored]
        print_scores(rows, evaluate.inputs)
        print_generalisation(general)
        if json_path is not None:
            write_json(json_path, rows)
        if answers_path is not None:
            write_json(answers_path, answer_rows(all_results))
        numbers = {key: i for i, key in enumerate(keys)}
        drawn = sampled(config, all_results)[: evaluate.pictures]
        asked = {numbers[key]: items[key][0].instruction for key in drawn}
        pictures = of_clips(config, responder, shards, asked) if asked else ()
        run_id = track(config, found.state, scored, general, all_results, shards, pictures)
        console.print(
            f"evaluated {len(clips)} utterances with {found.path}; tracker run {run_id}; to look: "
            f"mlflow ui --backend-store-uri {redacted(config.run.tracking_uri)}"
        )


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint or run folder (run.output)")
    parser.add_argument("--json", type=Path, help="write the rows as JSON, too")
    parser.add_argument("--answers", type=Path, help="write every answer as JSON, too")
    args = parser.parse_args(argv)
    config = cfg.load(args.config, args.set)
    with world(config.train.hang_seconds) as here:
        run(config, args.checkpoint or config.run.output, args.json, args.answers, here)


if __name__ == "__main__":
    leave(guarded(main))
