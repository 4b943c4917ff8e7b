"""The MLflow model: through MLflow's own server, and under the run that trained it."""

from __future__ import annotations

import base64
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests

from data.audio import decode
from tests.launch import free_port, python
from tests.train.stored import stored, tree_of
from tests.train.test_serving import clip
from tests.train.test_tracking import Server
from train import checkpoint as ckpt
from train import config as cfg
from train import export
from train.model.respond import Question, Responder
from train.pyfunc import SIGNATURE
from train.tracking import Tracker, log_model


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


def checkpoint(root: Path, uri: str, run_id: str = "none") -> ckpt.Checkpoint:
    """One of a run that the tracker at `uri` knows as `run_id`."""
    tree = tree_of(root, "wav2vec2", "llama")
    tree["run"]["tracking_uri"] = uri
    found = ckpt.find(stored(root, tree, "v1.5"))
    ckpt.write(found.path, replace(found.state, tracker_run=run_id), found.weights, {})
    return ckpt.find(found.path)


def exported_to(root: Path, found: ckpt.Checkpoint) -> Path:
    """`export.py --mlflow --log`, and the folder that it wrote."""
    saved = root / "saved"
    export.main([str(found.path), str(root / "out"), "--mlflow", str(saved), "--log"])
    return saved


def stands_under_its_run(root: Path, uri: str) -> None:
    tracker = Tracker(uri, "tiny", "v1.5", params={"train.lr": "0.1"})
    tracker.close("KILLED")
    saved = exported_to(root, checkpoint(root, uri, tracker.run_id))
    client = mlflow.MlflowClient(uri)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "KILLED"  # to be continued, as before
    (output,) = run.outputs.model_outputs
    assert output.step == 7
    model = client.get_logged_model(output.model_id)
    assert (model.source_run_id, model.name) == (tracker.run_id, "v1-5")
    assert model.status == "READY"
    assert model.params == {"train.lr": "0.1"}
    assert mlflow.models.get_model_info(f"models:/{output.model_id}").signature == SIGNATURE
    got = root / "got"
    mlflow.artifacts.download_artifacts(f"models:/{output.model_id}", dst_path=str(got))
    sent = [path.relative_to(saved) for path in saved.rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in sent)
    assert all((got / path).read_bytes() == (saved / path).read_bytes() for path in sent)


def test_a_logged_model_stands_under_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where MLflow puts artifacts
    stands_under_its_run(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    made = Server(folder)
    made.start()
    yield made
    made.kill()


@pytest.mark.slow
def test_a_logged_model_stands_under_its_run_on_a_server(tmp_path: Path, server: Server) -> None:
    log, until = server.folder / "server.log", time.monotonic() + 180
    while "startup complete" not in log.read_text():
        assert time.monotonic() < until, log.read_text()[-4000:]
        time.sleep(0.1)
    stands_under_its_run(tmp_path, server.uri)


def test_a_tracker_that_takes_no_model_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the folder is written."""
    monkeypatch.chdir(tmp_path)
    gone = tmp_path / "gone.db"
    found = checkpoint(tmp_path, f"sqlite:///{gone}?timeout=1")
    with pytest.raises(cfg.ConfigError, match=r"gone\.db does not exist") as missing:
        exported_to(tmp_path, found)
    saved = tmp_path / "saved"
    assert (saved / "MLmodel").exists()
    assert not gone.exists()
    mlflow.MlflowClient(f"sqlite:///{gone}").search_experiments()
    with pytest.raises(cfg.ConfigError, match="Run with id=none not found") as unknown:
        log_model(found.state, saved)
    away = checkpoint(tmp_path, f"http://me:hunter2@127.0.0.1:{free_port()}")
    with pytest.raises(cfg.ConfigError, match=r"http://\*\*\*@127") as refused:
        log_model(away.state, saved)
    for raised in (missing, unknown, refused):
        assert len(str(raised.value).splitlines()) == 1
        assert str(raised.value).startswith(f"{saved} is written, but ")
        assert "hunter2" not in str(raised.value)


def test_nothing_is_logged_that_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        export.main([str(tmp_path), str(tmp_path / "out"), "--log"])
    assert "give --mlflow FOLDER" in capsys.readouterr().err
