"""The MLflow model, through MLflow's own server: what `listen.py` says."""

from __future__ import annotations

import base64
import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import requests

from data.audio import decode
from tests.launch import free_port, python
from tests.train.stored import stored, tree_of
from tests.train.test_serving import clip
from train import checkpoint as ckpt
from train import config as cfg
from train.model.respond import Question, Responder


def told(url: str, rows: list[dict[str, Any]], **params: Any) -> requests.Response:
    body = {"dataframe_records": rows, "params": params}
    return requests.post(f"{url}/invocations", json=body, timeout=120)


@pytest.mark.slow
def test_mlflow_serves_what_listen_says(tmp_path: Path) -> None:
    run = stored(tmp_path, tree_of(tmp_path, "wav2vec2", "llama"))
    saved = tmp_path / "saved"
    python("train/export.py", run, tmp_path / "out", "--merged", "--mlflow", saved)
    found = ckpt.find(run)
    responder = Responder(cfg.parse(found.state.config, "state"), found.weights)
    files = [clip(0.4 + 0.07 * n, "FLAC" if n % 2 else "WAV", seed=n) for n in range(18)]
    slots = [responder.listen([decode(file, max_seconds=2)])[0] for file in files]
    asked = [Question("repeat this", heard) for heard in slots]
    rows = [
        {"audio": base64.b64encode(file).decode(), "instruction": "repeat this"} for file in files
    ]
    port = free_port()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # As in an activated environment: MLflow starts `uvicorn` by its name.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [
        "mlflow", "models", "serve", "-m", str(saved), "--env-manager", "local",
        "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    env = {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HOME": str(elsewhere / "hf")}
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=elsewhere, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | env,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url, server, tmp_path / "log")
        for beams in (1, 3):
            answer = told(url, rows, max_new_tokens=9, num_beams=beams)
            assert answer.status_code == 200, answer.text
            wanted = responder.answer(asked, max_new_tokens=9, num_beams=beams)
            assert answer.json()["predictions"] == wanted
        assert len(set(wanted)) > 4
        faulty = told(url, [{"audio": "UklGRg==", "instruction": "repeat this"}])
        assert faulty.status_code == 400
        assert "row 0: audio: not audio" in faulty.json()["message"]
        assert told(url, rows[:1]).status_code == 200
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, 15)
        server.wait(30)


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 180
    while server.poll() is None:
        try:
            if requests.get(f"{url}/ping", timeout=5).ok:
                return
        except requests.RequestException:
            pass
        assert time.monotonic() < until, log.read_text()[-6000:]
        time.sleep(0.3)
    raise AssertionError(log.read_text()[-6000:])
