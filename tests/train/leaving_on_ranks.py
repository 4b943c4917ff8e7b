"""The last rank has something to say to the user, and leaves; the others wait for it in vain.

deepspeed tests/train/leaving_on_ranks.py
"""

from __future__ import annotations

from train.cli import guarded, leave
from train.config import ConfigError
from train.engine import world


def main() -> None:
    with world() as here:
        here.sum(1.0)
        if here.rank == here.size - 1:
            raise ConfigError("mend this")
        here.sum(1.0)


if __name__ == "__main__":
    leave(guarded(main))
