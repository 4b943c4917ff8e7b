"""The teacher on a server: transformers' own, and one that fails on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from transformers.cli.serve import Serve

from data.retry import ReadError
from tests.launch import free_port
from tests.train.conftest import Workspace
from tests.train.test_behave import digests, records, run, stage
from train import config as cfg
from train.model.build import load_tokenizer
from train.teachers.openai import Client
from train.teachers.part import Question


class Faulty(ThreadingHTTPServer):
    """Completes `PROMPT` as `PROMPT done`; `faults` are taken from the front, one per request.

    An int is an HTTP status, a pair a status with `Retry-After`; "stall" answers nothing, "drop"
    closes, "cut" is an answer at the token limit.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults: list[Any] = []
        self.requests: list[tuple[float, dict[str, Any], str]] = []
        self.at_once = self.most_at_once = 0
        self.pause = 0.0
        self.closing = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Faulty
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((time.monotonic(), body, self.headers.get("Authorization", "")))
            fault = server.faults.pop(0) if server.faults else None
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        server.closing.wait(60 if fault == "stall" else server.pause)
        with server.lock:
            server.at_once -= 1
        if fault in ("stall", "drop"):
            self.close_connection = True
            return
        status, wait = fault if isinstance(fault, tuple) else (fault, None)
        if isinstance(status, int):
            reply: dict[str, Any] = {"error": {"message": f"fault {status}\nof two lines"}}
        else:
            choice = {
                "index": 0, "text": f"{body['prompt']} done", "logprobs": None,
                "finish_reason": "length" if fault == "cut" else "stop",
            }  # fmt: skip
            reply = {"id": "1", "object": "text_completion", "created": 0, "model": "m",
                     "choices": [choice]}  # fmt: skip
        data = json.dumps(reply).encode()
        self.send_response(status if isinstance(status, int) else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if wait is not None:
            self.send_header("Retry-After", str(wait))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server() -> Iterator[Faulty]:
    with Faulty() as made:
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        yield made
        made.closing.set()
        made.shutdown()


def client(server: Faulty, **settings: Any) -> Client:
    about = cfg.Server(url=server.url, **({"timeout_seconds": 3.0, "retries": 2} | settings))
    return Client(
        about, "llm", lambda text: [len(word) for word in text.split()],
        max_new_tokens=6, temperature=0.0,
    )  # fmt: skip


def questions(count: int) -> list[Question]:
    return [Question("p", n, (1,), f"{'x' * (n + 1)} y", f"a/{n}") for n in range(count)]


def answers(made: Client, count: int) -> dict[int, tuple[tuple[int, ...], bool]]:
    found = {}
    for answered in made.answers([questions(count)], 1):
        for question, answer in answered:
            assert question.number not in found
            found[question.number] = (answer.ids, answer.finished)
    return found


def test_answers_are_of_their_questions_and_concurrent(server: Faulty) -> None:
    server.pause = 0.3
    server.faults = ["cut"]
    found = answers(client(server, concurrent=4), 12)
    assert {n: ids for n, (ids, _) in found.items()} == {n: (n + 1, 1, 4) for n in range(12)}
    assert sum(not finished for _, finished in found.values()) == 1
    assert server.most_at_once == 4
    assert all(body["max_tokens"] == 6 and body["model"] == "llm" for _, body, _ in server.requests)


@pytest.mark.parametrize("fault", [429, 500, 503, "stall", "drop"])
def test_what_may_pass_is_tried_again(server: Faulty, fault: Any) -> None:
    server.faults = [fault, fault]
    assert answers(client(server, concurrent=1), 2)[0] == ((1, 1, 4), True)
    assert len(server.requests) == 4
    pauses = [b[0] - a[0] for a, b in zip(server.requests, server.requests[1:], strict=False)]
    assert pauses[0] > 0.3
    assert pauses[1] > 0.6  # growing


def test_it_waits_as_long_as_it_is_told(server: Faulty) -> None:
    server.faults = [(429, 2)]
    answers(client(server), 1)
    assert server.requests[1][0] - server.requests[0][0] >= 2


def test_what_does_not_pass_stops_the_run_resumably(server: Faulty) -> None:
    server.faults = [503] * 3
    with pytest.raises(ReadError, match=r"^http://127.*/v1: HTTP 503 in 3 tries: "):
        answers(client(server), 1)
    server.faults = ["stall"]
    with pytest.raises(ReadError, match=r"/v1: APITimeoutError.* in 1 tries"):
        answers(client(server, retries=0, timeout_seconds=0.2), 1)


def test_answers_that_came_before_a_refusal_was_seen_are_kept(
    server: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(asked: Iterable[Future[Any]]) -> Iterator[Future[Any]]:
        """Whoever takes the answers comes back to them when all are there, in this order."""
        futures = list(asked)
        wait(futures)
        return iter(futures)

    monkeypatch.setattr("train.teachers.openai.as_completed", slowly)
    server.faults = [None] * 4 + [503]
    found: list[int] = []

    def take() -> None:
        for answered in client(server, concurrent=3, retries=0).answers([questions(12)], 1):
            ((question, answer),) = answered  # one commit each: they may be of several shards
            assert answer.ids == (question.number + 1, 1, 4)
            found.append(question.number)

    with pytest.raises(ReadError, match="HTTP 503"):
        take()
    assert len(server.requests) == 12
    assert len(found) == len(set(found)) == 11


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        (400, "check behave.server"),
        (401, "the key in $A_KEY is not set"),
        (404, "check behave.server.url and that it serves the model 'llm'"),
    ],
)
def test_what_will_not_change_stops_at_once_in_one_line(
    server: Faulty, status: int, hint: str
) -> None:
    server.faults = [status]
    with pytest.raises(cfg.ConfigError) as said:
        answers(client(server, key_variable="A_KEY", concurrent=1), 3)
    assert len(str(said.value).splitlines()) == 1
    assert f"HTTP {status}: " in str(said.value)
    assert hint in str(said.value)
    assert len(server.requests) <= 2


def test_the_key_goes_to_the_server_and_nowhere_else(
    server: Faulty, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("A_KEY", "sesame-opens")
    config = stage(
        workspace, tmp_path / "t", "behave.engine=openai",
        f"behave.server={{url: {server.url}, key_variable: A_KEY}}",
        f"run.tracking_uri=sqlite:///{tmp_path}/mlflow.db",
    )  # fmt: skip
    run(config)
    assert all(sent == "Bearer sesame-opens" for _, _, sent in server.requests)
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"sesame" not in written + "".join(capfd.readouterr()).encode()
    assert b"A_KEY" not in json.dumps(config.resolved()["behave"]["server"]["url"]).encode()


def test_stopped_by_the_server_it_asks_only_what_is_missing(
    server: Faulty, workspace: Workspace, tmp_path: Path
) -> None:
    config = stage(
        workspace, tmp_path / "t", "behave.engine=openai",
        f"behave.server={{url: {server.url}, concurrent: 1, retries: 0}}",
        f"run.tracking_uri=sqlite:///{tmp_path}/mlflow.db",
    )  # fmt: skip
    server.faults = [None] * 20 + [503]
    with pytest.raises(ReadError):
        run(config)
    run(config)
    prompts = [body["prompt"] for _, body, _ in server.requests]
    # The refused one twice, and another that was on its way when the refusal came.
    assert 40 + 1 <= len(prompts) <= 40 + 2
    assert len(set(prompts)) == 40


@pytest.mark.parametrize("url", ["host:8000", "http://me:secret@host/v1", "http://host/v1?key=s"])
def test_an_address_holds_no_secret(url: str) -> None:
    with pytest.raises(ValueError, match="without user, key or query"):
        cfg.Server(url=url)


def test_transformers_serve_gives_the_targets_of_hf(workspace: Workspace, tmp_path: Path) -> None:
    port = free_port()
    llm = str(workspace.root / "llm")
    serve = Serve(
        force_model=llm, device="cpu", host="127.0.0.1", port=port, non_blocking=True,
        log_level="error",
    )  # fmt: skip
    try:
        for _ in range(1200):
            try:
                requests.get(f"http://127.0.0.1:{port}/health", timeout=1).raise_for_status()
                break
            except requests.RequestException:
                time.sleep(0.05)
        run(
            stage(
                workspace, tmp_path / "t", "behave.engine=openai",
                f"behave.server={{url: 'http://127.0.0.1:{port}/v1', concurrent: 2}}",
                f"run.tracking_uri=sqlite:///{tmp_path}/mlflow.db",
            )
        )  # fmt: skip
    finally:
        serve.kill_server()
    by_hf = records(workspace, workspace.root / "targets")
    by_server = records(workspace, tmp_path / "t")
    assert len(digests(tmp_path / "t")) == 10  # three tars, indexes and lists, and the summary
    special = set(
        load_tokenizer(cfg.load(workspace.root / "targets-run.yaml").model).all_special_ids
    )
    for key, (target,) in by_server.items():
        (other,) = by_hf[key]
        # Special tokens have no text, so what a random LLM says of them does not come through.
        assert target["ids"] == [token for token in other["ids"] if token not in special]
        # The server calls an answer that fills the limit cut, even where its last token is EOS.
        assert target["finished"] in (other["finished"], False)
