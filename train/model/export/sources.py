"""Which pretrained encoder and LLM an adapter belongs to: names, and hashes of their weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transformers.utils import cached_file

from train.config import ConfigError

# In the order in which transformers looks for them.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def fingerprint(path: str) -> dict[str, str]:
    """File name → SHA-256 of every weight file of a model.

    Raises:
        ConfigError: there is no such model, or it has no weights.
    """
    return {name: _sha256(file) for name, file in weight_files(path).items()}


def weight_files(path: str) -> dict[str, Path]:
    """File name → every weight file of a model: a local folder, or a name on the hub.

    Raises:
        ConfigError: there is no such model, or it has no weights.
    """
    for name in _WEIGHTS:
        index = _found(path, f"{name}.index.json")
        if index is not None:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        elif _found(path, name) is not None:
            names = [name]
        else:
            continue
        found = {part: _found(path, part) for part in names}
        if missing := [part for part, file in found.items() if file is None]:
            raise ConfigError(f"{path} lacks {', '.join(missing)}, which its index names")
        return {part: file for part, file in found.items() if file is not None}
    raise ConfigError(f"no model at {path!r}: expected {' or '.join(_WEIGHTS)} there")


def check(part: str, path: str, expected: dict[str, str]) -> None:
    """Compare the model at `path` with the one that an adapter was trained upon.

    Args:
        part: `encoder` or `decoder`.
    Raises:
        ConfigError: it is another one, or is not there.
    """
    fix = f"name the right one: from_pretrained(..., {part}=PATH)"
    try:
        found = fingerprint(path)
    except ConfigError as e:
        raise ConfigError(f"the adapter's {part} is not there: {e}; {fix}") from None
    if sorted(found.values()) == sorted(expected.values()):
        return
    name = next((n for n in expected if found.get(n) != expected[n]), next(iter(expected), ""))
    raise ConfigError(
        f"the adapter belongs to another {part} than {path!r}: {name} has SHA-256 "
        f"{found.get(name, 'none')[:12]}, expected {expected.get(name, 'none')[:12]}; {fix}"
    )


def _found(path: str, name: str) -> Path | None:
    try:
        file = cached_file(
            path,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except OSError:
        return None
    return Path(file) if file is not None else None


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
