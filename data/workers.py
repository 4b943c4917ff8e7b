"""Items of a data set, read in order by worker processes that may die.

What a worker raises comes back as it was, in one line. A worker that is killed (out of memory,
say) is replaced and its items are read again, since the position is a number; if that happens
again and again without progress, it is a `ReadError`. Nobody waits for ever.
"""

import pickle
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from data import retry
from data.retry import ReadError

_LOOK_SECONDS = 1.0  # how often the workers are looked after while an item is waited for
_HANG_SECONDS = 900.0  # longer than any chain of retries within an item


@dataclass
class _Raised:
    """An error on its way out of a worker."""

    error: Exception


class _Guarded(Dataset):
    """Items of `inner`, or the error that reading one raised."""

    def __init__(self, inner: Dataset):
        self._inner = inner

    def __getitem__(self, n: int) -> Any:
        try:
            return self._inner[n]
        except Exception as error:
            if not isinstance(error, ValueError | OSError):  # a fault of ours: say where
                error.add_note(traceback.format_exc())
            return _Raised(_sendable(error))


def in_workers(items: Any, workers: int, prefetch: int) -> Iterator[Any]:
    """`items[0], items[1], ...` to the last, read ahead by `workers` processes.

    Raises what an item raises, and `ReadError` where workers keep dying.
    """
    done, deaths = 0, 0
    while done < len(items):
        left = Subset(_Guarded(items), range(done, len(items)))
        try:
            for item in _loader(left, workers, prefetch):
                if isinstance(item, _Raised):
                    raise item.error
                done, deaths = done + 1, 0
                yield item
        except _WorkerDied as death:
            if deaths == len(retry.PAUSES):
                raise ReadError(
                    f"data workers died {deaths + 1} times at the same place, the last with: "
                    f"{death}; is memory short? Lower data.workers or data.prefetch and resume "
                    "the run"
                ) from None
            time.sleep(retry.PAUSES[deaths])
            deaths += 1


class _WorkerDied(Exception):
    pass


def _loader(items: Dataset, workers: int, prefetch: int) -> Iterator[Any]:
    loader: DataLoader = DataLoader(
        items,
        batch_size=None,
        shuffle=False,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=torch.cuda.is_available(),
        timeout=_LOOK_SECONDS if workers else 0,
    )
    before = signal.getsignal(signal.SIGCHLD)
    found = iter(loader)
    if workers and threading.current_thread() is threading.main_thread():
        # torch's handler would raise wherever the main thread is just then, amid a step of the
        # optimizer perhaps. The death is noticed all the same when the next item is asked for.
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    asked = time.monotonic()
    while True:
        try:
            item = next(found)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            if "timed out" in str(error) and time.monotonic() - asked < _HANG_SECONDS:
                continue  # all workers live
            # Items never raise, so this is the loader's own: a death, or what it left half sent.
            raise _WorkerDied(" ".join(str(error).split())) from None
        yield item
        asked = time.monotonic()


def _sendable(error: Exception) -> Exception:
    """`error`, or a plain one of its words where it does not pickle: else it would be lost."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
