"""Small shards, targets, a tokenizer and a length rule, made on the spot."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.archive import Row, write_shard
from data.audio import encode_flac
from data.shards import Overlay, ShardSet, write_overlay

FIELDS = {
    "num_samples": pa.int64(),
    "text": pa.string(),
    "language": pa.string(),
    "speaker": pa.string(),
}


class ByteTokenizer:
    """Bytes as tokens, shifted past BOS (1) and EOS (2)."""

    bos_token_id = 1
    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [3 + byte for byte in text.encode()]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}


class Rule:
    """20 ms frames, 8 of them per slot."""

    def frames(self, num_samples):
        return num_samples // 320

    def slots(self, num_samples):
        return num_samples // 320 // 8

    def slots_before(self, sample):
        return (sample + 1280) // 2560  # the middle of slot 0 is at 1280


def waveform(wave: np.ndarray) -> np.ndarray:
    return wave


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(samples) * 0.1).astype(np.float32)


def row(key: str, samples: int, flac: bytes | None = None) -> Row:
    about = {"text": f"text of {key}", "language": "en", "speaker": "s"}
    seed = sum(key.encode())
    members = {
        "flac": encode_flac(noise(samples, seed)) if flac is None else flac,
        "json": json.dumps(about).encode(),
    }
    return Row(key, members, {"num_samples": samples, **about})


def shards(folder: Path, sizes: list[int], longest: int = 16_000) -> ShardSet:
    """`sizes[s]` clips in shard s, of random lengths."""
    lengths = np.random.default_rng(len(sizes))
    for s, size in enumerate(sizes):
        rows = [row(f"k{s}-{n}", int(lengths.integers(3000, longest))) for n in range(size)]
        write_shard(folder / f"train-{s:06d}.tar", rows, FIELDS, {})
    return ShardSet.open(folder)


def target(number: int = 0, tokens: int = 3, finished: bool = True) -> dict:
    return {
        "instruction": f"say {number}",
        "template": "t",
        "ids": list(range(10, 10 + tokens)),
        "text": "x",
        "finished": finished,
    }


def targets(folder: Path, base: ShardSet, per_sample: int = 1) -> Overlay:
    """Targets in another order than the base's, in two shards."""
    keys = base.keys.to_pylist()[::-1]
    half = len(keys) // 2
    for number, part in enumerate((keys[:half], keys[half:])):
        records = (
            (key, {"targets": [target(n, tokens=len(key) + n) for n in range(per_sample)]})
            for key in part
        )
        write_overlay(
            folder / f"targets-{number:06d}.tar", records, meta={"teacher": "t"}, base=base
        )
    return Overlay.open(folder, base)
