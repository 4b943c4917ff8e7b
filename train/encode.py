"""What the frozen encoder makes of the speech, once and for all runs that train behind it.

    deepspeed train/encode.py configs/blsp.yaml states/libri
    deepspeed train/main.py configs/blsp.yaml --set 'data.states=[states/libri/states-*.tar]'

OUT/states-NAME.tar and its index for each shard NAME.tar of `data.shards`: an overlay with the
encoder's last hidden states of every utterance, in the run's precision. A run that names them
neither loads nor runs the encoder; a second of MMS-1B takes 128 kB, eight times the FLAC. Nothing
may change what is heard from epoch to epoch (`data.augment`), nor what hears it (LoRA). Run again,
it does what is missing; on any number of ranks, whole shards each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.archive import ContentError, index_path, read_meta
from data.audio import SAMPLE_RATE, AudioError, decode
from data.collate import pad_features
from data.remote import shown
from data.retry import retried
from data.shards import ShardSet, write_overlay
from data.states import MEMBER, states_record
from train import config as cfg
from train.cli import arguments, guarded, leave
from train.engine import World, world
from train.feed import check_encoder, encoder_facts, open_cache
from train.model.build import DTYPES, length_rule
from train.model.encoder import Featurize, SpeechEncoder
from train.model.lengths import LengthRule
from train.progress import Bar, bar, console
from train.provenance import weights_of

_METHOD = 1  # changes when the same encoder would give other states


class Encoder:
    """The configuration's encoder, over batches of clips of like length."""

    def __init__(self, config: cfg.Config, here: World):
        model, self.here = config.model, here
        self.rule: LengthRule = length_rule(model)
        self.featurize = Featurize.of(model.encoder)
        self._seconds = config.data.seconds_per_bin
        loaded = SpeechEncoder.load(
            model.encoder, DTYPES[config.train.precision], model.trust_remote_code
        )
        self._model = loaded.to(here.device)

    def batches(self, shards: ShardSet) -> Iterator[list[int]]:
        """Samples with audio, the longest first, up to `data.seconds_per_bin` of padded audio."""
        order = np.argsort(-shards.num_samples, kind="stable")
        batch: list[int] = []
        for i in order[shards.num_samples[order] > 0].tolist():
            longest = int(shards.num_samples[batch[0]]) if batch else 0
            if batch and (len(batch) + 1) * longest > self._seconds * SAMPLE_RATE:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    @torch.no_grad()
    def __call__(self, shards: ShardSet, batch: list[int]) -> dict[int, torch.Tensor]:
        """Sample -> its states [frames, width]; none of one whose audio is at fault."""
        waves = {i: wave for i in batch if (wave := _wave(shards, i)) is not None}
        if not waves:
            return {}
        samples = tuple(map(len, waves.values()))
        features = pad_features([self.featurize(wave) for wave in waves.values()])
        languages = tuple(shards.languages[i].as_py() for i in waves)
        states_CFE = self._model(features.to(self.here.device), samples, languages).cpu()
        return {
            i: states_CFE[row, : int(self.rule.frames(n))].clone()
            for row, (i, n) in enumerate(zip(waves, samples, strict=True))
        }


def _wave(shards: ShardSet, i: int) -> np.ndarray | None:
    """Sample i's audio; None where it is at fault, which training will find and name."""
    planned = int(shards.num_samples[i])
    try:
        data = retried(lambda: shards.read(i, "flac"), lambda: shards.shard_name(i))
        wave = decode(data, max_seconds=planned / SAMPLE_RATE + 1)
    except (ContentError, AudioError):
        return None
    return wave if len(wave) == planned else None


def encode_shard(
    address: str, path: Path, encoder: Encoder, facts: dict[str, Any], progress: Bar
) -> None:
    """Write one shard of states."""
    base = ShardSet([address])
    states: dict[int, torch.Tensor] = {}
    for batch in encoder.batches(base):
        states |= encoder(base, batch)
        progress.advance(len(batch) * encoder.here.size)
    nothing = torch.zeros(0, 1)

    def items() -> Iterator[tuple[str, bytes]]:
        for i, key in enumerate(base.keys.to_pylist()):
            yield key, states_record(states.pop(i, nothing))

    write_overlay(path, items(), MEMBER, facts, base=base)


def is_done(path: Path, address: str, facts: dict[str, Any]) -> bool:
    """Whether these states are there (the index appears last, so they are whole) and up to date.

    Raises:
        ConfigError: they were made by another encoder.
    """
    index = index_path(path)
    if not index.exists() or not path.exists():
        return False
    found = read_meta(index)
    check_encoder(facts, found, str(path))
    return bool(found["base_digest"] == ShardSet([address]).digest)


def run(config: cfg.Config, out: Path, here: World) -> None:
    shards = ShardSet.open(list(config.data.shards), open_cache(config.data))
    weights = weights_of(config.model.encoder.path)
    facts = encoder_facts(config) | {"encoder_weights": weights, "method": _METHOD}
    facts["hash"] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    jobs: dict[Path, str] = {}
    for address in shards.addresses:
        path = out / f"states-{Path(shown(address)).stem}.tar"
        if path in jobs:
            raise cfg.ConfigError(
                f"data.shards: {shown(jobs[path])} and {shown(address)} have the same name; give "
                "them folders of their own"
            )
        jobs[path] = address
    waiting = [path for path, address in jobs.items() if not is_done(path, address, facts)]
    waiting = here.broadcast(waiting)  # one view of the folder for all ranks
    if here.rank == 0:
        console.print(
            f"{len(shards)} utterances; {len(jobs) - len(waiting)} of {len(jobs)} shards of states "
            f"are in {out}"
        )
    if waiting:
        encoder = Encoder(config, here)
        total = sum(int((ShardSet([jobs[path]]).num_samples > 0).sum()) for path in waiting)
        with bar("encoded", total, enabled=here.rank == 0) as progress:
            for path in waiting[here.rank :: here.size]:
                encode_shard(jobs[path], path, encoder, facts, progress)
    here.barrier()


def main(argv: list[str] | None = None) -> None:
    parser: argparse.ArgumentParser = arguments(__doc__ or "")
    parser.add_argument("out", type=Path, help="the folder to write shards of states to")
    args = parser.parse_args(argv)
    config = cfg.load(args.config, args.set)
    if config.model.encoder.lora is not None or config.model.encoder.layers != "last":
        raise cfg.ConfigError(
            "model.encoder has lora, or weighted layers: its states change while it is trained; "
            "nothing can be stored"
        )
    with world(config.train.hang_seconds) as here:
        run(config, args.out, here)


if __name__ == "__main__":
    leave(guarded(main))
