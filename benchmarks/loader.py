"""Measures the data loader: resume, throughput, packing, memory, planning.

    python -m benchmarks.loader [--json FILE] [--quick] [--case TEXT]

Names: `hearken` ours; `webdataset`, `datasets` (Hugging Face, streaming) and `lhotse` (Shar) read
the same clips, decode them (lhotse with its own decoder, the others with ours) and collate them
with our collator, in batches of a fixed count; none of them has an exact resume to compare.
`greedy`: first fit in random order; `padded`: batches of random samples, as many as the budget
holds when padded to their longest. Rivals that are not installed are left out, and said so.

Clips are made on the spot, with LibriSpeech-like lengths; those of resume, packing and planning
are lengths only. Rounds of one case are taken in turn; figures are medians.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.report import Report
from data.archive import Row, index_path, write_shard
from data.audio import SAMPLE_RATE, decode, encode_flac
from data.collate import Batch, Sample, collate
from data.plan import Plan
from data.prompts import Prompt
from data.shards import Overlay, ShardSet, write_overlay
from data.stats import measure_packing
from data.stream import Stream, make_clip
from data.targets import parse_targets
from tests.data.made import FIELDS, ByteTokenizer, Rule, waveform

TOKENS_PER_BIN, SECONDS_PER_BIN = 2048, 600.0
CLIPS_PER_BATCH = 16
INSTRUCTION = "Continue the following sentence in a coherent style"
PROMPT = Prompt(ByteTokenizer(), "U: {instruction}: {input} A: ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="a tenth of the sizes, one round")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    options = parser.parse_args()
    report = Report("loader")
    for case in (resume, throughput, packing, memory, planning):
        if options.case in case.__name__:
            with tempfile.TemporaryDirectory() as folder:
                case(report, Path(folder), options.quick)
    print(report.markdown())
    if options.json:
        report.write(options.json)


def librispeech_samples(count: int, seed: int = 0) -> np.ndarray:
    """[count] int64: lengths drawn like LibriSpeech's: 1.3-35 s, 12.3 s on average."""
    draw = np.random.default_rng(seed)
    long = draw.random(count) < 0.6
    seconds = np.where(long, draw.normal(14.6, 1.2, count), draw.triangular(1.3, 8, 17, count))
    return (np.clip(seconds, 1.3, 35) * SAMPLE_RATE).astype(np.int64)


def answer_tokens(samples: np.ndarray, seed: int = 1) -> np.ndarray:
    """[N] int64: tokens of answers about as long as what was said, at most 128."""
    more = np.random.default_rng(seed).integers(0, 40, len(samples))
    return np.clip(samples // SAMPLE_RATE * 3 + more, 8, 128)


def clips(folder: Path, count: int, mean_seconds: float, per_shard: int) -> list[str]:
    """`count` clips with targets; returns addresses of tars that hold both, for the rivals."""
    samples = librispeech_samples(count)
    samples = np.maximum(4800, samples * mean_seconds / 12.3).astype(np.int64)
    tokens = answer_tokens(samples)
    voice = np.random.default_rng(0).standard_normal(35 * SAMPLE_RATE) * 0.02
    voice *= 1 + np.sin(np.arange(len(voice)) / 1600)  # loud and low, as speech is
    joint = []
    for first in range(0, count, per_shard):
        rows, both = [], []
        for n in range(first, min(first + per_shard, count)):
            about = {"text": f"clip {n}", "language": "en", "speaker": "s"}
            length = int(samples[n])
            at = n * 997 % (len(voice) - length) if length < len(voice) else 0
            flac = encode_flac(voice[at : at + length])
            columns = {"num_samples": length, **about}
            members = {"flac": flac, "json": json.dumps(about).encode()}
            target = json.dumps(record(int(tokens[n]))).encode()
            rows.append(Row(f"k{n:07d}", members, columns))
            both.append(Row(f"k{n:07d}", {"sound": flac, "targets.json": target}, columns))
        number = f"{first // per_shard:06d}.tar"
        write_shard(folder / "s" / number, rows, FIELDS, {})
        write_shard(folder / "joint" / number, both, FIELDS, {})
        joint.append(str(folder / "joint" / number))
    base = ShardSet.open(folder / "s")
    records = ((key, record(int(tokens[int(key[1:])]))) for key in base.keys.to_pylist())
    write_overlay(folder / "t" / "000000.tar", records, base=base)
    return joint


def record(tokens: int) -> dict[str, Any]:
    target = {"instruction": INSTRUCTION, "template": "t", "ids": list(range(10, 9 + tokens))}
    return {"targets": [{**target, "text": "", "finished": True}]}


def stream(folder: Path, kind: type[Stream] = Stream, workers: int = 0, **more: Any) -> Stream:
    base = ShardSet.open(folder / "s")
    budgets = {"tokens_per_bin": TOKENS_PER_BIN, "seconds_per_bin": SECONDS_PER_BIN}
    budgets |= {"bins_per_step": 1, **more}
    return kind.build(
        base, Overlay.open(folder / "t", base), PROMPT, Rule(), waveform,
        seed=0, workers=workers, **budgets,
    )  # fmt: skip


class Undecoded(Stream):
    """Reads nothing: every clip is one second of silence. For indexes without their tars."""

    def read(self, i: int, target: int, epoch: int) -> Sample:
        clip = make_clip(np.zeros(SAMPLE_RATE, np.float32), self.rule, self.featurize)
        document = (*PROMPT.with_speech("", clip.slots), PROMPT.answer([1], True))
        return Sample(self.shards.key(i), document, clip)


def resume(report: Report, folder: Path, quick: bool) -> None:
    """From nothing to the first batch, so many steps into an epoch of a made index."""
    shards, per_shard = (100, 1000) if quick else (1000, 1000)
    samples = librispeech_samples(shards * per_shard)
    made_index(folder, samples, per_shard)
    steps = (10, 1000, 10_000) if quick else (10, 1000, 100_000)
    taken: dict[int, list[float]] = {step: [] for step in steps}
    next(stream(folder, Undecoded, tokens_per_bin=1024).steps(0))  # the disk's cache is warm then
    for _ in range(1 if quick else 3):
        for step in steps:
            started = time.perf_counter()
            found = next(stream(folder, Undecoded, tokens_per_bin=1024).steps(0, step))
            taken[step].append(time.perf_counter() - started)
            assert found[0].step == step
    for step in steps:
        case = f"resume, index of {len(samples):,} samples"
        metric = f"resume_at_{step}_steps_seconds"
        report.add(case, "hearken", metric, statistics.median(taken[step]), "s")
    most = max(map(statistics.median, taken.values()))
    ratio = most / min(map(statistics.median, taken.values()))
    report.add(case, "hearken", "slowest_over_fastest", ratio, "x")


def made_index(folder: Path, samples: np.ndarray, per_shard: int) -> None:
    """Indexes of shards and targets whose tars are empty but for their size."""
    tokens = answer_tokens(samples)
    for first in range(0, len(samples), per_shard):
        rows = np.arange(first, min(first + per_shard, len(samples)))
        keys, shas = pa.array([f"k{n:07d}" for n in rows]), pa.array(["0"] * len(rows))
        where = pa.array(rows * 512)
        flac = {"flac_offset": where, "flac_size": where, "num_samples": samples[rows]}
        targets = {
            "num_tokens": pa.array([[n] for n in tokens[rows]], pa.list_(pa.int32())),
            "instruction": pa.array([[INSTRUCTION]] * len(rows)),
            "targets_json_offset": where,
            "targets_json_size": where,
        }
        for name, columns in (("s", flac), ("t", targets)):
            tar = folder / name / f"{first // per_shard:06d}.tar"
            tar.parent.mkdir(exist_ok=True)
            tar.touch()
            meta = {"format": 1, "tar_bytes": 0, "tar_sha256": f"{first:064x}"}
            table = pa.table({"key": keys, "sha": shas, "base_sha": shas, **columns})
            table = table.replace_schema_metadata({b"hearken": json.dumps(meta).encode()})
            pq.write_table(table, index_path(tar))


def throughput(report: Report, folder: Path, quick: bool) -> None:
    """Samples per second, decoded and collated, of an epoch from its start, workers' too."""
    count = 200 if quick else 600
    joint = clips(folder, count, 12.3, 100)
    shar = folder / "shar"
    for workers in (0, 2):
        ours = stream(folder, workers=workers)
        runs: dict[str, Callable[[], Iterator[Batch]]] = {
            "hearken": lambda ours=ours: (b for step in ours.steps(0) for b in step),
            "webdataset": lambda n=workers: loaded(web_batches(joint), n),
        }
        if has("datasets"):
            runs["datasets"] = lambda n=workers: loaded(hugging_face_batches(joint), n)
        if has("lhotse"):
            if not shar.exists():
                write_shar(shar, ours, count)
            runs["lhotse"] = lambda n=workers: loaded(lhotse_batches(shar), n)
        speeds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(1 if quick else 5):
            for name, run in runs.items():
                started = time.perf_counter()
                seen = sum(len(batch.keys) for batch in run())
                speeds[name].append(seen / (time.perf_counter() - started))
                assert seen == count, f"{name}: {seen} of {count} samples"
        for name, found in speeds.items():
            case = f"throughput, {workers} workers, {count} clips"
            report.add(case, name, "samples_per_second", statistics.median(found), "1/s")


def has(package: str) -> bool:
    if importlib.util.find_spec(package):
        return True
    print(f"{package} is not installed: left out")
    return False


def collated(samples: list[tuple[str, np.ndarray, bytes]]) -> Batch:
    """What `Stream` makes of a bin, for rivals: (key, wave, targets.json)."""
    made = []
    for key, wave, raw in samples:
        target = parse_targets(json.loads(raw))[0]
        clip = make_clip(wave, Rule(), waveform)
        heard = PROMPT.with_speech(target.instruction, clip.slots)
        made.append(Sample(key, (*heard, PROMPT.answer(target.ids, target.finished)), clip))
    return collate(made)


def whole(flac: bytes) -> np.ndarray:
    return decode(flac, max_seconds=40)


def loaded(batches: Any, workers: int) -> Iterator[Batch]:
    """Batches through torch's loader, as all of these pipelines are used."""
    ahead = 4 if workers else None
    return iter(DataLoader(batches, None, num_workers=workers, prefetch_factor=ahead))


def web_batches(tars: list[str]) -> Any:
    def ready(sample: dict[str, Any]) -> tuple[str, np.ndarray, bytes]:
        return sample["__key__"], whole(sample["sound"]), sample["targets.json"]

    shards = webdataset.WebDataset(tars, shardshuffle=100, seed=0).shuffle(1000)
    return shards.map(ready).batched(CLIPS_PER_BATCH, collation_fn=collated)


class Batched(IterableDataset):
    """(key, wave, targets.json) of `samples()` in batches."""

    def __init__(self, samples: Callable[[], Iterator[tuple[str, np.ndarray, bytes]]]):
        self.samples = samples

    def __iter__(self) -> Iterator[Batch]:
        samples = self.samples()
        while batch := list(islice(samples, CLIPS_PER_BATCH)):
            yield collated(batch)


def hugging_face_batches(tars: list[str]) -> Any:
    from datasets import load_dataset

    # Of a member named .flac it would want to decode itself, by torchcodec.
    rows = load_dataset("webdataset", data_files=tars, split="train", streaming=True)
    rows = rows.shuffle(seed=0, buffer_size=1000)

    def samples() -> Iterator[tuple[str, np.ndarray, bytes]]:
        for row in rows:
            target = row["targets.json"]
            raw = target if isinstance(target, bytes) else json.dumps(target).encode()
            yield row["__key__"], whole(row["sound"]), raw

    return Batched(samples)


def write_shar(folder: Path, ours: Stream, count: int) -> None:
    """The same clips as lhotse's Shar: FLAC in tars, targets among the cuts."""
    from lhotse import MonoCut, Recording
    from lhotse.shar import SharWriter

    folder.mkdir()
    with SharWriter(str(folder), fields={"recording": "flac"}, shard_size=100) as writer:
        for i in range(count):
            flac, key = ours.shards.read(i, "flac"), ours.shards.key(i)
            recording = Recording.from_bytes(flac, recording_id=key)
            custom = {"target": json.dumps(ours.targets.record(i))}
            writer.write(MonoCut(key, 0, recording.duration, 0, recording=recording, custom=custom))


def lhotse_batches(folder: Path) -> Any:
    from lhotse import CutSet

    cuts = CutSet.from_shar(
        in_dir=str(folder), shuffle_shards=True, seed=0, split_for_dataloading=True
    )

    def samples() -> Iterator[tuple[str, np.ndarray, bytes]]:
        for cut in cuts.shuffle(buffer_size=1000):
            yield cut.id, cut.load_audio()[0], cut.target.encode()

    return Batched(samples)


def packing(report: Report, _: Path, quick: bool) -> None:
    """How full bins are, and how even those of a step, over an epoch."""
    samples = librispeech_samples(28_000 if quick else 281_241)  # as many as LibriSpeech has
    tokens = Rule().slots(samples) + answer_tokens(samples) + 60
    for budget, bins in ((TOKENS_PER_BIN, 8), (8192, 16)):
        plan = Plan(
            np.arange(len(samples)) // 1000, tokens, samples,
            seed=0, tokens_per_bin=budget, seconds_per_bin=3600.0, bins_per_step=bins,
        )  # fmt: skip
        found = measure_packing(plan, tokens, budget)
        case = f"packing, {len(samples):,} samples, {budget} tokens, {bins} bins a step"
        report.add(case, "hearken", "token_budget_used", found.efficiency, "share")
        report.add(case, "hearken", "mean_imbalance", found.mean_imbalance, "share")
        report.add(case, "hearken", "max_imbalance", found.max_imbalance, "share")
        order = np.random.default_rng(0).permutation(len(tokens))
        for name, loads in (
            ("greedy", first_fit(tokens[order], budget, window=16_000)),
            ("padded", padded(tokens[order], budget)),
        ):
            report.add(case, name, "token_budget_used", loads.mean() / budget, "share")
            steps = loads[: len(loads) // bins * bins].reshape(-1, bins)
            over = steps.max(1) / steps.mean(1) - 1
            report.add(case, name, "mean_imbalance", over.mean(), "share")
            report.add(case, name, "max_imbalance", over.max(), "share")


def first_fit(tokens: np.ndarray, budget: int, window: int) -> np.ndarray:
    """Loads of bins that take each sample where it first fits, window by window."""
    closed: list[np.ndarray] = []
    for first in range(0, len(tokens), window):
        loads = np.zeros(window, dtype=np.int64)
        for cost in tokens[first : first + window].tolist():
            loads[np.argmax(loads + cost <= budget)] += cost
        closed.append(loads[loads > 0])
    return np.concatenate(closed)


def padded(tokens: np.ndarray, budget: int) -> np.ndarray:
    """Useful tokens of batches of random samples that are padded to their longest."""
    loads, longest, members, useful = [], 0, 0, 0
    for cost in tokens.tolist():
        if max(longest, cost) * (members + 1) > budget:
            loads.append(useful)
            longest, members, useful = 0, 0, 0
        longest, members, useful = max(longest, cost), members + 1, useful + cost
    return np.array([*loads, useful])


def memory(report: Report, folder: Path, quick: bool) -> None:
    """Resident memory after a tenth of the samples and after all of them."""
    count, goal = 500, 10_000 if quick else 100_000
    clips(folder, count, 1.0, 100)
    ours, seen, epoch, marks = stream(folder), 0, 0, {}
    while seen < goal:
        for step in ours.steps(epoch):
            seen += sum(len(batch.keys) for batch in step)
        epoch += 1
        for mark in (goal // 10, goal // 2, goal):
            if seen >= mark:
                marks.setdefault(mark, resident())
    case = f"memory, {goal:,} samples"
    for mark, found in marks.items():
        report.add(case, "hearken", f"resident_after_{mark}_bytes", found, "B")
    report.add(case, "hearken", "growth", marks[goal] / marks[goal // 10] - 1, "share")


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def planning(report: Report, _: Path, quick: bool) -> None:
    """An epoch of 10 M samples, in a process of its own, whose peak memory is told."""
    count = 1_000_000 if quick else 10_000_000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds, peak = pool.apply(_plan, (count,))
    for metric, value, unit in (("planning_seconds", seconds, "s"), ("peak_bytes", peak, "B")):
        report.add(f"planning, {count:,} samples", "hearken", metric, value, unit)


def _plan(count: int) -> tuple[float, int]:
    samples = librispeech_samples(count)
    tokens = Rule().slots(samples) + answer_tokens(samples) + 60
    started = time.perf_counter()
    plan = Plan(
        np.arange(count) // 1000, tokens, samples,
        seed=0, tokens_per_bin=8192, seconds_per_bin=600.0, bins_per_step=16,
    )  # fmt: skip
    plan.steps_in_epoch(0)
    seconds = time.perf_counter() - started
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
