"""Long clips in overlapping windows, for encoders that hear only so much at once.

Whisper's window is 30 s; the others have none, but attention over minutes wants memory and is
nothing they were trained on. Neighbours share two seconds, and each frame is taken from the window
that knows more of what lies around it: they part in the middle of what they share.
"""

from __future__ import annotations

OVERLAP = 100
"""Frames of 20 ms that two windows share."""


def starts(count: int, window: int) -> list[int]:
    """The first frame of each window of at most `window` frames that together cover `count`."""
    if count <= window:
        return [0]
    return list(range(0, count - OVERLAP, window - OVERLAP))


def kept(count: int, window: int) -> list[slice]:
    """Of each window's own frames those that are taken; together they are all `count`, once."""
    begins = starts(count, window)
    cuts = [0, *(begin + OVERLAP // 2 for begin in begins[1:]), count]
    return [slice(cuts[k] - begin, cuts[k + 1] - begin) for k, begin in enumerate(begins)]
