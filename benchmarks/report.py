"""What every benchmark writes: one JSON format, one table.

`{"machine": …, "versions": …, "commit": …, "rows": [{"benchmark", "case", "name", "metric",
"value", "unit"}]}`, where `name` is "hearken" for ours, "floor" for the limit, else the rival.

    python -m benchmarks.report PATH ...

prints the tables of files in that format, and of all such files in folders, as one Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchaudio", "transformers", "deepspeed", "flash-attn", "webdataset")


class Report:
    """Collects rows of one benchmark, then prints them and writes them."""

    def __init__(self, benchmark: str) -> None:
        self.benchmark = benchmark
        self.rows: list[dict[str, Any]] = []

    def add(self, case: str, name: str, metric: str, value: float, unit: str) -> None:
        self.rows.append(
            {
                "benchmark": self.benchmark,
                "case": case,
                "name": name,
                "metric": metric,
                "value": value,
                "unit": unit,
            }
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
            "rows": self.rows,
        }

    def write(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.as_dict(), indent=1) + "\n")

    def markdown(self) -> str:
        return markdown(self.rows)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """One table per case: a line per name, a column per metric."""
    lines: list[str] = []
    for case in _unique(f"{row['benchmark']}: {row['case']}" for row in rows):
        of_case = [row for row in rows if f"{row['benchmark']}: {row['case']}" == case]
        metrics = _unique(f"{row['metric']} ({row['unit']})" for row in of_case)
        lines += [
            f"**{case}**",
            "",
            "| |" + "|".join(metrics) + "|",
            "|---" * (len(metrics) + 1) + "|",
        ]
        for name in _unique(row["name"] for row in of_case):
            values = {
                f"{row['metric']} ({row['unit']})": f"{row['value']:.4g}"
                for row in of_case
                if row["name"] == name
            }
            lines.append(f"|{name}|" + "|".join(values.get(m, "") for m in metrics) + "|")
        lines.append("")
    return "\n".join(lines)


def merged(paths: Sequence[Path]) -> str:
    """What reports say, one after another, under a line for each that says where it was taken."""
    files = [f for p in paths for f in (sorted(p.glob("*.json")) if p.is_dir() else [p])]
    reports = {file.name: json.loads(file.read_text()) for file in files}
    taken = [
        f"- {name}: {report['machine']['gpu'] or report['machine']['cpu']}, commit "
        f"{report['commit']}, torch {report['versions']['torch']}, {report['machine']['date']}"
        for name, report in reports.items()
    ]
    rows = [row for report in reports.values() for row in report["rows"]]
    return "\n".join([*taken, "", markdown(rows)])


def machine() -> dict[str, Any]:
    """Where the figures were taken, and how busy it was then."""
    import torch  # here: joining reports takes no seconds

    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The revision that was measured, with `+` where files differ from it."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True
            )
        except OSError:  # a machine without git: what was measured there still counts
            return ""
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def _unique(items: Any) -> list[str]:
    return list(dict.fromkeys(items))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    print(merged(parser.parse_args().paths))
