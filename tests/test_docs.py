"""What the docs name is there: files, modules, commands and their options, keys of a config."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.launch import ROOT
from train import config as cfg

# Not the log: it tells of what is no more.
PAGES = [ROOT / "README.md", *sorted(p for p in ROOT.glob("docs/**/*.md") if p.stem != "log")]
_FOLDERS = "train|data|csrc|configs|docs|tests|examples|benchmarks"
_SECTIONS = "|".join(cfg.Config.model_fields)

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`([^`\n]+)`")
_FILE = re.compile(
    rf"(?<![\w./-])(?:{_FOLDERS})/[\w./-]*\.(?:py|sh|md|yaml|json|cpp|h|txt|sbatch)\b"
)
_DOTTED = re.compile(rf"(?<![\w./-])(?:{_FOLDERS}|{_SECTIONS})\.(?!py\b)[a-z_][\w.]*\w\b(?!\()")
_COMMAND = re.compile(r"(?:python3? (?:-m )?|deepspeed (?:--\w+ \S+ )*)([\w./]+)((?:[^`\n]|\\\n)*)")
_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]*)(?:#[\w-]*)?\)")


def code(text: str) -> list[str]:
    """What a page has in backticks and in fenced blocks, but for those of Python."""
    fenced = [m[2] for m in _FENCE.finditer(text) if m[1] != "python"]  # whose names are its own
    return [*fenced, *_SPAN.findall(_FENCE.sub("", text))]


def is_module(name: str) -> bool:
    return Path(ROOT, name.replace(".", "/")).with_suffix(".py").exists() or (
        Path(ROOT, name.replace(".", "/"), "__init__.py").exists()
    )


def is_key(name: str) -> bool:
    """Whether `name` is a key of a config, through all choices of its unions."""
    section: list[object] = [cfg.Config]
    for part in name.split("."):
        found = [known[part] for s in section if part in (known := cfg.types(s))]
        section = [leaf for s in found for leaf in (s, *cfg.options(s))]
        if not found:
            return False
    return True


def is_known(name: str) -> bool:
    """A key of a config, a module, or something that a module's file names (`data.x.NAME`)."""
    if is_key(name) or is_module(name):
        return True
    *module, last = name.split(".")
    path = Path(ROOT, *module).with_suffix(".py")
    return path.exists() and re.search(rf"\b{last}\b", path.read_text()) is not None


def missing(text: str) -> list[str]:
    """What a page names in code and is not there."""
    found = []
    for piece in code(text):
        found += [file for file in _FILE.findall(piece) if not Path(ROOT, file).exists()]
        found += [name for name in _DOTTED.findall(_FILE.sub("", piece)) if not is_known(name)]
        for script, rest in _COMMAND.findall(piece.replace("\\\n", " ")):
            path = Path(ROOT, script if script.endswith(".py") else script.replace(".", "/"))
            path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
            if script.split("/")[0].split(".")[0] not in _FOLDERS.split("|") or not path.exists():
                continue  # a file that is not there was found above
            known = path.read_text() + Path(ROOT, "train/cli.py").read_text()
            options = re.findall(r"(?<=\s)--[a-z][\w-]*", rest.partition(" -- ")[0])
            found += [f"{script} {o}" for o in options if o != "--help" and f'"{o}"' not in known]
    return found


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_what_a_page_names_is_there(page: Path) -> None:
    assert missing(page.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in _LINK.findall(page.read_text()) if link and ":" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_is_in_the_site() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {str(p.relative_to(ROOT / "docs")) for p in ROOT.glob("docs/**/*.md")}


@pytest.mark.parametrize(
    "wrong",
    [
        "`train/nowhere.py`",
        "`train.lrate`",
        "`model.adapter.stride`",
        "`data.nowhere`",
        "```\ndeepspeed --num_accelerators 2 train/main.py my.yaml --no-such-option\n```",
        "`python -m data.view SHARDS --no-such-option 3`",
    ],
)
def test_a_wrong_name_is_seen(wrong: str) -> None:
    assert missing(wrong)


ENTRIES = [
    path.relative_to(ROOT)
    for folder in ("train", "data")
    for path in sorted(Path(ROOT, folder).glob("*.py"))
    if '__name__ == "__main__"' in path.read_text() and path.name != "view.py"
]


@pytest.mark.parametrize("entry", ENTRIES, ids=map(str, ENTRIES))
def test_every_command_is_listed(entry: Path) -> None:
    names = f"{entry}", f"-m {entry.with_suffix('').as_posix().replace('/', '.')}"
    listed = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/commands.md").read_text(), re.MULTILINE)
    assert any(name in row for row in listed for name in names)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.parts[0] == "train"], ids=str)
def test_every_help_has_an_example(entry: Path) -> None:
    """`--help` shows the module's docstring as it stands."""
    text = (ROOT / entry).read_text()
    names = f"{entry}", entry.with_suffix("").as_posix().replace("/", ".")
    said = ast.get_docstring(ast.parse(text)) or ""
    examples = re.findall(r"^    ((?:python|deepspeed) .*)$", said, re.MULTILINE)
    assert any(name in example for example in examples for name in names)
    assert "RawDescriptionHelpFormatter" in text or "arguments(__doc__" in text
