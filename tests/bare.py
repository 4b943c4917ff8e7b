"""A Python that has transformers and torch alone: no checkout, and nothing else of ours."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import re
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

ROOTS = ("torch", "transformers", "numpy")


def distributions(*roots: str) -> dict[str, metadata.Distribution]:
    """These packages and all that they declare to need, without extras."""
    found: dict[str, metadata.Distribution] = {}
    todo = list(roots)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # of another platform
        needs = [Requirement(text) for text in found[name].requires or ()]
        todo += [n.name for n in needs if n.marker is None or n.marker.evaluate({"extra": ""})]
    return found


def site(folder: Path) -> Path:
    """A folder of links to them, for `sys.path`."""
    folder.mkdir()
    for found in distributions(*ROOTS).values():
        for file in found.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(Path(str(found.locate_file(top))))
    return folder


def run(folder: Path, code: str, *args: str | Path, cwd: Path) -> str:
    """What `code` prints, in a process that sees the packages in `folder` alone."""
    prepared = f"import sys; sys.path.append({str(folder)!r})\n{code}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", prepared, *map(str, args)],
        cwd=cwd, text=True, timeout=300, capture_output=True,
        env={
            "PATH": os.environ["PATH"], "HOME": str(cwd), "HF_HOME": str(cwd / "hf"),
            "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout
