"""What a step costs as ranks, clips and vocabulary grow, from the counts of `--dry-run`.

    python -m benchmarks.scaling [CONFIG] [--json FILE] [--peak 989e12] [--mfu 0.5] [--node 8]
                                 [--inside 450e9] [--between 50e9] [--disk 2e9]

Nothing is measured: seconds are operations / (peak x mfu) and bytes / bandwidth, the defaults being
H200s with NVLink (450 GB/s each way), one 400 Gb/s link per GPU between nodes of 8, and a disk of
2 GB/s. Names: the number of ranks, the seconds of a clip, the words of the vocabulary.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.report import Report
from train import config as cfg
from train.blueprint import Blueprint
from train.dryrun import counts
from train.engine import policy
from train.flops import Flops, Rows, sum_work
from train.footprint import ANSWER, PROMPT, SECONDS
from train.memory import Plan, total
from train.model import adapters
from train.model.encoder import front_end_of
from train.model.lengths import LengthRule

RANKS, CLIPS, WORDS = (8, 64, 1024), (2.0, 5.0, 12.0, 30.0), (32_000, 128_256, 250_880)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, nargs="?", default=Path("configs/blsp.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="A.B=V")
    parser.add_argument("--json", metavar="FILE")
    for name, default in {
        "peak": 989e12, "mfu": 0.5, "node": 8, "inside": 450e9, "between": 50e9, "disk": 2e9,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=float, default=default)
    options = parser.parse_args()
    model = Model(cfg.load(options.config, options.set))
    report = Report("scaling")
    rate = options.peak * options.mfu
    for ranks in RANKS:
        link = options.inside if ranks <= options.node else options.between
        by_ranks(report, f"{options.config.stem}: ranks", model, ranks, rate, link, options.disk)
    for seconds in CLIPS:
        by_parts(report, f"{options.config.stem}: seconds of a clip", model, seconds)
    for words in WORDS:
        by_words(report, f"{options.config.stem}: words of the vocabulary", model, words)
    print(report.markdown())
    if options.json:
        report.write(options.json)


class Model:
    """A config's counts, and the rows of a full bin of clips of one length."""

    def __init__(self, config: cfg.Config):
        self.config, self.policy = config, policy(config.train)
        self.parts = Blueprint.of(config.model, config.losses)
        self.flops = Flops(self.parts.encoder, self.parts.adapter, self.parts.decoder)
        self.counts = counts(self.parts)
        front = front_end_of(self.parts.encoder.model.config, config.model.encoder.path)
        self.rule = LengthRule(front, adapters.geometry(config.model.adapter))

    def bin(self, seconds: float = SECONDS) -> tuple[Rows, float]:
        """Rows of a bin full of such clips, and the seconds of all."""
        samples, data = round(seconds * 16_000), self.config.data
        frames, slots = int(self.rule.frames(samples)), int(self.rule.slots(samples))
        document = slots + PROMPT + ANSWER
        count = max(1, min(data.tokens_per_bin // document, int(data.seconds_per_bin / seconds)))
        encoder, heard = self.parts.encoder, frames
        if encoder.kind == "whisper" and not encoder.own_length:
            heard = encoder.model.config.max_source_positions
        rows = Rows((heard,) * count, (frames,) * count, (document,) * count, count * ANSWER)
        return rows, count * seconds


def by_ranks(
    report: Report, case: str, model: Model, ranks: int, rate: float, link: float, disk: float
) -> None:
    plan = Plan(model.config, model.policy, model.counts, ranks)
    rows, audio = model.bin()
    computed = sum_work(model.flops.of(rows).values()).total / rate
    moved = sum(plan.moved(1).values())
    name, add = str(ranks), report.add
    add(case, name, "states", total(plan.held()) / 1e9, "GB")
    add(case, name, "compute_of_a_micro_batch", 1000 * computed, "ms")
    add(case, name, "received_in_it", moved / 1e9, "GB")
    add(case, name, "communication_of_it", 1000 * moved / link, "ms")
    tokens = sum(rows.documents) * moved / link / computed
    add(case, name, "tokens_that_hide_it", tokens, "positions")
    binding = max(computed, moved / link)
    add(case, name, "audio_hours_per_hour", ranks * audio / binding, "1")
    add(case, name, "checkpoint", model.counts.trained * 12 / disk, "s")


def by_parts(report: Report, case: str, model: Model, seconds: float) -> None:
    rows, audio = model.bin(seconds)
    works = model.flops.of(rows)
    whole = sum_work(works.values()).total
    name = f"{seconds:g}"
    report.add(case, name, "operations_per_audio_second", whole / audio / 1e9, "GFLOP")
    report.add(case, name, "positions_per_audio_second", sum(rows.documents) / audio, "1")
    for part, work in works.items():
        report.add(case, name, part, 100 * work.total / whole, "%")


def by_words(report: Report, case: str, model: Model, words: int) -> None:
    """The head at the labels alone and at every position; a float32 copy of the latter's logits."""
    rows, _ = model.bin()
    works = model.flops.of(rows)
    now = model.parts.decoder.config.get_text_config().vocab_size
    others = sum_work(works[part] for part in ("encoder", "adapter", "decoder")).total
    labels = works["head"].total * words / now
    positions = sum(rows.documents)
    everywhere = labels * positions / rows.head
    name = str(words)
    report.add(case, name, "head_at_labels", 100 * labels / (others + labels), "%")
    report.add(case, name, "head_everywhere", 100 * everywhere / (others + everywhere), "%")
    report.add(case, name, "logits_everywhere", 4 * positions * words / 1e9, "GB")


if __name__ == "__main__":
    main()
