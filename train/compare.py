"""Put the results of several evaluations side by side: means, with intervals over seeds.

    python -m train.compare runs/blsp-1.json runs/blsp-2.json runs/blsp-3.json
    python -m train.compare blsp=runs/blsp-1.json blsp=runs/blsp-2.json asr=runs/asr-1.json

Files of one name are seeds of one system, and each system is a column. With two or more seeds a
figure is their mean, and the interval Student's 95 % one of that mean; with one it is the file's
own, over utterances.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from scipy.stats import t

from train.cli import guarded
from train.config import ConfigError
from train.generalisation import generalisation
from train.progress import console
from train.report import write_json
from train.scores import Cell

_OF_ROWS = ("task", "language", "input", "wording", "metric")
_OF_GENERAL = ("trained", "language", "input", "column", "metric")


def over_seeds(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean of one figure's values, and Student's 95 % interval of it; None for a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    half = float(t.ppf(0.975, len(values) - 1)) * error
    return mean, mean - half, mean + half


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a result file.

    Raises:
        ConfigError: it is missing, or no such file.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        for row in rows:
            [row[name] for name in (*_OF_ROWS, "trained", "value", "low", "high")]
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{path} is no result of train/evaluate.py --json ({e!r})") from None
    return rows


def compare(
    seeds: dict[str, list[list[dict[str, Any]]]], fields: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Rows {*fields, system, value, low, high, seeds}, in the order of their fields.

    Args:
        seeds: system → its seeds' rows, which have `fields`, and `value`, `low` and `high`.
    Raises:
        ConfigError: a figure is not in all seeds of its system.
    """
    found: dict[tuple[tuple[str, ...], str], list[dict[str, Any]]] = defaultdict(list)
    for system, files in seeds.items():
        for rows in files:
            for row in rows:
                found[tuple(row[name] for name in fields), system].append(row)
    made = []
    for (name, system), rows in sorted(found.items()):
        if len(rows) != len(seeds[system]):
            raise ConfigError(
                f"{' '.join(name)} is in {len(rows)} of the {len(seeds[system])} results of "
                f"{system!r}; they are not of one evaluation"
            )
        value, low, high = over_seeds([row["value"] for row in rows])
        if len(rows) == 1:
            low, high = rows[0]["low"], rows[0]["high"]
        facts = dict(zip(fields, name, strict=True))
        made.append(
            {**facts, "system": system, "value": value, "low": low, "high": high}
            | {"seeds": len(rows)}
        )
    return made


def print_rows(
    title: str, rows: list[dict[str, Any]], fields: tuple[str, ...], systems: list[str]
) -> None:
    table = Table(title=title)
    for name in fields:
        table.add_column(name)
    for system in systems:
        table.add_column(system, justify="right")
    lines: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for row in rows:
        interval = f" [{row['low']:.1f}, {row['high']:.1f}]" if row["low"] is not None else ""
        lines[tuple(row[name] for name in fields)][row["system"]] = f"{row['value']:.1f}{interval}"
    for line, cells in lines.items():
        # `[` would begin a style.
        table.add_row(*line, *(cells.get(s, "").replace("[", r"\[") for s in systems))
    console.print(table)


def named(text: str) -> tuple[str, Path]:
    """`NAME=FILE`, or a file whose system is called `value`."""
    name, sep, path = text.partition("=")
    return (name, Path(path)) if sep else ("value", Path(text))


def run(args: argparse.Namespace) -> None:
    seeds: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
    general: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
    for system, path in map(named, args.results):
        rows = read(path)
        seeds[system].append(rows)
        # Intervals of means over tasks need resamples, which the file has not.
        general[system].append(generalisation([Cell(row, np.empty(0)) for row in rows]))
    compared = compare(seeds, _OF_ROWS)
    benchmark = compare(general, _OF_GENERAL)

    def shown(row: dict[str, Any]) -> bool:
        wording = row.get("wording", args.wording[0])  # the benchmark's columns are its own
        return (
            row["language"] in args.language
            and row["input"] in args.input
            and wording in args.wording
        )

    systems = list(seeds)
    print_rows("scores", list(filter(shown, compared)), _OF_ROWS, systems)
    print_rows("generalisation", list(filter(shown, benchmark)), _OF_GENERAL, systems)
    if args.json is not None:
        write_json(args.json, compared + benchmark)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", metavar="[NAME=]FILE", help="from evaluate --json")
    parser.add_argument("--language", nargs="+", default=["all"], help="shown (default: all)")
    parser.add_argument("--input", nargs="+", default=["speech"], help="shown (default: speech)")
    parser.add_argument(
        "--wording", nargs="+", default=["all"], help="shown of the scores (default: all)"
    )
    parser.add_argument("--json", type=Path, help="write all rows as JSON, too")
    run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(guarded(main))
