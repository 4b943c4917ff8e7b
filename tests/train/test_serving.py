"""The endpoint: what it answers, what it refuses, and that it goes on."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import requests
import soundfile
import torch
from starlette.testclient import TestClient

from data.audio import decode
from tests.launch import free_port, start_python
from tests.train.stored import stored, tree_of
from train import checkpoint as ckpt
from train import config as cfg
from train.model.export.folder import model_of, processor_of
from train.model.respond import Question, Responder
from train.serving.app import Served, make_app
from train.serving.batcher import Batcher, Job
from train.serving.faults import Fault
from train.serving.limits import Limits
from train.serving.wording import Wording

RATE = 16_000
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Model:
    """A run that was never trained, answered by `listen.py`'s path, and served here."""

    run: Path
    responder: Responder
    served: Served

    def said(self, file: bytes, instruction: str, tokens: int = 12) -> str:
        slots = self.responder.listen([decode(file, max_seconds=2)])[0]
        asked = [Question(instruction, slots)]
        return self.responder.answer(asked, max_new_tokens=tokens)[0]

    def client(self, **limits: Any) -> TestClient:
        """The same model behind other limits."""
        changed = replace(self.served.limits, **limits)
        return TestClient(make_app(replace(self.served, limits=changed)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("served")
    run = stored(root, tree_of(root, "wav2vec2", "llama"))
    found = ckpt.find(run)
    config = cfg.parse(found.state.config, "state")
    processor, limits = processor_of(config), Limits()
    batcher = Batcher(model_of(config, found.weights), processor, limits)
    responder = Responder(config, found.weights)
    yield Model(run, responder, Served("run", processor, batcher, limits, created=1))
    batcher.close()


def clip(seconds: float = 1.1, kind: str = "WAV", rate: int = RATE, seed: int = 0) -> bytes:
    wave = 0.2 * np.random.default_rng(seed).normal(size=int(seconds * rate))
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind)
    return file.getvalue()


def part(file: bytes, kind: str = "wav") -> dict[str, Any]:
    data = base64.b64encode(file).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": kind}}


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def body(*content: Any, **others: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": list(content)}]
    return {"model": "run", "messages": messages, "max_tokens": 12} | others


def test_wording_is_the_whole_text_in_pieces(model: Model) -> None:
    tokenizer = model.responder.tokenizer
    ids = tokenizer("old dog finds the red bird", add_special_tokens=False)["input_ids"]
    words = Wording(tokenizer)
    pieces = [words.add(token) for token in [*ids, 2]]
    assert [p for p in pieces if p] == ["old", " dog", " finds", " the", " red", " bird"]
    assert words.rest() == ""


class Bytes:
    """A tokenizer of single bytes."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode(errors="replace")


def test_no_piece_of_a_character_is_given_away() -> None:
    words, given = Wording(Bytes()), ""
    said = "für 語  "
    for byte in said.encode():
        piece = words.add(byte)
        given += piece
        assert "\ufffd" not in piece
        assert said.startswith(given)
    assert given + words.rest() == said.strip()


def submit(model: Model, rows: list[Any], **how: Any) -> list[list[Any]]:
    """Events of jobs that stand in the queue at once."""

    async def all_events() -> list[list[Any]]:
        loop, batcher = asyncio.get_running_loop(), model.served.batcher
        settings = {"max_tokens": 9, "temperature": 0.0, "seed": 5} | how
        deadline = time.monotonic() + 60
        jobs = [Job(row, **settings, deadline=deadline, loop=loop) for row in rows]
        with batcher._changed:
            for job in jobs:
                batcher.submit(job)
        return [await events(job) for job in jobs]

    async def events(job: Job) -> list[Any]:
        found = [await job.events.get()]
        while isinstance(found[-1], int):
            found.append(await job.events.get())
        return found

    return asyncio.run(all_events())


def rows_of(model: Model) -> list[Any]:
    processor = model.served.processor
    talks = [
        [{"role": "user", "content": [text(said), {"type": "audio", "audio": wave}]}]
        for said, wave in (
            ("repeat this", decode(clip(), max_seconds=2)),
            ("continue this", decode(clip(1.9, seed=1), max_seconds=2)),
            ("the old dog", decode(clip(0.4, seed=2), max_seconds=2)),
        )
    ]
    return [processor.read(talk) for talk in talks]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_jobs_that_wait_are_answered_together_as_alone(model: Model, temperature: float) -> None:
    rows = rows_of(model)
    alone = [submit(model, [row], temperature=temperature)[0] for row in rows]
    before = len(model.served.batcher.batches)
    assert submit(model, rows, temperature=temperature) == alone
    assert model.served.batcher.batches[before:] == [3]
    assert len({tuple(events) for events in alone}) == 3


def test_one_faulty_job_does_not_harm_those_beside_it(model: Model) -> None:
    rows = rows_of(model)
    wanted = submit(model, rows)
    broken = replace(rows[1], ids=(*rows[1].ids, -1))  # a place more than its clip has slots
    found = submit(model, [rows[0], broken, rows[2]])
    assert [found[0], found[2]] == [wanted[0], wanted[2]]
    (fault,) = found[1]
    assert isinstance(fault, Fault)
    assert fault.status == 500
    assert submit(model, rows) == wanted


def test_a_job_that_nobody_waits_for_is_not_generated(model: Model) -> None:
    row = rows_of(model)[0]
    before = list(model.served.batcher.batches)

    async def leave() -> None:
        loop = asyncio.get_running_loop()
        gone = Job(row, 9, 0.0, 1, time.monotonic() + 60, loop, cancelled=True)
        late = Job(row, 9, 0.0, 1, time.monotonic() - 1, loop)
        kept = Job(row, 9, 0.0, 1, time.monotonic() + 60, loop)
        with model.served.batcher._changed:
            for job in (gone, late, kept):
                model.served.batcher.submit(job)
        await kept.events.get()
        assert gone.events.empty()
        assert late.events.empty()

    asyncio.run(leave())
    assert model.served.batcher.batches == [*before, 1]


GOOD = part(clip())
BAD: dict[str, tuple[Any, int, str]] = {
    "no JSON": (b"{", 400, "not JSON"),
    "half a character": (
        body({"type": "text", "text": "\ud800"}, GOOD), 400, "surrogates not allowed",
    ),
    "no text": (b"\xff\xfe", 400, "not JSON"),
    "nested": (b"[" * 100_000, 400, "not JSON"),
    "digits": (b'{"seed": ' + b"1" * 5_000 + b"}", 400, "not JSON"),
    "a list": ([], 400, "must be a JSON object"),
    "empty": ({}, 400, "model: Field required"),
    "no messages": ({"model": "run", "messages": []}, 400, "messages: "),
    "other model": (body(GOOD) | {"model": "gpt"}, 404, "no model 'gpt'"),
    "unknown key": (body(GOOD, tools=[]), 400, "tools: unknown, or not supported"),
    "two answers": (body(GOOD, n=2), 400, "n: "),
    "nucleus": (body(GOOD, top_p=0.5), 400, "top_p: "),
    "tokens as text": (body(GOOD, max_tokens="9"), 400, "max_tokens: "),
    "no tokens": (body(GOOD, max_tokens=0), 400, "max_tokens: "),
    "many tokens": (body(GOOD, max_tokens=10**9), 400, "at most 512"),
    "hot": (body(GOOD, temperature=9), 400, "temperature: "),
    "a number": (body(7), 400, "messages.0.content.0: "),
    "an image": (body({"type": "image_url"}), 400, "messages.0.content.0: "),
    "no base64": (body(part(b"") | {"input_audio": {"data": "?", "format": "wav"}}), 400, "base64"),
    "no format": (body({"type": "input_audio", "input_audio": {"data": ""}}), 400,
                  "messages.0.content.0.input_audio.format: Field required"),
    "no sound": (body(part(b"RIFF0000WAVE")), 400, "messages.0.content.0.input_audio: not audio"),
    "silence": (body(part(clip(0.0))), 400, "empty: 0 samples"),
    "short": (body(part(clip(0.001))), 400, "too short"),
    "long": (body(part(clip(2.5))), 400, "over the limit of 2 s"),
    "many": (body(*[GOOD] * 17), 400, "at most 16 recordings"),
    "marker": (body(text("a <|speech|>"), GOOD), 400, "may not hold"),
    "system": ({"model": "run", "messages": [{"role": "system", "content": "a"}]}, 400,
               "beginning with user"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_gets_a_reason(model: Model, case: str) -> None:
    asked, status, said = BAD[case]
    content = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
    client = model.client()
    answer = client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == status
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"
    assert client.get("/health").json()["in_hand"] == 0


def test_limits_of_the_server(model: Model) -> None:
    json_type = {"Content-Type": "application/json"}
    good = body(text("repeat this"), GOOD)
    assert model.client().post(CHAT, json=good).status_code == 200
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"queue": 0}, 429, "in hand already"),
        ({"seconds": 0.0}, 504, "not done within 0 s"),
        ({"body_bytes": 99}, 413, "at most 99 bytes"),
        ({"positions": 5}, 400, "at most 5 are allowed"),
        ({"audio_seconds": 1.0}, 400, "over the limit of 1 s"),
    ]
    for limits, status, said in cases:
        for streamed in (False, True):
            answer = model.client(**limits).post(CHAT, json=good | {"stream": streamed})
            assert answer.status_code == status
            assert said in answer.json()["error"]["message"]
    limited = model.client(body_bytes=99)
    pieces = (b"x" * 60 for _ in range(2))  # of a length that is not announced
    assert limited.post(CHAT, content=pieces, headers=json_type).status_code == 413
    assert limited.post(CHAT, data={"model": "run"}).status_code == 415
    assert limited.get("/v1/nothing").json()["error"]["message"].startswith("GET /v1/nothing")
    assert limited.put(CHAT).status_code == 405
    full = model.client(queue=0).post(CHAT, json=good)
    assert full.headers["Retry-After"] == "1"


def test_the_official_client_gets_what_listen_says(model: Model, tmp_path: Path) -> None:
    port = free_port()
    with start_python(
        "train/serve.py", model.run, "--port", str(port), "--max-megabytes", "1",
        log=tmp_path / "log",
    ), openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:  # fmt: skip
        wait_for(client, tmp_path / "log")
        assert [m.id for m in client.models.list()] == ["run"]

        def ask(*content: Any, **others: Any) -> Any:
            messages: Any = [{"role": "user", "content": list(content)}]
            return client.chat.completions.create(
                model="run", messages=messages, max_completion_tokens=12, **others
            )

        for kind, rate in (("WAV", 8_000), ("FLAC", RATE), ("MP3", 44_100)):
            file = clip(1.3, kind, rate)
            answer = ask(text("repeat this"), part(file, kind.lower()))
            assert answer.choices[0].message.content == model.said(file, "repeat this")
            assert answer.choices[0].finish_reason in ("stop", "length")
        files = [clip(0.3 + 0.1 * n, seed=n) for n in range(16)]
        alone = [model.said(f, "repeat this") for f in files]
        wanted, file = max(zip(alone, files, strict=True), key=lambda found: len(found[0]))
        streamed = ask(
            text("repeat this"), part(file), stream=True, stream_options={"include_usage": True}
        )
        chunks = list(streamed)
        said = [c.choices[0].delta.content or "" for c in chunks if c.choices]
        assert "".join(said) == wanted
        assert len([piece for piece in said if piece]) > 1
        sound = {"type": "audio", "audio": decode(file, max_seconds=2)}
        row = model.served.processor.read(
            [{"role": "user", "content": [text("repeat this"), sound]}]
        )
        (events,) = submit(model, [row], max_tokens=12)
        usage = chunks[-1].usage
        assert usage.completion_tokens == len(events) - 1
        assert usage.prompt_tokens == len(row.ids)
        assert usage.prompt_tokens_details.audio_tokens == row.ids.count(-1) > 0
        # Sixteen at once, each what it is alone.
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda f: ask(text("repeat this"), part(f)), files))
        assert [a.choices[0].message.content for a in answers] == alone
        assert len(set(alone)) > 4
        health = requests.get(f"http://127.0.0.1:{port}/health", timeout=60).json()
        assert health["largest_batch"] > 1
        # A conversation of several clips and turns.
        talk: Any = [
            {"role": "user", "content": [text("repeat this"), part(files[3])]},
            {"role": "assistant", "content": "old dog"},
            {"role": "user", "content": [part(files[5]), text("the"), part(files[7]), text("a")]},
        ]
        found = client.chat.completions.create(model="run", messages=talk, max_tokens=12)
        assert found.choices[0].message.content == spoken(model, files)
        with pytest.raises(openai.NotFoundError, match="no model 'other'"):
            client.chat.completions.create(model="other", messages=talk)
        with pytest.raises(openai.BadRequestError, match="not audio"):
            ask(part(b"no sound"))
        with pytest.raises(openai.APIStatusError, match="at most 1048576 bytes"):
            ask(part(bytes(3 * 2**20)))
        assert ask(text("repeat this"), part(file)).choices[0].message.content == wanted


def spoken(model: Model, files: list[bytes]) -> str:
    """The same conversation by the exported model itself."""
    waves = [{"type": "audio", "audio": decode(files[n], max_seconds=2)} for n in (3, 5, 7)]
    talk = [
        {"role": "user", "content": [text("repeat this"), waves[0]]},
        {"role": "assistant", "content": "old dog"},
        {"role": "user", "content": [waves[1], text("the"), waves[2], text("a")]},
    ]
    processor = model.served.processor
    inputs = processor.apply_chat_template(talk, tokenize=True)
    tokens = model.served.batcher.model.generate(**inputs, max_new_tokens=12)
    return str(processor.batch_decode(tokens, skip_special_tokens=True)[0]).strip()


def wait_for(client: openai.OpenAI, log: Path) -> None:
    until = time.monotonic() + 120
    while True:
        try:
            client.models.list()
            return
        except openai.APIConnectionError:
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)
