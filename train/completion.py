"""Completes Hearken's commands in bash: their names, options and choices, and the keys of --set.

    python -m train.completion > ~/.hearken-completion    # then, in .bashrc: source that file

Made from the commands' own parsers, so make it again after an update.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import shtab

from train import config as cfg

PROGRAMS = ("python", "python3", "deepspeed", "torchrun")
_ROOT = Path(__file__).parent.parent
_USAGE = re.compile(
    r"(?:python -m|python|deepspeed)(?: --hostfile \w+)? ((?:train|data)[./][\w.]+)"
)
_KEYS = "_hearken_keys"


class _Parser(Exception):
    """What a command was about to parse its arguments with."""


def commands() -> dict[str, argparse.ArgumentParser]:
    """Command, as its own first line of usage spells it -> its parser."""
    found = {}
    for folder in ("data", "train"):
        for path in sorted(Path(_ROOT, folder).glob("*.py")):
            if path.name != Path(__file__).name and "def main(" in path.read_text():
                module = import_module(f"{folder}.{path.stem}")
                if usage := _USAGE.search(module.__doc__ or ""):
                    found[usage[1]] = _parser_of(module.main)
    return found


def script() -> str:
    """All of it, for bash."""
    # One parser that has the commands as its own: how they are started makes no difference.
    root = argparse.ArgumentParser("python", add_help=False)
    root.add_argument("-m", action="store_true")
    under = root.add_subparsers()
    for name, parser in commands().items():
        first = (parser.description or name).partition("\n")[0]  # without any, shtab hides it
        _hints(under.add_parser(name, parents=[parser], add_help=False, help=first))
    keys = " ".join(f"{key}=" for key in sorted(set(setting_names(cfg.Config))))
    preamble = (
        f'{_KEYS}() {{\n  compopt -o nospace 2>/dev/null\n  compgen -W "{keys}" -- "$1"\n}}\n'
    )
    made = shtab.complete(root, "bash", "hearken", preamble)
    registered = "complete -o bashdefault -F _shtab_hearken python"
    assert registered in made
    programs = " ".join(PROGRAMS)
    return made.replace(
        registered, f"complete -o bashdefault -o default -F _shtab_hearken {programs}"
    )


def setting_names(section: Any, above: str = "") -> Iterator[str]:
    """Every `a.b.c` that --set takes: of a union those of all choices, some of them twice."""
    for key, kind in cfg.types(section).items():
        below = [o for o in (kind, *cfg.options(kind)) if cfg.types(o)]
        if not below:
            yield above + key
        for each in below:
            yield from setting_names(each, f"{above}{key}.")


def _parser_of(main: Any) -> argparse.ArgumentParser:
    def reached(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
        raise _Parser(self)

    before = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = reached  # type: ignore[method-assign]
    try:
        main()
    except _Parser as found:
        return found.args[0]
    finally:
        argparse.ArgumentParser.parse_args = before  # type: ignore[method-assign]
    raise AssertionError(f"{main.__module__}: parses no arguments")


def _hints(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if "--set" in action.option_strings:
            action.complete = {"bash": _KEYS}  # type: ignore[attr-defined]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):  # where libraries may say what they like
        made = script()
    print(made)


if __name__ == "__main__":
    main()
