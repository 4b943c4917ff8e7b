"""What the columns of an index must be, whoever wrote it."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data.archive import ShardError, key_fault

_TEXT, _COUNT = pa.string(), pa.int64()
_COUNTS, _TEXTS = pa.list_(pa.int32()), pa.list_(pa.string())
_TYPES: dict[str, pa.DataType] = {
    "key": _TEXT,
    "sha": _TEXT,
    "base_sha": _TEXT,
    "text": _TEXT,
    "language": _TEXT,
    "speaker": _TEXT,
    "num_samples": _COUNT,
    "num_tokens": _COUNTS,
    "instruction": _TEXTS,
    "word_starts": _COUNTS,
    "word_ends": _COUNTS,
    "unspelled": _TEXTS,
    "unaligned": _TEXT,
}
_MAY_LACK = {"text", "speaker"}
_KEY = r"^[^./\x00-\x1f\x7f]([^.\x00-\x1f\x7f]*[^./\x00-\x1f\x7f])?$"
_LARGEST = 1 << 40
"""Of any count: samples of two years, or a terabyte."""


def check_column(values: pa.ChunkedArray, name: str, where: str) -> None:
    """Raises `ShardError` unless `values` can be the column `name` of the index `where`."""
    placed = name.endswith(("_offset", "_size"))
    expected = _COUNT if placed else _TYPES.get(name)
    if expected is None:
        return

    def refuse(what: str) -> None:
        raise ShardError(f"{where}: column {name!r} {what}; build the shard again")

    if values.type != expected:
        refuse(f"is {values.type}, expected {expected}")
    values.validate(
        full=True
    )  # lengths, and that text is UTF-8: pyarrow takes a file's word for it
    inner: Any = pc.list_flatten(values) if pa.types.is_list(expected) else values
    if (values.null_count or inner.null_count) and name not in _MAY_LACK:
        refuse("has gaps")
    if pa.types.is_integer(inner.type) and len(inner):
        least, most = pc.min_max(inner).as_py().values()
        if least < (-1 if name.endswith("_offset") else 0) or most > _LARGEST:
            refuse(f"has values from {least} to {most}")
    if name == "key":
        bad = pc.index(pc.match_substring_regex(inner, _KEY), False).as_py()
        if bad >= 0:
            refuse(f"has a bad {key_fault(inner[bad].as_py())}")
