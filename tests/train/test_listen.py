"""`train/listen.py`: whatever MODEL is, the same answer, and the same refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile
import torch

from tests.train.test_export import INSTRUCTIONS, Made, make, waves
from train import checkpoint as ckpt
from train import config as cfg
from train.listen import main
from train.model.respond import Question

RATE = 16_000
MODELS = ("run", "adapter", "merged")


@pytest.fixture(scope="module")
def mms(tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.set_num_threads(1)
    return make(tmp_path_factory.mktemp("mms"), "languages")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.set_num_threads(1)
    return make(tmp_path_factory.mktemp("plain"), "own_length")


@pytest.fixture
def clips(tmp_path: Path) -> list[str]:
    paths = [str(tmp_path / f"{n}.wav") for n in range(4)]
    for path, wave in zip(paths, waves(), strict=True):
        soundfile.write(path, wave, RATE, subtype="FLOAT")
    return paths


def ask(model: Path, *given: str, instruction: str = INSTRUCTIONS[0]) -> None:
    main([str(model), *given, "--instruction", instruction, "--max-new-tokens", "9"])


def said(made: Made, language: str) -> str:
    """What it has to print."""
    heard = made.responder.listen(waves(), (language,) * 4)
    asked = [Question(INSTRUCTIONS[0], slots) for slots in heard]
    answers = made.responder.answer(asked, max_new_tokens=9)
    assert len(set(answers)) > 1  # or it would not have listened
    return "".join(f"{answer}\n" for answer in answers)


@pytest.mark.parametrize("model", MODELS)
def test_it_answers_alike_from_a_run_and_an_exported_folder(
    plain: Made, clips: list[str], capsys: pytest.CaptureFixture[str], model: str
) -> None:
    wanted = said(plain, "")
    assert min(len(line.split()) for line in wanted.splitlines()) == 1  # by an end of turn
    ask(plain.root / model, *clips)
    assert capsys.readouterr().out == wanted
    ask(plain.root / model, *clips, "--language", "fr")  # which means nothing to this encoder
    assert capsys.readouterr().out == wanted


@pytest.mark.parametrize("model", MODELS)
def test_a_recording_is_heard_in_its_language(
    mms: Made, clips: list[str], capsys: pytest.CaptureFixture[str], model: str
) -> None:
    wanted = {language: said(mms, language) for language in ("en", "de")}
    assert wanted["en"] != wanted["de"]
    for language, answers in wanted.items():
        ask(mms.root / model, *clips, "--language", language)
        assert capsys.readouterr().out == answers


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("given", "found"), [((), "none"), (("--language", "fr"), "'fr'")], ids=["none", "unknown"]
)
def test_a_language_without_an_adapter_is_refused(
    mms: Made, clips: list[str], model: str, given: tuple[str, ...], found: str
) -> None:
    with pytest.raises(cfg.ConfigError, match=rf"^--language .* (en, de|de, en), .* found {found}"):
        ask(mms.root / model, *clips, *given)


def test_an_exported_folder_has_no_page(plain: Made) -> None:
    with pytest.raises(cfg.ConfigError, match=r"--ui needs a run .* found an export: .*merged"):
        main([str(plain.root / "merged"), "--ui"])


def test_an_instruction_that_is_no_text_is_refused(plain: Made, clips: list[str]) -> None:
    with pytest.raises(cfg.ConfigError, match=r"--instruction: .* may not hold"):
        ask(plain.root / "merged", clips[0], instruction="a <|speech|>")
    with pytest.raises(cfg.ConfigError, match=r"--instruction: .* each may have \{input\} once"):
        ask(plain.root / "run", clips[0], instruction="{input} and {input}")


def test_an_encoders_folder_is_no_export(plain: Made, clips: list[str]) -> None:
    with pytest.raises(ckpt.CheckpointError, match=r"no checkpoint in .*whisper"):
        ask(plain.root / "whisper", clips[0])
