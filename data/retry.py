"""Trying again what the disk, the network or a worker refused, and then giving up in one line."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds


class ReadError(OSError):
    """Given up after several tries, for now: the run stops and can be resumed when it is mended."""


def retried(read: Callable[[], T], what: Callable[[], str]) -> T:
    """`read()`, tried again after growing pauses where the system refuses it.

    Raises `ReadError`, beginning with `what()`, once the last try has failed.
    """
    for pause in (*PAUSES, None):
        try:
            return read()
        except OSError as error:
            if isinstance(error, ReadError):
                raise
            if pause is None:
                raise ReadError(
                    f"{what()} could not be read in {len(PAUSES) + 1} tries: {error}; resume the "
                    "run once it can be"
                ) from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")
