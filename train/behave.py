"""Stage 1: what the frozen LLM answers to the transcripts, as target shards.

    deepspeed train/behave.py configs/micro/blsp.yaml

Stage 2 then trains the adapter so that the LLM says the same when it hears the speech. What is
asked, and how many targets an utterance gets, is data (see `data.templates` and `behave.tasks`):
a continuation (BLSP, 2309.00916), many tasks (MTBI, 2505.18644; BLOOMZMMS MI, 2404.10922), no
instruction at all, or the transcript itself (BLOOMZMMS T), for which no LLM is needed. An answer
that was cut at the token limit is marked unfinished and carries no end of sequence, so that stage
2 does not teach to stop mid-sentence. Answers not worth learning are marked with the reason.

Killed anywhere, it continues: answers are on the disk as soon as their batch is done, and batches
depend on the data alone, so that the shards come out the same to the last byte, also on another
number of ranks. All ranks need to see `behave.output`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from data.archive import index_path, read_meta
from data.convert import write_text
from data.prompts import Prompt
from data.shards import ShardSet, write_overlay
from data.templates import Choice, load_templates
from train import config as cfg
from train.cli import arguments, guarded, leave
from train.engine import World, inference, partitioned, world
from train.feed import open_cache
from train.model.build import DTYPES, load_decoder, load_tokenizer
from train.model.generate import Answer, to_text
from train.progress import Bar, bar, console
from train.provenance import weights_of
from train.teachers.hf import Generator
from train.teachers.journal import Answered, Journal, differences
from train.teachers.part import Part, Question, summary
from train.tracking import TARGETS, Tracker, run_tags


class Teacher(Protocol):
    """Who answers: yields what is to be committed together, in any order."""

    def answers(
        self, batches: Sequence[Sequence[Question]], rounds: int
    ) -> Iterator[list[Answered]]: ...


class Stage:
    """What stage 1 is to make, as the configuration says, on this rank."""

    def __init__(self, config: cfg.Config, behave: cfg.Behave, here: World):
        self.config, self.behave, self.here = config, behave, here
        self.shards = ShardSet.open(list(config.data.shards), open_cache(config.data))
        templates = load_templates(behave.templates, list(behave.tasks))
        self.choice = Choice(templates, behave.tasks, config.run.seed)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(config.model)
        self.prompt = Prompt(self.tokenizer, config.prompt)
        for template in templates:
            try:
                self.prompt.halves(template.instruction)
            except ValueError as error:
                raise cfg.ConfigError(f"{behave.templates}: {template.name}: {error}") from None
        asked = any(template.answer == "llm" for template in templates)
        self.facts = provenance(config, behave, self.shards, asked)
        self.journal = Journal(behave.output, self.facts, here.rank)
        self._teacher: Teacher | None = None

    def paths(self) -> list[tuple[Path, range]]:
        """The target shards and the utterances of each."""
        size, total = self.behave.items_per_shard, len(self.shards)
        return [
            (self.behave.output / f"targets-{start // size:06d}.tar",
             range(start, min(start + size, total)))
            for start in range(0, total, size)
        ]  # fmt: skip

    def part(self, path: Path, items: range) -> Part:
        behave = self.behave
        return Part(
            path, self.shards, items, self.choice, self.prompt, behave.filters,
            self.config.run.seed, behave.batch_size,
        )  # fmt: skip

    def teacher(self) -> Teacher:
        """Loaded when first asked for: transcripts as targets need none. On all ranks or none."""
        if self._teacher is None:
            self._teacher = load_teacher(self.config, self.behave, self.here, self.tokenizer)
        return self._teacher

    def write(self, parts: Sequence[Part], shown: Bar) -> None:
        """Make some target shards: all ranks answer, then each writes its own of them."""
        known = self.here.broadcast({part.name: self.journal.read(part.name) for part in parts})
        open_batches = [
            unknown
            for part in parts
            for batch in part.batches
            if (unknown := [q for q in batch if q.number not in known[part.name]])
        ]
        shown.advance(sum(len(part.asks) for part in parts) - sum(map(len, open_batches)))
        if open_batches:
            # Dealt in turn, so that no rank has more of the long ones than the others.
            mine = open_batches[self.here.rank :: self.here.size]
            rounds = -(-len(open_batches) // self.here.size)
            new: list[tuple[str, int, Answer]] = []
            for answered in self.teacher().answers(mine, rounds):
                self.journal.append(answered)
                new += [(question.part, question.number, answer) for question, answer in answered]
                shown.advance(len(answered) * self.here.size)
            for name, number, answer in (row for rows in self.here.gather(new) for row in rows):
                known[name][number] = answer
        self.journal.close()
        for part in parts[self.here.rank :: self.here.size]:
            self._commit(part, known[part.name])

    def _commit(self, part: Part, answers: dict[int, Answer]) -> None:
        decoded = {n: to_text(self.tokenizer, answer) for n, answer in answers.items()}
        records = list(part.records(answers, decoded))
        write_text(filtered_path(part.path), filtered_rows(records))
        meta = self.facts | {"counts": summary(records)}
        write_overlay(part.path, records, meta=meta, base=self.shards)
        self.journal.discard(part.name)


def load_teacher(
    config: cfg.Config, behave: cfg.Behave, here: World, tokenizer: PreTrainedTokenizerBase
) -> Teacher:
    """The engine that `behave.engine` names."""
    if behave.server is not None:
        try:
            from train.teachers.openai import Client
        except ModuleNotFoundError:
            raise cfg.ConfigError(
                "behave.engine openai needs the openai library: pip install -e '.[openai]'"
            ) from None
        return Client(
            behave.server,
            config.model.decoder.path,
            Prompt(tokenizer, config.prompt).encode,
            max_new_tokens=behave.max_new_tokens,
            temperature=behave.temperature,
        )
    dtype = DTYPES[config.train.precision]
    if behave.sharded:
        with partitioned(config.train):
            decoder = load_decoder(config.model, dtype)
        inference(decoder, config.train)
    else:
        decoder = load_decoder(config.model, dtype, here.device)
    return Generator(
        decoder,
        tokenizer,
        max_new_tokens=behave.max_new_tokens,
        temperature=behave.temperature,
        device=here.device,
        synced=behave.sharded,
    )


def provenance(
    config: cfg.Config, behave: cfg.Behave, shards: ShardSet, asked: bool = True
) -> dict[str, Any]:
    """What determines the targets; its hash is kept with every target shard.

    Args:
        asked: whether the LLM answers anything; transcripts as targets need none.
    """
    server, decoder = behave.server, config.model.decoder
    here = asked and server is None  # else its weights are somewhere else, or of no matter
    facts = {
        "teacher": decoder.path,
        "teacher_weights": weights_of(decoder.path) if here else None,
        "eight_bit": decoder.eight_bit if here else None,
        "engine": behave.engine,
        "server_model": server.model if server else None,
        "precision": config.train.precision if server is None else None,
        "prompt": config.prompt,
        "templates": hashlib.sha256(behave.templates.read_bytes()).hexdigest(),
        "tasks": behave.tasks,
        "max_new_tokens": behave.max_new_tokens,
        "temperature": behave.temperature,
        "filters": behave.filters.facts(),
        "batch_size": behave.batch_size if server is None else None,
        "items_per_shard": behave.items_per_shard,
        "seed": config.run.seed,
        "base": shards.digest,
    }
    facts["hash"] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return facts


def is_done(path: Path, facts: dict[str, Any]) -> bool:
    """Whether this target shard is there already, tar and index.

    Raises:
        ConfigError: it is there, but was made in another way.
    """
    index = index_path(path)
    if not (index.exists() and path.exists()):
        return False
    if changed := differences(facts, read_meta(index)):
        raise cfg.ConfigError(
            f"{path} was made with another {changed}; remove it, or choose another behave.output"
        )
    return True


def filtered_path(path: Path) -> Path:
    """Beside targets-000012.tar: its targets that are not trained, with the reason of each."""
    return path.with_suffix(".filtered.jsonl")


def filtered_rows(records: list[tuple[str, dict[str, Any]]]) -> str:
    """JSONL rows {key, task, template, filtered, text}."""
    named = ("task", "template", "filtered", "text")
    rows = [
        {"key": key} | {name: target[name] for name in named}
        for key, record in records
        for target in record["targets"]
        if "filtered" in target
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def run(config: cfg.Config, here: World) -> None:
    behave = config.behave
    if behave is None:
        raise cfg.ConfigError("the config has no `behave` section, which stage 1 needs")
    stage = Stage(config, behave, here)
    paths = stage.paths()
    done = [path for path, _ in paths if is_done(path, stage.facts)]
    done = here.broadcast(done)  # one view of the folder for all ranks
    waiting = [(path, items) for path, items in paths if path not in done]
    if here.rank == 0:
        for path in done:  # a kill may have come between a shard and the end of its journal
            stage.journal.discard(path.stem)
        console.print(
            f"stage 1: {len(stage.shards)} utterances, {len(stage.choice.templates)} wordings of "
            f"{', '.join(behave.tasks)}; {len(done)} of {len(paths)} target shards are there"
        )
    total = sum(len(items) for _, items in waiting) * sum(behave.tasks.values())
    with (
        closing(stage.journal),  # who comes after a stop finds it free at once
        bar("answers", total, enabled=here.rank == 0 and bool(waiting)) as shown,
    ):
        for at in range(0, len(waiting), here.size):
            wave = [stage.part(path, items) for path, items in waiting[at : at + here.size]]
            stage.write(wave, shown)
    here.barrier()
    said = behave.output / "summary.json"
    if here.rank == 0 and (waiting or not said.exists()):
        whole = report(config, stage.facts, [path for path, _ in paths])
        write_text(said, json.dumps(whole, indent=1, sort_keys=True) + "\n")


def report(config: cfg.Config, facts: dict[str, Any], paths: list[Path]) -> dict[str, int]:
    """Say what all target shards hold, in the terminal and as a run in the tracker."""
    whole: Counter[str] = Counter()
    for path in paths:
        counts = read_meta(index_path(path))["counts"]
        whole.update({name: counts[name] for name in ("targets", "unfinished")})
        for group in ("tasks", "filtered"):
            whole.update({f"{group}/{name}": n for name, n in counts[group].items()})
    filtered = {k.partition("/")[2]: n for k, n in whole.items() if k.startswith("filtered/")}
    console.print(
        f"stage 1: {whole['targets']} targets to train, {whole['unfinished']} of them cut at the "
        f"token limit (no end of sequence); filtered: {sum(filtered.values())}"
        + "".join(f", {n} {reason}" for reason, n in filtered.items())
    )
    if not whole["targets"]:
        console.print("stage 1: nothing is left to train; look at *.filtered.jsonl for the reasons")
    tracker = Tracker(
        config.run.tracking_uri,
        config.run.experiment,
        f"{config.run.name}-targets",
        params={k: str(v) for k, v in facts.items()},
        tags=run_tags("behave") | {TARGETS: str(facts["hash"])},
    )
    # MLflow takes no other characters in a metric's name.
    named = {re.sub(r"[^\w./-]", "_", f"data/{name}"): float(n) for name, n in whole.items()}
    tracker.values(named)
    for path in map(filtered_path, paths):
        if path.stat().st_size:
            tracker.file(path, "filtered")
    tracker.close()
    return dict(whole)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__ or "").parse_args(argv)
    config = cfg.load(args.config, args.set)
    with world(config.train.hang_seconds) as here:
        run(config, here)


if __name__ == "__main__":
    leave(guarded(main))
