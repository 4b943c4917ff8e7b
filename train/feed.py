"""The run's data: shards, targets and plan, as the configuration names them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data.audio import SAMPLE_RATE
from data.cache import Cache
from data.collate import Batch, Skip
from data.languages import LanguageLabels
from data.prompts import Prompt
from data.shards import Overlay, ShardSet
from data.states import MEMBER, Silence
from data.stream import Stream
from train import config as cfg
from train.engine import World
from train.model.build import encoder_width, length_rule, load_tokenizer
from train.model.encoder import Featurize


@dataclass(frozen=True)
class Feed:
    """Batches by global step, and what determines their order."""

    stream: Stream
    digest: str
    """Hash of everything that the order of the data depends on."""

    def steps(self, here: World, epoch: int, start: int) -> Iterator[list[Batch]]:
        """This rank's batches of each global step of `epoch`, from step `start` on."""
        return self.stream.steps(epoch, start, rank=here.rank, world=here.size)

    def left_out(self, epoch: int) -> list[Skip]:
        """Samples that no bin of this epoch can hold."""
        return self.stream.skipped(epoch)

    def describe(self) -> str:
        hours = float(self.stream.shards.num_samples.sum()) / 16_000 / 3600
        steps = self.stream.steps_in_epoch(0)
        return f"{len(self.stream.shards)} utterances ({hours:.2f} h), {steps} steps an epoch"


def open_cache(data: cfg.Data) -> Cache | None:
    """Where copies of remote shards go, if the configuration wants any."""
    return Cache(data.cache, int(data.cache_gb * 1e9)) if data.cache else None


def _spoken(shards: ShardSet) -> list[str]:
    """The languages of what has audio."""
    return pc.unique(shards.languages.filter(pa.array(shards.num_samples > 0))).to_pylist()


def encoder_facts(config: cfg.Config) -> dict[str, Any]:
    """What determines an encoder's states, as shards of them say it."""
    encoder = config.model.encoder
    return {
        "encoder": encoder.path,
        "own_length": encoder.own_length,
        "languages": dict(encoder.languages) if encoder.languages else None,
        "precision": config.train.precision,
    }


def check_encoder(expected: dict[str, Any], found: dict[str, Any], where: str) -> None:
    """Raises `ConfigError` where what a shard of states says is not what is expected of it."""
    for name, value in expected.items():
        if found.get(name) != value:
            raise cfg.ConfigError(
                f"{where}: made with {name} {found.get(name)!r}, expected {value!r}; make it again "
                "by train/encode.py in another folder, or change the configuration back"
            )


def open_feed(config: cfg.Config) -> Feed:
    """Open shards and targets and lay out the plan; every rank gets the same."""
    data = config.data
    cache = open_cache(data)
    shards = ShardSet.open(list(data.shards), cache)
    targets = Overlay.open(list(data.targets), shards, cache=cache)
    words = None
    if data.words:
        words = Overlay.open(list(data.words), shards, "words.json", cache)
    tokenizer = load_tokenizer(config.model)
    rule = length_rule(config.model)
    states: Overlay | None = None
    featurize: Featurize | Silence = Featurize.of(config.model.encoder)
    if data.states:
        states = Overlay.open(list(data.states), shards, MEMBER, cache)
        for meta in states.metas:
            check_encoder(encoder_facts(config), meta, "data.states")
        featurize = Silence(rule, encoder_width(config.model))
    order = {
        "seed": config.run.seed,
        "tokens_per_bin": data.tokens_per_bin,
        "seconds_per_bin": data.seconds_per_bin,
        "bins_per_step": data.bins_per_step,
        "window_shards": data.window_shards,
    }
    stream = Stream.build(
        shards,
        targets,
        Prompt(tokenizer, config.prompt),
        rule,
        featurize,
        workers=data.workers,
        augment=data.augment,
        words=words,
        interleave=data.interleave,
        reads=config.losses.kl is not None,
        max_seconds=data.max_seconds,
        **order,  # type: ignore[arg-type]
    )
    stream.prefetch, stream.states = data.prefetch, states
    stream.share = data.share_prompts
    stream.spells = config.losses.ctc is not None or config.losses.language is not None
    if isinstance(config.model.adapter, cfg.EBranchformerAdapter):
        stream.labels = LanguageLabels(config.model.adapter.languages)
    if config.losses.language and (none := stream.labels.unknown(_spoken(shards))):
        raise cfg.ConfigError(
            f"data.shards has speech in {', '.join(none)}, which model.adapter.languages lacks; "
            "add them, or leave losses.language off"
        )
    facts = {
        **order,
        "shards": shards.digest,
        "targets": targets.digest,
        "prompt": config.prompt,
        "lengths": repr(rule),
        "augment": stream.augmenter.facts() if stream.augmenter else None,
    }
    if stream.reads:  # what is read counts for the length of a sample
        facts |= {"reads": True}
    if (shards.num_samples > data.max_seconds * SAMPLE_RATE).any():  # these are left out
        facts |= {"max_seconds": data.max_seconds}
    if words:
        interleave = vars(data.interleave) if data.interleave else None
        facts |= {"words": words.digest, "interleave": interleave}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return Feed(stream, digest)
