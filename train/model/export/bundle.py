"""The code that an exported folder brings along, for those who have no checkout.

transformers copies a model's code file by file, and takes in what `from .name import` names beside
it. So each module of the checkout that the model needs becomes one file `hearken_*.py`: the same
text, but for its imports from the checkout, which name the neighbour instead.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[3]

# Modules that need pydantic, peft or compiled code, and what stands in for them.
PLAIN = {
    "train.config": "train.model.export.plain.config",
    "train.model.lora": "train.model.export.plain.lora",
    "train.ops.library": "train.model.export.plain.library",
    "train.model.kernels": "train.model.export.plain.kernels",
}

# What config.json and processor_config.json name (`auto_map`).
ENTRIES = {
    "AutoConfig": ("train.model.export.configuration", "HearkenConfig"),
    "AutoModel": ("train.model.export.modeling", "HearkenModel"),
    "AutoProcessor": ("train.model.export.processing", "HearkenProcessor"),
}

_ROOMS = ("train", "data")


def auto_map(*kinds: str) -> dict[str, str]:
    """transformers' names of our classes in an exported folder."""
    return {kind: ".".join((file_of(ENTRIES[kind][0]), ENTRIES[kind][1])) for kind in kinds}


def write_code(folder: Path) -> list[Path]:
    """Write the code into `folder`; returns its files."""
    written = []
    for module in sorted(needed()):
        path = folder / f"{file_of(module)}.py"
        path.write_text(flat(module), encoding="utf-8")
        written.append(path)
    return written


def needed() -> set[str]:
    """Every module of the checkout that the entries need, directly or not."""
    found: set[str] = set()
    todo = [module for module, _ in ENTRIES.values()]
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            todo += [name for node in _imports(module) for name, _ in _modules(node)]
    return found


def file_of(module: str) -> str:
    """`train.ops.segments` → `hearken_ops_segments`."""
    short = module.removeprefix("train.").removeprefix("model.")
    return "hearken_" + short.replace(".", "_")


def source_of(module: str) -> Path:
    """The file that holds the module's text in an exported folder."""
    path = ROOT / PLAIN.get(module, module).replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def flat(module: str) -> str:
    """The module's text with its imports from the checkout made relative."""
    lines = source_of(module).read_text(encoding="utf-8").splitlines()
    for node in reversed(_imports(module)):
        indent = " " * node.col_offset
        made = [indent + line for line in _relative(node)]
        lines[node.lineno - 1 : node.end_lineno] = made
    return "\n".join(lines) + "\n"


def _imports(module: str) -> list[ast.ImportFrom]:
    """The module's imports from the checkout, in their order."""
    tree = ast.parse(source_of(module).read_text(encoding="utf-8"))
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in _ROOMS
    ]
    return sorted(found, key=lambda node: node.lineno)


def _modules(node: ast.ImportFrom) -> list[tuple[str, ast.alias | None]]:
    """Modules that an import needs, and the name it gives to one that it imports as a whole."""
    assert node.module
    whole = [a for a in node.names if _is_module(node.module, a.name)]
    found: list[tuple[str, ast.alias | None]] = [(f"{node.module}.{a.name}", a) for a in whole]
    if len(whole) < len(node.names):
        found.append((node.module, None))
    return found


@cache
def _is_module(package: str, name: str) -> bool:
    """Whether `from package import name` gives a module; what the package binds itself goes first,
    such as the function `ragged_conv1d` of `train.ops`."""
    folder = ROOT / package.replace(".", "/")
    if not ((folder / f"{name}.py").exists() or (folder / name / "__init__.py").exists()):
        return False
    bound = ast.walk(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    return all(
        alias.name != name or node.module == package
        for node in bound
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    )


def _relative(node: ast.ImportFrom) -> list[str]:
    lines = []
    for module, alias in _modules(node):
        name = file_of(module)
        if alias is not None:
            # transformers looks for the names of files in this form alone.
            lines.append(f"from .{name} import __name__ as _  # noqa: F401")
            lines.append(f"from . import {name} as {alias.asname or alias.name}")
            continue
        rest = [a for a in node.names if not _is_module(module, a.name)]
        given = ", ".join(a.name + (f" as {a.asname}" if a.asname else "") for a in rest)
        lines.append(f"from .{name} import {given}")
    return lines
