"""The tutorial's commands, run as they stand in the page."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT, environment

pytestmark = pytest.mark.slow

_COMMANDS = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def script(page: Path) -> str:
    """All of a page's `sh` blocks, one after another: what one shell would be given."""
    return "set -euxo pipefail\n" + "".join(_COMMANDS.findall(page.read_text()))


def test_the_tutorial_runs_as_it_stands() -> None:
    """From the micro world's corpus (made before by test_demo.py, else here) to an answer."""
    for folder in ("build/tutorial", "runs/tutorial"):
        shutil.rmtree(ROOT / folder, ignore_errors=True)
    # A page's `python` is that of the environment that the tests run in, wherever it lies.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script(ROOT / "docs/tutorial.md")], cwd=ROOT,
        env=environment() | {"PATH": path}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:]
    rows = json.loads((ROOT / "runs/tutorial/evaluation.json").read_text())
    assert {row["input"] for row in rows} == {"speech", "text", "cascade", "shuffled", "none"}
    assert all(row["count"] for row in rows)
    # The endpoint's answer is the command line's, which came last before the export.
    (served,) = re.findall(r"^served: (.*)$", done.stdout, re.MULTILINE)
    assert f"\n{served}\n+ python train/export.py" in done.stdout
    # What the page says of its pictures of samples.
    assert re.search(r"<slots 0-\d+> .*\[.+\]", done.stdout)
    report = (ROOT / "runs/tutorial/report.html").read_text()
    assert "tutorial-evaluation" in report
