"""A web server with a folder of shards, for all hosts: `shards.py FOLDER PORT`.

While `slow` lies in the folder, nothing is answered.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tests.data.faulty import FaultyServer


class Server(FaultyServer):
    def wait(self) -> None:
        while (self.folder / "slow").exists():
            time.sleep(0.1)


if __name__ == "__main__":
    with Server(Path(sys.argv[1]), "0.0.0.0", int(sys.argv[2])) as server:
        server.serve_forever()
