"""What bash completes, asked of bash."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch import ROOT
from train.completion import commands, setting_names
from train.config import Config


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "script.sh"
    said = subprocess.run(
        ["bash", "-c", f"exec {sys.executable} -m train.completion > {path}"], cwd=ROOT
    )  # fmt: skip
    assert said.returncode == 0
    return path


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        (["python", "train/ma"], {"train/main.py"}),
        (["python", "-m", "data.bu"], {"data.build"}),
        (["python", "-m", "data.build", "li"], {"librispeech"}),
        (["deepspeed", "--num_gpus", "8", "train/main.py", "a.yaml", "--dr"], {"--dry-run"}),
        (["deepspeed", "train/main.py", "a.yaml", "--local"], set()),  # the launcher's own
        (["torchrun", "train/main.py", "a.yaml", "--set", "train.hang"], {"train.hang_seconds="}),
        (["python", "train/main.py", "a.yaml", "--set", "model.adapter.ker"],
         {"model.adapter.kernel="}),
        (["python", "my_own.py", "--dr"], set()),
    ],
    ids=lambda value: " ".join(value),
)  # fmt: skip
def test_what_is_completed(script: Path, typed: list[str], found: set[str]) -> None:
    said = subprocess.run(
        ["bash", "-c", 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_hearken; '
         'printf "%s\\n" "${COMPREPLY[@]}"', script, *typed],
        capture_output=True, text=True,
    )  # fmt: skip
    assert said.returncode == 0
    assert set(said.stdout.split()) == found


def test_on_a_terminal(script: Path) -> None:
    screen, terminal = pty.openpty()
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"], cwd=ROOT, stdin=terminal, stdout=terminal,
        stderr=terminal, start_new_session=True, env=os.environ | {"TERM": "dumb"},
    )  # fmt: skip
    try:
        os.write(screen, f"source {script}; echo rea''dy\n".encode())
        assert "ready" in _until("ready", screen)
        os.write(screen, b"deepspeed train/main.py READ\t --set train.hang\t")
        assert "README.md  --set train.hang_seconds=" in _until("_seconds=", screen)
    finally:
        shell.kill()
        shell.wait()


def _until(text: str, screen: int) -> str:
    seen, deadline = "", time.monotonic() + 20
    while text not in seen and time.monotonic() < deadline:
        if select.select([screen], [], [], 0.1)[0]:
            seen += os.read(screen, 4096).decode(errors="replace")
    return seen


def test_every_listed_command_is_known() -> None:
    listed = re.findall(
        r"^\| `(?:python -m|python|deepspeed) ([^ `]+)", (ROOT / "docs/commands.md").read_text(),
        re.MULTILINE,
    )  # fmt: skip
    assert set(listed) == {*commands(), "train.completion"}


def test_settings_are_named_by_their_whole_path() -> None:
    names = set(setting_names(Config))
    assert {"run.name", "train.lr", "data.shards", "model.decoder.path"} <= names
    assert "model.adapter" not in names
