"""What the entry points share: arguments, and errors as one clear line.

Exit codes: 0 done, 1 a fault of ours (with its trace), 2 a fault the user can mend (one line),
75 stopped early and resumable: run the same command again.
"""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from transformers.utils.logging import disable_progress_bar

from data.archive import NO_ROOM, ShardError
from data.audio import AudioError
from data.augment import AugmentError
from data.ledger import LedgerError
from data.retry import ReadError
from data.tasks import TaskError
from data.templates import TemplateError
from train.checkpoint import CheckpointError, WriteError
from train.config import ConfigError
from train.exhaustion import OutOfMemory
from train.nonfinite import NonFinite
from train.owner import Superseded
from train.stopping import RESUMABLE, Stopped

MENDABLE = (
    ConfigError, CheckpointError, ShardError, AudioError, AugmentError, LedgerError, TaskError,
    TemplateError, OutOfMemory,
)  # fmt: skip

_LEFT_ALONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
_BEHIND = 3.0
"""Seconds that a rank whose peer has left goes after it. The launcher looks once a second, and ends
with the status of any rank that it then finds ended: it shall be the one that knows why."""

_TOGETHER = 15.0
"""Seconds that the other ranks give rank 0: more than it gives the tracker."""


def trusting(parser: argparse.ArgumentParser) -> None:
    """The argument of whatever loads a model by its checkpoint's own configuration."""
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with its models"
    )


def arguments(doc: str) -> argparse.ArgumentParser:
    """A parser with the arguments that every entry point takes, documented by its module."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file under configs/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=value",
        help="override one setting (the value is YAML); may be repeated",
    )
    # The deepspeed launcher adds this one; the environment has the same.
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def guarded(main: Callable[[], None]) -> int:
    """Run `main`; say what a user can mend in one line, on the rank that found it."""
    quiet_libraries()
    try:
        main()
    except MENDABLE as e:
        rank = os.environ.get("RANK", "0")
        where = f"error on rank {rank}" if rank != "0" else "error"
        for line in str(e).splitlines():
            print(f"{where}: {line}", file=sys.stderr, flush=True)
        return 2
    except (NonFinite, Superseded) as e:
        _say_once(f"error: {e}")
        return 2
    except WriteError as e:
        hint = "make room, or mend the disk, and run the same command again to continue"
        _say_once(f"stopped: {e}; {hint}")
        return RESUMABLE
    except ReadError as e:
        print(f"stopped: {e}; run the same command again to continue", file=sys.stderr, flush=True)
        return RESUMABLE
    except Stopped as e:
        print(f"stopped: {e}; run the same command again to continue", file=sys.stderr, flush=True)
        return RESUMABLE
    except OSError as e:
        if e.errno not in NO_ROOM:
            raise
        what = f"{e.filename or 'a file of the run'} could not be written: {e.strerror}"
        hint = "make room, and run the same command again to continue"
        print(f"stopped: {what}; {hint}", file=sys.stderr, flush=True)
        return RESUMABLE
    except RuntimeError as e:
        if not any(said in str(e) for said in _LEFT_ALONE):
            raise
        traceback.print_exc()
        time.sleep(_BEHIND)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return RESUMABLE
    return 0


def _say_once(line: str) -> None:
    """What all ranks have found together, said by rank 0. The launcher kills who is left when the
    first ends, and rank 0 may be taking leave of a tracker that is away: so the others wait."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
    else:
        time.sleep(_TOGETHER)


def leave(code: int) -> NoReturn:
    """End this process with `code`, without tearing the interpreter down.

    Threads of gloo and DeepSpeed outlive the process group; one that wants the interpreter while
    it is torn down aborts the process, after all went well (exit code -6, "terminate called
    without an active exception").
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def quiet_libraries() -> None:
    """Keep the libraries' own chatter (a page of it per rank) off the user's terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|transformers|deepspeed")
    logging.basicConfig(format="%(message)s")
    # What the code itself has to say (such as which ops it chose) is said once, not per rank.
    rank = os.environ.get("RANK", "0")
    logging.getLogger("train").setLevel(logging.INFO if rank == "0" else logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    disable_progress_bar()
    for name in ("DeepSpeed", "mlflow", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
