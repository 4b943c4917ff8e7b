"""The page to talk to a model, in a headless Chromium that hears a file for a microphone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
import soundfile

from tests.launch import ROOT, environment, free_port, python
from tests.train.conftest import Workspace
from tests.train.test_export import make
from train import config as cfg

pytestmark = pytest.mark.slow

RATE = 16_000
_SECONDS = 60.0
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
)  # fmt: skip


@pytest.fixture(scope="module")
def chromium() -> str:
    """The browser's path; what is missing fails, for a page that nobody has seen is no page."""
    found = os.environ.get("CHROMIUM") or shutil.which("chromium")
    lacking = [name for name in ("gradio", "playwright") if find_spec(name) is None]
    if found is None:
        pytest.fail("no chromium: apt-get install chromium, or set CHROMIUM to its path")
    if lacking:
        pytest.fail(f"no {', '.join(lacking)}: pip install -c constraints.txt -e '.[ui,browser]'")
    return found


@pytest.fixture(scope="module")
def model(workspace: Workspace, uninterrupted: str) -> Path:
    """A trained run's checkpoint, as of a run that hears longer clips than the tiny corpus has."""
    folder = workspace.root / "talk" / "step-00000001"
    shutil.copytree(workspace.checkpoint(uninterrupted).path, folder)
    state = json.loads((folder / "state.json").read_text())
    state["config"]["data"]["max_seconds"] = 20.0
    del state["checksums"]["state.json"]
    (folder / "state.json").write_text(json.dumps(state))
    return folder


@pytest.fixture(scope="module")
def address(model: Path) -> Iterator[str]:
    """The page, served by the command that users have; ended as they end it."""
    port = free_port()
    process = subprocess.Popen(
        # What runs in a shell's background is deaf to Ctrl-C, and so would be what it starts.
        ["env", "--default-signal=INT", sys.executable, "train/listen.py", str(model), "--ui",
         "--port", str(port)],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if "talk to it at" in line:
                break
        else:
            pytest.fail("".join(said))
        listening = {
            c.laddr.ip
            for c in psutil.Process(process.pid).net_connections("inet")
            if c.status == psutil.CONN_LISTEN
        }
        assert listening == {"127.0.0.1"}
        yield f"http://127.0.0.1:{port}/"
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0
    finally:
        process.kill()  # where it did not come so far


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("talk") / "question.wav"
    at = np.arange(2 * RATE) / RATE
    noise = np.random.default_rng(0).normal(size=len(at))
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * 440 * at) + 0.05 * noise, RATE)
    return path


@contextmanager
def opened(chromium: str, address: str, microphone: Path) -> Iterator[tuple[Any, list[str]]]:
    """The page in a browser, and the addresses of all that it fetched."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=chromium,
            args=[*_FLAGS, f"--use-file-for-fake-audio-capture={microphone}"],
        )
        page = browser.new_context(permissions=["microphone"]).new_page()
        fetched: list[str] = []
        page.on("request", lambda request: fetched.append(request.url))
        page.set_default_timeout(1000 * _SECONDS)
        page.goto(address)
        page.locator("#ask").wait_for()
        yield page, fetched
        browser.close()


def choose(page: Any, instruction: str) -> None:
    box = page.locator("#instruction input")
    box.fill(instruction)
    box.press("Enter")


def answered(page: Any) -> dict[str, str]:
    """Press the button, and what stands in the boxes when it has its answer."""
    page.locator("#ask").click()
    page.wait_for_function("document.querySelector('#speed textarea').value != ''")
    if page.locator("#transcript textarea").input_value():  # else there is nothing to be like
        page.locator("#similarity img").wait_for()
    return {
        name: page.locator(f"#{name} textarea").input_value()
        for name in ("answer", "transcript", "speed")
    }


def test_an_uploaded_recording_gets_the_command_lines_answer(
    chromium: str, address: str, model: Path, question: Path
) -> None:
    out = python("train/listen.py", model, question, "--instruction", "continue this")
    with opened(chromium, address, question) as (page, fetched):
        page.get_by_label("Upload file").click()
        with page.expect_response("**/upload**"):
            page.locator("input[type=file]").first.set_input_files(str(question))
        choose(page, "continue this")
        found = answered(page)
    assert found["answer"] == out.strip().splitlines()[-1]
    assert found["speed"].startswith("2.00 s of audio, ")
    outside = [url for url in fetched if not url.startswith((address, "data:", "blob:"))]
    assert outside == []


def test_the_microphone_is_heard(chromium: str, address: str, question: Path) -> None:
    with opened(chromium, address, question) as (page, fetched):
        page.locator("button.record-button").click()
        time.sleep(2.0)
        with page.expect_response("**/upload**"):
            page.locator("button.stop-button").click()
        choose(page, "repeat this")
        found = answered(page)
    seconds = float(found["speed"].partition(" s of audio")[0])
    assert 0.5 < seconds < 20
    assert found["answer"]
    outside = [url for url in fetched if not url.startswith((address, "data:", "blob:"))]
    assert outside == []


def test_no_recording_is_said_on_the_page(chromium: str, address: str, question: Path) -> None:
    with opened(chromium, address, question) as (page, _):
        page.locator("#ask").click()
        page.get_by_text("no recording yet").wait_for()
        assert requests.get(address, timeout=30).ok  # and the server goes on


def test_languages_of_the_encoder_are_offered_and_the_first_is_chosen(
    tmp_path: Path, question: Path
) -> None:
    from train.talk import Talk, page  # needs gradio

    made = make(tmp_path, "languages")
    talk = Talk(made.config, made.responder)
    assert talk.transcribed_by == "the encoder"  # by the language's own head
    (box,) = [b for b in page(talk).blocks.values() if b.elem_id == "language"]
    assert (box.visible, box.choices, box.value) == (True, [("en", "en"), ("de", "de")], "en")
    run = ["train/listen.py", tmp_path / "run", question, "--instruction", "repeat this"]
    out = python(*run, "--language", "en", "--max-new-tokens", "9")
    short, *_ = talk.answer(str(question), "repeat this", box.value, 9)
    assert short == out.strip().splitlines()[-1]
    with pytest.raises(cfg.ConfigError, match=r"must be one of en, de, .* found none"):
        talk.answer(str(question), "repeat this", "", 9)
