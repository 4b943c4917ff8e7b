"""Stage 2: train the adapter so that the LLM, hearing speech, says what it says reading it.

    deepspeed train/main.py configs/micro/blsp.yaml
    deepspeed train/main.py configs/blsp.yaml --set train.lr=5e-5 --dry-run

The same command again continues from the run's newest checkpoint, on any number of ranks. A config
with `stages` (BLOOMZMMS: CTC, then cross entropy) trains one after another, each from the weights
of the one before, and continues in the stage that it had reached.
"""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from data.secrets import redacted
from train import checkpoint as ckpt
from train import config as cfg
from train.cli import arguments, guarded, leave
from train.communication import Communication
from train.dryrun import dry_run
from train.engine import (
    Engine,
    World,
    environment,
    gathered,
    partition,
    partitioned,
    rewritten,
    stage_of,
    world,
)
from train.feed import Feed, open_feed
from train.frozen import unchanged
from train.loop import Trainer, check_plan
from train.model.build import build
from train.model.respond import load_trained
from train.model.speech_llm import SpeechLLM
from train.owner import Owner, wait_for_owner
from train.profiling import profiled
from train.progress import console
from train.provenance import check_checkpoint, check_feed, sources_of
from train.stopping import Stopped
from train.tracking import TARGETS, StepTracker, Used, parent, run_tags
from train.validation import Validation


def agreed(
    here: World, what: Path, look: Callable[[], ckpt.Checkpoint | None]
) -> ckpt.Checkpoint | None:
    """What `look` finds on this rank, once it is what it finds on all of them. A collective.

    A file system that many hosts share may show one of them an old listing, and a read may fail on
    one alone: ranks that went on from different checkpoints would train nothing anybody asked for.

    Raises:
        Stopped: on all ranks, where they differ.
        CheckpointError: `look` has raised it, on all ranks.
    """
    found, fault = None, None
    try:
        found = look()
    except ckpt.CheckpointError as error:
        fault = error
    ranks: dict[str, list[int]] = {}
    mine = f"step {found.state.step} (plan {found.state.plan[:12]})" if found else "none"
    for rank, its in enumerate(here.gather(mine)):
        ranks.setdefault(its, []).append(rank)
    if len(ranks) > 1:
        each = "; ".join(f"{its} on {_named(those)}" for its, those in ranks.items())
        raise Stopped(
            f"the ranks found different checkpoints in {what}: {each}; look at the disk of those "
            "that lack the newest, or wait until their host sees it"
        )
    if fault is not None:
        raise fault
    return found


def _named(ranks: list[int], most: int = 8) -> str:
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return f"rank {', '.join(map(str, ranks[:most]))}{more}"


def resume_point(config: cfg.Config, here: World, digest: str) -> ckpt.Checkpoint | None:
    """The run's newest checkpoint, if it has one and its data order is this config's. A collective.

    Raises:
        Stopped: not all ranks find the same one.
        CheckpointError: the run was begun with other data, budgets or seed.
    """
    folder = config.run.output / "checkpoints"
    found = agreed(here, folder, lambda: ckpt.newest(folder, console.print))
    if found is not None and found.state.plan != digest:
        raise ckpt.CheckpointError(
            f"{found.path} was trained on another order of data (plan {found.state.plan[:12]}, "
            f"now {digest[:12]}): shards, targets, budgets, prompt or seed changed; restore them, "
            "or choose another run.output"
        )
    return found


def open_tracker(
    config: cfg.Config, here: World, begun: ckpt.State | None
) -> tuple[StepTracker | None, str]:
    """The run's tracker (on rank 0) and its id; the same one after every restart.

    A run that was `begun` from another one's weights names it, and stands below it in MLflow.

    The id is kept beside the checkpoints from the very beginning, so that a run killed before
    its first checkpoint is continued in the tracker, too.
    """
    path = config.run.output / "tracker.json"
    tracker = None
    if here.rank == 0:
        known = json.loads(path.read_text()) if path.exists() else {}
        uri = redacted(config.run.tracking_uri)
        if known and known["uri"] != uri:
            raise cfg.ConfigError(
                f"run.tracking_uri is {uri}, but {config.run.output} was begun with "
                f"{known['uri']}; restore it, or choose another run.output"
            )
        tracker = StepTracker(
            config.run.tracking_uri,
            config.run.experiment,
            config.run.name,
            run_id=known.get("run_id"),
            params=config.flat(),
            tags=run_tags("train") | links(config, begun),
            journal=config.run.output / "metrics.jsonl",
            say=console.print,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"uri": uri, "run_id": tracker.run_id}) + "\n")
        partial.rename(path)
    return tracker, here.broadcast(tracker.run_id if tracker else None)


def show_data(
    tracker: StepTracker, config: cfg.Config, feed: Feed, validation: Validation | None
) -> None:
    """Tell the tracker what the run learns from, with pictures of it."""
    made = {str(meta["hash"]) for meta in feed.stream.targets.metas if "hash" in meta}
    tracker.tag(TARGETS, ", ".join(sorted(made)))
    tracker.data(Used.of("training", "training", feed.stream.shards))
    if validation is not None:
        tracker.data(Used.of("validation", "validation", validation.feed.stream.shards))
    if config.run.pictures:
        from train import pictures  # matplotlib takes a second

        tracker.picture("lengths", pictures.lengths(feed.stream))
        tracker.picture("packing", pictures.packing(feed.stream, config.data.tokens_per_bin))


def links(config: cfg.Config, begun: ckpt.State | None) -> dict[str, str]:
    """Tags of a run that name the one whose weights it began with."""
    return {} if begun is None else parent(config, begun, "hearken.begun_from")


def make_model(config: cfg.Config, here: World) -> SpeechLLM:
    """The model as stage 2 trains it, partitioned where its engine wants that."""
    return build(
        config.model,
        config.train.precision,
        seed=config.run.seed,
        device=here.device,
        partitioned=partitioned(config.train),
        gathered=gathered,
        partition=partition if stage_of(config.train) == 3 else None,
        capacity=config.data.tokens_per_bin,
        losses=config.losses,
        stored=bool(config.data.states),
    )


def run(
    config: cfg.Config, here: World, profile_steps: int = 0, owner: Owner | None = None
) -> None:
    feed = open_feed(config)
    check_plan(feed, 0)
    found = resume_point(config, here, feed.digest)
    if found is not None and found.state.step >= config.train.steps:
        if here.rank == 0:
            console.print(f"{found.path} has all {config.train.steps} steps; nothing to do")
            # but to send metrics that the tracker was not there for
        tracker, _ = open_tracker(config, here, None)
        if tracker is not None:
            tracker.close()
        return
    validation = Validation.open(config)
    sources = sources_of(config, feed)
    check_feed(config, feed, sources)
    if validation is not None:
        check_feed(config, validation.feed, sources, "validation")
        check_plan(validation.feed, 0, "validation")
    if found is not None:
        check_checkpoint(config, found.state, str(found.path))
    model = make_model(config, here)
    begun = None
    if found is not None:
        load_trained(model, found.weights, rewritten)
    elif config.train.init is not None:
        init = config.train.init
        first = agreed(here, init, lambda: ckpt.find(init))
        assert first is not None
        load_trained(model, first.weights, rewritten)
        begun = first.state
    accumulation = math.ceil(config.data.bins_per_step / here.size)
    engine = Engine(model, config.train, here, accumulation)
    if found is not None:
        engine.load(found.weights, found.moments, found.state.updates)
    tracker, run_id = open_tracker(config, here, begun)
    if here.rank == 0:
        where = f"from {found.path}" if found else "from the start"
        if begun is not None:
            where += f" with the weights of {config.train.init}"
        console.print(
            f"stage 2: {engine.num_trained / 1e6:.2f} M trained parameters on {here.size} ranks, "
            f"{config.train.precision}, ZeRO-{stage_of(config.train)}, {feed.describe()}, {where}"
        )
    if tracker is not None and found is None:
        show_data(tracker, config, feed, validation)
    trainer = Trainer(
        config, here, engine, feed, found, tracker, run_id, validation, owner, sources
    )
    record = config.run.output / "frozen.json"
    verified: AbstractContextManager[None] = nullcontext()
    if config.train.verify_frozen:
        verified = unchanged(model, config.model, gathered, record if here.rank == 0 else None)
    try:
        with verified:
            if profile_steps and here.rank == 0:
                trainer.communication = Communication(0, here.device)  # one profile at a time
                with profiled(config.run.output / "profile", profile_steps) as step_done:
                    trainer.run(step_done)
            else:
                trainer.run()
    except BaseException as end:
        if tracker is not None:
            # Soon: whoever stops it may be about to kill it.
            tracker.close("KILLED" if isinstance(end, Stopped) else "FAILED", seconds=10)
        raise
    engine.close()
    if tracker is not None:
        if config.train.verify_frozen:
            tracker.file(record, "frozen")
        tracker.close()
        console.print(f"stage 2: done; checkpoint in {config.run.output / 'checkpoints'}")


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print config, parameter groups, memory, communication and operations; stop",
    )
    parser.add_argument("--gpus", type=int, default=1, help="with --dry-run: ranks in all")
    parser.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GB",
        help="with --dry-run: of one GPU; also activations, and the largest token budget that fits",
    )
    parser.add_argument("--json", type=Path, help="with --dry-run: write the same as JSON")
    parser.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="STEPS",
        help="trace this many steps of rank 0 into OUTPUT/profile",
    )
    args = parser.parse_args(argv)
    stages = cfg.load_stages(args.config, args.set)
    if args.dry_run:
        for config in stages:  # of several, the file has the last one's
            dry_run(config, args.json, args.gpus, args.gpu_memory)
        return
    environment()
    # Before the ranks meet: an earlier start may still hold the port.
    owner = None
    if os.environ["RANK"] == "0":
        owner = Owner(stages[0].run.output, console.print)
    else:
        wait_for_owner(stages[0].run.output)
    with world(stages[0].train.hang_seconds) as here:
        for config in stages:
            run(config, here, args.profile, owner)
            gc.collect()  # DeepSpeed's parts hold each other, and the next stage wants the memory


if __name__ == "__main__":
    leave(guarded(main))
