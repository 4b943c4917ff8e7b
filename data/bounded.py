"""A stranger's program in this process, for so long and with so much memory."""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class _OutOfTime(BaseException):
    """Not an `Exception`, so that what runs inside cannot take it for one of its own."""


@contextmanager
def bounded(seconds: float, num_bytes: int) -> Iterator[None]:
    """Raises `TimeoutError` after `seconds` inside, and `MemoryError` where it takes more memory.

    Signals go to the main thread alone; in others nothing is bounded but the memory.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        most = int(file.read().split()[0]) * resource.getpagesize() + num_bytes
    limits = [limit for limit in (most, soft, hard) if limit != resource.RLIM_INFINITY]
    timed = threading.current_thread() is threading.main_thread()
    if timed:
        handler = signal.signal(signal.SIGALRM, _alarm)
        timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    except _OutOfTime:
        raise TimeoutError(f"more than {seconds:g} s") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        if timed:
            signal.setitimer(signal.ITIMER_REAL, *timer)
            signal.signal(signal.SIGALRM, handler)


def _alarm(number: int, frame: FrameType | None) -> None:
    raise _OutOfTime
