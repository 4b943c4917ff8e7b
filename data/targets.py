"""The record of stage 1: what the frozen LLM answered to a transcript.

`KEY.targets.json` is `{"targets": [target, ...]}`, one or more of

    {"instruction": str, "template": str, "ids": [int, ...], "text": str, "finished": bool,
     "filtered": str}

`ids` are the answer's tokens without EOS; `finished` says that the LLM ended it with EOS, rather
than being cut at the token limit; `filtered`, where it is there, why the answer is not to be
trained. The index repeats `num_tokens` (EOS included; 0 for an answer that is filtered or has no
ids, which is nothing to learn from) and `instruction` per target, so that planning opens no tar.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from data.archive import ContentError
from data.words import WORD_FIELDS, word_columns


@dataclass(frozen=True)
class Target:
    """One answer of the LLM."""

    instruction: str
    template: str
    ids: tuple[int, ...]
    text: str
    finished: bool
    filtered: str = ""


def parse_targets(record: Mapping[str, Any]) -> list[Target]:
    """The targets of a record; raises `ContentError` naming the field that is wrong."""
    found = record.get("targets")
    if not isinstance(found, list) or not found:
        raise ContentError("'targets' must be a non-empty list")
    return [_parse(raw, number) for number, raw in enumerate(found)]


def _parse(raw: Any, number: int) -> Target:
    kinds = {"instruction": str, "template": str, "ids": list, "text": str, "finished": bool}
    for field, kind in kinds.items():
        value = raw.get(field) if isinstance(raw, dict) else None
        if not isinstance(value, kind):
            raise ContentError(
                f"target {number}: {field!r} must be {kind.__name__}, but is {value!r:.40}"
            )
    if not isinstance(raw.get("filtered", ""), str):
        raise ContentError(f"target {number}: 'filtered' must be str, if it is there")
    if not all(type(token) is int and 0 <= token < 1 << 31 for token in raw["ids"]):
        raise ContentError(f"target {number}: 'ids' must be token ids from 0 to 2^31")
    own = {field: raw[field] for field in kinds} | {"ids": tuple(raw["ids"])}
    return Target(**own, filtered=raw.get("filtered", ""))


def _index_columns(record: Mapping[str, Any]) -> dict[str, Any]:
    targets = parse_targets(record)
    return {
        "num_tokens": [len(t.ids) + t.finished if t.ids and not t.filtered else 0 for t in targets],
        "instruction": [target.instruction for target in targets],
    }


Columns = Callable[[Mapping[str, Any]], dict[str, Any]]
# What the index of each kind of overlay repeats from its records: types, and how to get them.
INDEXED: dict[str, tuple[dict[str, pa.DataType], Columns]] = {
    "targets.json": (
        {"num_tokens": pa.list_(pa.int32()), "instruction": pa.list_(pa.string())},
        _index_columns,
    ),
    "words.json": (WORD_FIELDS, word_columns),
}
