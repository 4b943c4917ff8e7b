"""Each rank sees a folder of checkpoints of its own, as on a file system with stale listings.

deepspeed tests/train/disagreeing_on_ranks.py ROOT
"""

from __future__ import annotations

import sys
from pathlib import Path

from train import checkpoint as ckpt
from train.cli import guarded, leave
from train.engine import world
from train.main import agreed


def main() -> None:
    root = Path(sys.argv[-1])
    with world() as here:
        agreed(here, root, lambda: ckpt.newest(root / str(here.rank)))
        print("all the same", flush=True)


if __name__ == "__main__":
    leave(guarded(main))
