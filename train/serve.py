"""An OpenAI-compatible server for a trained model.

    python train/serve.py runs/micro/blsp --port 8000
    python train/serve.py exported --name my-model

MODEL is a run's output folder, one of its checkpoints, or a folder of `train/export.py`. It answers
`/v1/chat/completions`, with recordings as `input_audio` parts. There is no password: it listens to
this machine alone, unless `--host` says otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

import uvicorn

from train.cli import guarded, trusting
from train.progress import console
from train.serving.app import Served, make_app
from train.serving.batcher import Batcher
from train.serving.limits import Limits
from train.serving.memory import bound_caches
from train.serving.model import open_model


def main(argv: list[str] | None = None) -> None:
    usual = Limits()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="run.output, a checkpoint, or an exported folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--name", help="of the model, for clients; the folder's if not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-batch", type=int, default=usual.batch, help="requests at once")
    parser.add_argument("--max-queue", type=int, default=usual.queue, help="requests in hand")
    parser.add_argument("--max-tokens", type=int, default=usual.tokens, help="of one answer")
    parser.add_argument("--max-seconds", type=float, default=usual.seconds, help="of one request")
    parser.add_argument(
        "--max-audio-seconds", type=float, default=usual.audio_seconds, help="in one request"
    )
    parser.add_argument("--max-megabytes", type=float, default=32.0, help="of one request")
    trusting(parser)
    args = parser.parse_args(argv)
    limits = Limits(
        body_bytes=int(args.max_megabytes * 2**20),
        audio_seconds=args.max_audio_seconds,
        tokens=args.max_tokens,
        seconds=args.max_seconds,
        queue=args.max_queue,
        batch=args.max_batch,
    )
    if args.device == "cpu":
        bound_caches()
    model, processor = open_model(args.model, args.device, args.trust_remote_code)
    name = args.name or args.model.resolve().name
    batcher = Batcher(model, processor, limits)
    served = Served(name, processor, batcher, limits, int(time.time()))
    console.print(f"{name}: http://{args.host}:{args.port}/v1 (Ctrl-C ends it)")
    with contextlib.suppress(KeyboardInterrupt):  # which ends it as it should
        uvicorn.run(
            make_app(served),
            host=args.host,
            port=args.port,
            log_level="warning",
            timeout_graceful_shutdown=5,
        )
    batcher.close()


if __name__ == "__main__":
    sys.exit(guarded(main))
