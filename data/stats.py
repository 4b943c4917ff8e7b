"""`python -m data.stats SHARDS`: hours, lengths, languages, and how well they pack.

    python -m data.stats shards/train*.tar --seconds-per-bin 60
    python -m data.stats shards/train*.tar --histogram lengths.png

Packing is planned as training would, under the given budgets; without targets to count, by audio
seconds alone. `--histogram FILE.png` draws the lengths, by language where there are several.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from data.audio import SAMPLE_RATE
from data.plan import Plan
from data.shards import ShardSet

_SHOWN = 12  # languages in the histogram, the others together


@dataclass(frozen=True)
class Packing:
    """How one epoch fills its bins.

    `efficiency` is the share of the budget that the bins with anything in them use, `imbalance`
    how much a step's fullest bin exceeds its mean (whole steps only), `padded_efficiency` what as
    many samples a batch would use if all were padded to the longest of it.
    """

    steps: int
    efficiency: float
    mean_imbalance: float
    max_imbalance: float
    padded_efficiency: float


def measure_packing(plan: Plan, costs: np.ndarray, budget: float, epoch: int = 0) -> Packing:
    """Measure a plan's bins by `costs` [N], of which `budget` fit into one."""
    bins = [bin for step in plan.iterate(epoch) for bin in step]
    used = np.array([costs[bin].sum() for bin in bins], dtype=np.float64)
    longest = np.array([len(bin) * costs[bin].max() for bin in bins if len(bin)], dtype=np.float64)
    steps = used.reshape(-1, plan.bins_per_step)
    whole = steps[(steps > 0).all(axis=1)]
    over = whole.max(axis=1) / whole.mean(axis=1) - 1 if len(whole) else np.zeros(1)
    filled = used[used > 0]
    return Packing(
        steps=len(steps),
        efficiency=float(filled.sum() / (budget * len(filled))) if len(filled) else 0.0,
        mean_imbalance=float(over.mean()),
        max_imbalance=float(over.max()),
        padded_efficiency=float(filled.sum() / longest.sum()) if longest.any() else 0.0,
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the figures; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        shards = ShardSet.open(options.shards)
        if not len(shards):
            raise ValueError(f"{shards.shard_name(0)}: no samples")
        plan = Plan(
            shards.shard_of,
            np.zeros(len(shards), np.int64),
            shards.num_samples,
            seed=options.seed,
            tokens_per_bin=1,
            seconds_per_bin=options.seconds_per_bin,
            bins_per_step=options.bins_per_step,
            window_shards=options.window_shards,
            refused=shards.lost,
        )
        console = Console()
        console.print(_languages(shards))
        console.print(_packing(plan, shards, options.seconds_per_bin))
        for i, reason in plan.skipped(0):
            print(f"data.stats: does not fit: {shards.key(i)}: {reason}", file=sys.stderr)
        if options.histogram:
            _draw(shards, options.histogram)
    except (ValueError, OSError) as error:
        print(f"data.stats: {error}", file=sys.stderr)
        return 1
    return 0


def _languages(shards: ShardSet) -> Table:
    """A row per language: samples, hours, and how long samples are."""
    table = Table(
        "language", "samples", "hours", "min s", "5 %", "median", "95 %", "max s", title="Lengths"
    )
    seconds = shards.num_samples / SAMPLE_RATE
    of = _per_language(shards)
    groups = [(name, seconds[of == name]) for name in sorted(set(of.tolist()))]
    for name, lengths in [*groups, ("all", seconds)] if len(groups) > 1 else groups:
        marks = np.percentile(lengths, [0, 5, 50, 95, 100])
        hours = f"{lengths.sum() / 3600:.2f}"
        table.add_row(name, str(len(lengths)), hours, *(f"{mark:.2f}" for mark in marks))
    return table


def _packing(plan: Plan, shards: ShardSet, seconds_per_bin: float) -> Table:
    found = measure_packing(plan, shards.num_samples / SAMPLE_RATE, seconds_per_bin)
    table = Table("", "", title=f"Packing into bins of {seconds_per_bin:g} s", show_header=False)
    table.add_row("steps an epoch", str(found.steps))
    table.add_row("bins filled to", f"{found.efficiency:.2%}")
    table.add_row("the same batches, padded", f"{found.padded_efficiency:.2%}")
    table.add_row("fullest bin of a step over its mean, on average", f"{found.mean_imbalance:.2%}")
    table.add_row("... and at most", f"{found.max_imbalance:.2%}")
    table.add_row("samples that do not fit", str(len(plan.skipped(0))))
    return table


def _draw(shards: ShardSet, path: Path) -> None:
    """A stacked histogram of lengths as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    seconds, of = shards.num_samples / SAMPLE_RATE, _per_language(shards)
    names, counts = np.unique(of, return_counts=True)
    first = names[np.argsort(-counts, kind="stable")][:_SHOWN].tolist()
    groups = {name: seconds[of == name] for name in first}
    if len(names) > len(first):
        groups["others"] = seconds[~np.isin(of, first)]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    edges = np.linspace(0, float(seconds.max()), 61)
    axes.hist(list(groups.values()), bins=edges.tolist(), stacked=True, label=list(groups))
    axes.set_xlabel("seconds")
    axes.set_ylabel("samples")
    axes.set_title(f"{len(seconds)} samples, {seconds.sum() / 3600:.2f} h")
    if len(groups) > 1:
        axes.legend(ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)


def _per_language(shards: ShardSet) -> np.ndarray:
    return np.array([name or "unknown" for name in shards.languages.to_pylist()])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.stats",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", nargs="+", help="tar shards: paths, folders, globs, {a..b}")
    parser.add_argument("--histogram", type=Path, metavar="FILE.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds-per-bin", type=float, default=60.0)
    parser.add_argument("--bins-per-step", type=int, default=8)
    parser.add_argument("--window-shards", type=int, default=16)
    return parser


if __name__ == "__main__":
    sys.exit(main())
