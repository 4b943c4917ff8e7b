"""Stage 1: what the frozen LLM answers to the transcripts, as target shards.

    deepspeed train/behave.py configs/micro/blsp.yaml

BLSP (2309.00916): the LLM continues each transcript; stage 2 then trains the adapter so that the
LLM says the same when it hears the speech. An answer that was cut at the token limit is marked
unfinished and carries no end of sequence, so that stage 2 does not teach to stop mid-sentence.

Each rank keeps the LLM whole and writes its own shards, so ranks never wait for each other.
Killed anywhere, it continues with the shards that are not there yet.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data.archive import index_path, read_meta
from data.prompts import Prompt
from data.shards import ShardSet, write_overlay
from data.templates import Template, choose, load_templates
from train import config as cfg
from train.cli import arguments, guarded
from train.engine import World, world
from train.feed import open_cache
from train.model.build import DTYPES, load_decoder, load_tokenizer
from train.model.generate import Answer, generate, to_text
from train.progress import Bar, bar, console
from train.tracking import Tracker, run_tags


class Teacher:
    """The frozen LLM and how it is asked."""

    def __init__(self, config: cfg.Config, behave: cfg.Behave, device: torch.device):
        self.behave, self.seed, self.device = behave, config.run.seed, device
        self.tokenizer = load_tokenizer(config.model)
        self.prompt = Prompt(self.tokenizer, config.prompt)
        self.decoder = load_decoder(config.model, DTYPES[config.train.precision], device)

    @torch.no_grad()
    def answer(self, prompts: list[list[int]], seed: int) -> list[Answer]:
        torch.manual_seed(seed)
        ids = torch.tensor([i for p in prompts for i in p], device=self.device)
        return generate(
            self.decoder,
            self.decoder.get_input_embeddings()(ids),
            tuple(len(p) for p in prompts),
            eos=int(self.tokenizer.eos_token_id),
            max_new_tokens=self.behave.max_new_tokens,
            temperature=self.behave.temperature,
        )


def provenance(config: cfg.Config, behave: cfg.Behave, shards: ShardSet) -> dict[str, Any]:
    """What determines the targets; its hash is kept with every target shard."""
    facts = {
        "teacher": config.model.decoder.path,
        "precision": config.train.precision,
        "prompt": config.prompt,
        "templates": hashlib.sha256(behave.templates.read_bytes()).hexdigest(),
        "tasks": list(behave.tasks),
        "max_new_tokens": behave.max_new_tokens,
        "temperature": behave.temperature,
        "batch_size": behave.batch_size,
        "seed": config.run.seed,
        "base": shards.digest,
    }
    facts["hash"] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return facts


def is_done(path: Path, facts: dict[str, Any]) -> bool:
    """Whether this target shard is there already (its index appears last, so it is whole).

    Raises:
        ConfigError: it is there, but was made in another way.
    """
    index = index_path(path)
    if not index.exists():
        return False
    found = read_meta(index)
    if found.get("hash") != facts["hash"]:
        changed = [k for k in facts if k != "hash" and found.get(k) != facts[k]]
        raise cfg.ConfigError(
            f"{path} was made with another {', '.join(changed)}; remove it, or choose another "
            "behave.output"
        )
    return True


def part(
    teacher: Teacher, shards: ShardSet, templates: list[Template], items: range, shown: Bar
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, record) of one target shard, in the order of `items`.

    Batches are formed by prompt length inside the part, so that they are the same whichever
    rank does it and whenever.
    """
    columns = (shards.keys, shards.languages, shards.texts)
    keys, languages, texts = (c[items.start : items.stop].to_pylist() for c in columns)
    chosen = [
        choose(templates, key, language, teacher.seed)
        for key, language in zip(keys, languages, strict=True)
    ]
    prompts = [
        teacher.prompt.with_text(t.instruction, text) for t, text in zip(chosen, texts, strict=True)
    ]
    answers: dict[int, Answer] = {}
    order = sorted(range(len(items)), key=lambda j: (len(prompts[j]), j))
    size = teacher.behave.batch_size
    for at in range(0, len(order), size):
        batch = order[at : at + size]
        seed = hash((teacher.seed, items.start, at))
        answers |= zip(batch, teacher.answer([prompts[j] for j in batch], seed), strict=True)
        shown.advance(len(batch))
    for j, key in enumerate(keys):
        answer = answers[j]
        target = {
            "instruction": chosen[j].instruction,
            "template": chosen[j].name,
            "ids": list(answer.ids),
            "text": to_text(teacher.tokenizer, answer),
            "finished": answer.finished,
        }
        yield key, {"targets": [target]}


def run(config: cfg.Config, here: World) -> None:
    behave = config.behave
    if behave is None:
        raise cfg.ConfigError("the config has no `behave` section, which stage 1 needs")
    shards = ShardSet.open(list(config.data.shards), open_cache(config.data))
    templates = load_templates(behave.templates, behave.tasks)
    facts = provenance(config, behave, shards)
    parts = [
        (behave.output / f"targets-{start // behave.items_per_shard:06d}.tar",
         range(start, min(start + behave.items_per_shard, len(shards))))
        for start in range(0, len(shards), behave.items_per_shard)
    ]  # fmt: skip
    waiting = [(path, items) for path, items in parts if not is_done(path, facts)]
    if here.rank == 0:
        console.print(
            f"stage 1: {len(shards)} utterances, {len(templates)} wordings of "
            f"{', '.join(behave.tasks)}; {len(parts) - len(waiting)} of {len(parts)} target "
            "shards are there"
        )
    here.barrier()
    mine = waiting[here.rank :: here.size]
    unfinished = empty = written = 0
    if mine:
        teacher = Teacher(config, behave, here.device)
        total = sum(len(items) for _, items in mine)
        with bar("answers", total, enabled=here.rank == 0) as shown:
            for path, items in mine:
                rows = list(part(teacher, shards, templates, items, shown))
                targets = [t for _, row in rows for t in row["targets"]]
                unfinished += sum(not t["finished"] for t in targets)
                empty += sum(not t["ids"] for t in targets)
                written += len(rows)
                write_overlay(path, rows, meta=facts, base=shards)
    counts = here.sum(written, unfinished, empty)
    if here.rank == 0 and waiting:
        report(config, facts, [int(c) for c in counts])


def report(config: cfg.Config, facts: dict[str, Any], counts: list[int]) -> None:
    """Say what was made, in the terminal and as a run in the tracker."""
    written, unfinished, empty = counts
    console.print(
        f"stage 1: wrote {written} targets; {unfinished} cut at the token limit (no end of "
        f"sequence), {empty} empty (skipped in stage 2)"
    )
    tracker = Tracker(
        config.run.tracking_uri,
        config.run.experiment,
        f"{config.run.name}-targets",
        params={k: str(v) for k, v in facts.items()},
        tags=run_tags("behave"),
    )
    tracker.values({"data/targets": written, "data/unfinished": unfinished, "data/empty": empty})
    tracker.close()


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__ or "").parse_args(argv)
    config = cfg.load(args.config, args.set)
    with world() as here:
        run(config, here)


if __name__ == "__main__":
    sys.exit(guarded(main))
