"""The endpoint under many clients, beside the same requests one after another.

    python -m benchmarks.serving runs/micro/blsp new.wav --seconds 120 --json serving.json

Starts `train/serve.py` and asks it by the official client. First one client asks for a while, then
16 at once; every answer must be the one that a single request got. Memory is that of the server
process (resident), after each tenth of the time.
"""

from __future__ import annotations

import argparse
import base64
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import openai
import psutil

from benchmarks.report import Report
from tests.launch import free_port

CLIENTS = 16
INSTRUCTIONS = ("repeat the sentence", "translate to english")


@dataclass
class Load:
    """What some clients saw."""

    seconds: float
    answers: int = 0
    tokens: int = 0
    wrong: int = 0
    latencies: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    """Bytes of the server, in each tenth of the time."""


def ask(client: openai.OpenAI, name: str, audio: dict[str, Any], instruction: str) -> Any:
    content: Any = [{"type": "text", "text": instruction}, audio]
    return client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": content}]
    )


def press(
    client: openai.OpenAI,
    name: str,
    clips: list[dict[str, Any]],
    clients: int,
    seconds: float,
    server: psutil.Process,
) -> Load:
    """`clients` ask one question after another for so many seconds."""
    wanted = {
        (n, i): ask(client, name, clip, i).choices[0].message.content
        for n, clip in enumerate(clips)
        for i in INSTRUCTIONS
    }
    load, lock = Load(seconds), threading.Lock()
    until = time.monotonic() + seconds

    def go_on(number: int) -> None:
        at = number
        while time.monotonic() < until:
            question = (at % len(clips), INSTRUCTIONS[at // len(clips) % len(INSTRUCTIONS)])
            at += 1
            began = time.monotonic()
            try:
                found = ask(client, name, clips[question[0]], question[1])
            except openai.OpenAIError as e:
                with lock:
                    load.failures.append(str(e))
                continue
            with lock:
                load.latencies.append(time.monotonic() - began)
                load.answers += 1
                load.tokens += found.usage.completion_tokens
                load.wrong += found.choices[0].message.content != wanted[question]

    threads = [threading.Thread(target=go_on, args=(n,)) for n in range(clients)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for tenth in range(1, 11):
        time.sleep(max(0.0, began + seconds * tenth / 10 - time.monotonic()))
        load.memory.append(resident(server))
    for thread in threads:
        thread.join()
    load.seconds = time.monotonic() - began
    return load


def resident(server: psutil.Process) -> int:
    return int(server.memory_info().rss)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="what train/serve.py takes")
    parser.add_argument("audio", type=Path, nargs="+", help="WAV, FLAC or MP3 files")
    parser.add_argument("--seconds", type=float, default=120.0, help="of 16 clients")
    parser.add_argument("--seconds-alone", type=float, default=30.0, help="of one client")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    clips = [
        {
            "type": "input_audio",
            "input_audio": {
                "data": base64.b64encode(path.read_bytes()).decode(),
                "format": path.suffix[1:].lower(),
            },
        }
        for path in args.audio
    ]
    port = free_port()
    command = ["train/serve.py", str(args.model), "--port", str(port), "--name", "model"]
    process = subprocess.Popen([sys.executable, *command])
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120
    )
    report = Report("serving")
    try:
        while True:
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                if process.poll() is not None:
                    raise SystemExit(process.returncode) from None
                time.sleep(0.2)
        server = psutil.Process(process.pid)
        loads = {
            "one_at_a_time": press(client, "model", clips, 1, args.seconds_alone, server),
            "hearken": press(client, "model", clips, CLIENTS, args.seconds, server),
        }
    finally:
        process.terminate()
        process.wait()
    for name, load in loads.items():
        case = f"{len(clips)} clips, {CLIENTS} clients beside one"
        figures = {
            "answers_per_second": (load.answers / load.seconds, "1/s"),
            "tokens_per_second": (load.tokens / load.seconds, "1/s"),
            "median_latency": (median(load.latencies), "s"),
            "longest_latency": (max(load.latencies), "s"),
            "failures": (len(load.failures), "count"),
            "other_answers": (load.wrong, "count"),
        }
        for tenth, found in enumerate(load.memory, 1):
            figures[f"resident_after_{tenth}_tenths"] = (found / 1e6, "MB")
        for metric, (value, unit) in figures.items():
            report.add(case, name, metric, value, unit)
        for failure in load.failures[:3]:
            print(f"failed: {failure}", file=sys.stderr)
    print(report.markdown())
    if args.json:
        report.write(args.json)


if __name__ == "__main__":
    main()
