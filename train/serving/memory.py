"""A CPU server's memory, level from its first minutes on.

Each batch has a shape of its own, and what torch prepares for a shape it keeps: oneDNN its compiled
layers, and ideep, between the two, a thousand entries. glibc keeps a heap for each thread.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

_ENTRIES = "16"
_HEAPS = 2
_M_ARENA_MAX = -8  # of malloc.h


def bound_caches() -> None:
    """Keep few shapes and heaps; what the environment says goes first.

    Before the first operation: later on the caches do not look.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _ENTRIES)
    os.environ.setdefault("LRU_CACHE_CAPACITY", _ENTRIES)
    if "MALLOC_ARENA_MAX" not in os.environ:
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _HEAPS)
