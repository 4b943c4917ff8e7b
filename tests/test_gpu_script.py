"""benchmarks/gpu.sh, with an interpreter that only notes what it is asked to run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.report import Report, merged
from benchmarks.step_cases import MIXES, SIZES

# Benchmarks leave a report of one row, those of `broken` none; reports are really joined.
STUB = """#!{python}
import os, sys
from pathlib import Path
here, given = Path({here!r}), sys.argv[1:]
if given[:2] == ["-m", "benchmarks.report"]:
    os.execv({python!r}, [{python!r}, *given])
with (here / "asked").open("a") as asked:
    print(*given, file=asked)
if "--json" in given:
    target = Path(given[given.index("--json") + 1])
    if target.stem == (here / "broken").read_text():
        sys.exit("it broke")
    target.write_text((here / "report.json").read_text().replace("NAME", target.stem))
"""


class Script:
    """The script, its folder of results, and what it asked of the interpreter."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder, self.out = root, folder, folder / "out"
        self.python = folder / "python"
        self.python.write_text(STUB.format(python=sys.executable, here=str(folder)))
        self.python.chmod(0o755)
        report = Report("NAME")
        report.add("one case", "hearken", "seconds", 1.5, "s")
        report.write(folder / "report.json")

    def __call__(self, *sections: str, broken: str = "") -> subprocess.CompletedProcess[str]:
        (self.folder / "broken").write_text(broken)
        return subprocess.run(
            ["bash", self.root / "benchmarks/gpu.sh", self.out, *sections],
            env={"PATH": "/usr/bin:/bin", "PYTHON": str(self.python)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def asked(self) -> list[str]:
        return (self.folder / "asked").read_text().splitlines()

    def left(self) -> set[str]:
        return {path.stem for path in self.out.glob("*.json")}


@pytest.fixture
def script(root: Path, tmp_path: Path) -> Script:
    return Script(root, tmp_path)


def test_all_sections_run_where_none_is_named(script: Script) -> None:
    assert script().returncode == 0
    sizes = ("mms-1b-bloomz-7b1", "whisper-large-llama-8b")
    assert set(sizes) <= set(SIZES)
    steps = {f"step-{size}-{mix}" for size in sizes for mix in MIXES}
    assert script.left() == {"ops", "loss", "memory-zero2", "memory-zero3", *steps}
    asked = " ".join(script.asked())
    for path in (
        "csrc/build.py",
        "csrc/resources.py",
        "tests/ops",
        "tests/train/test_kernels.py",
        "tests/train/test_runs.py",
    ):
        assert path in asked
        assert (script.root / path).exists()


def test_sections_in_several_commands_make_one_table(script: Script) -> None:
    assert script("ops", "step:mms-1b-bloomz-7b1:blsp").returncode == 0
    assert script("loss").returncode == 0
    assert [line.split()[1] for line in script.asked()] == [
        "benchmarks.ops", "benchmarks.step", "benchmarks.loss",
    ]  # fmt: skip
    assert script.left() == {"ops", "loss", "step-mms-1b-bloomz-7b1-blsp"}
    table = (script.out / "gpu.md").read_text()
    assert table == merged([script.out]) + "\n"
    assert all(f"**{name}: one case**" in table for name in script.left())
    assert (script.out / "gpu.log").read_text().count("== ") == 3


def test_what_breaks_leaves_the_others(script: Script) -> None:
    done = script("ops", "loss", broken="ops")
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    assert script.left() == {"loss"}


def test_a_section_that_is_not_there_is_told_before_any_runs(script: Script) -> None:
    done = script("ops", "lost")
    assert done.returncode == 2
    assert "has no section lost" in done.stdout
    assert not script.left()
