"""Who may import whom, read from the imports themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest


def imports(path: Path) -> set[str]:
    """Names of all modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def offenders(root: Path, folder: str, banned: str, allowed: tuple[str, ...] = ()) -> list[str]:
    found = []
    for path in sorted((root / folder).rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name not in allowed and any(
            module == banned or module.startswith(f"{banned}.") for module in imports(path)
        ):
            found.append(name)
    return found


@pytest.mark.parametrize(
    ("folder", "banned", "allowed"),
    [
        ("train", "deepspeed", ("train/engine.py",)),
        ("data", "deepspeed", ()),
        # A model from code is run by MLflow, where there is no checkout, so it imports MLflow
        # itself; `test_a_model_from_code_needs_no_checkout` holds what else it may import.
        ("train", "mlflow", ("train/tracking.py", "train/tracked.py", "train/pyfunc.py")),
        ("data", "mlflow", ()),
        ("data", "train", ()),
        ("data", "examples", ()),
        ("train", "examples", ()),
        ("train", "soundfile", ()),
        ("data", "soundfile", ("data/audio.py",)),
        ("train/ops", "train.model", ()),
        ("train/ops", "data", ()),
        ("train/model", "train.engine", ()),
        ("train/model", "train.loop", ()),
        ("train/model", "train.tracking", ()),
        ("train", "fastapi", ("train/serving/app.py",)),
    ],
)
def test_dependencies_point_one_way(
    root: Path, folder: str, banned: str, allowed: tuple[str, ...]
) -> None:
    assert offenders(root, folder, banned, allowed) == []


def test_a_model_from_code_needs_no_checkout(root: Path) -> None:
    rooms = {name.partition(".")[0] for name in imports(root / "train/pyfunc.py")}
    assert rooms & {"train", "data", "examples", "tests"} == {"data"}


def test_an_import_in_the_wrong_room_is_seen(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "plan.py").write_text("def f():\n    from deepspeed import comm\n")
    assert offenders(tmp_path, "data", "deepspeed") == ["data/plan.py"]


def test_no_catch_all_modules(root: Path) -> None:
    names = [p.name for room in ("train", "data", "examples") for p in (root / room).rglob("*.py")]
    assert not {"utils.py", "helpers.py", "misc.py", "manager.py"} & set(names)
