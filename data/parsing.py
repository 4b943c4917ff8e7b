"""JSON and YAML from strangers: a value, or one `ValueError` with one line, whatever comes in."""

import json
import reprlib
from typing import Any

import yaml

_DEEPEST = 100
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
_short.maxlevel = 3


def parse_json(text: str | bytes) -> Any:
    """A JSON value, in UTF-8; raises `ValueError` where it is none, or nested without end."""
    try:
        value = json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {_line(error)}") from None
    if _deeper_than(_DEEPEST, value):  # json writes less deep than it reads
        raise ValueError(f"not JSON of ours: nested deeper than {_DEEPEST}")
    return value


def parse_yaml(text: str | bytes, loader: Any = yaml.SafeLoader) -> Any:
    """A YAML value, of plain types alone; raises `ValueError` where it is none.

    Args:
        loader: `SafeLoader`, or one made from it.
    """
    assert issubclass(loader, yaml.SafeLoader)
    try:
        return yaml.load(text if isinstance(text, str) else text.decode("utf-8"), loader)
    # Beside YAMLError, what PyYAML's own constructors run into: dates such as 2001-13-45, tags
    # without a value, nesting without end.
    except (
        yaml.YAMLError, ValueError, RecursionError, TypeError, LookupError, AttributeError,
    ) as error:  # fmt: skip
        raise ValueError(f"not YAML: {_line(error)}") from None


def brief(value: Any) -> str:
    """A value as a message shows it: short, whatever it is, and however often it holds itself."""
    return _short.repr(value)


def _deeper_than(most: int, value: Any) -> bool:
    level = [value]
    for _ in range(most):
        nested = [each for each in level if isinstance(each, dict | list)]
        if not nested:
            return False
        level = [
            child
            for each in nested
            for child in (each.values() if isinstance(each, dict) else each)
        ]
    return True


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
