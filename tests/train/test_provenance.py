"""Models, prompts and data that do not belong together are found out before anything is done."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from data.archive import index_path
from tests.ranks import Solo
from tests.train.conftest import Workspace
from tests.train.test_behave import digests, run, stage
from train import checkpoint as ckpt
from train import config as cfg
from train import export, listen, save_llm, serve
from train.encode import run as encode
from train.feed import open_feed
from train.provenance import (
    check_checkpoint,
    check_feed,
    recorded_again,
    sources_of,
    targets_say,
    weights_of,
)


def retrained(folder: Path) -> None:
    """The same model in the same place, after one more tiny update of one matrix."""
    path = folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = next(name for name, tensor in weights.items() if tensor.ndim == 2)
    weights[name] += 1e-4
    save_file(weights, path, {"format": "pt"})


@pytest.fixture
def own(workspace: Workspace, tmp_path: Path) -> list[str]:
    """Changes of the tiny configuration to models of the test's own."""
    for part in ("llm", "encoder"):
        shutil.copytree(workspace.root / part, tmp_path / part)
    return [f"model.decoder.path={tmp_path}/llm", f"model.encoder.path={tmp_path}/encoder"]


def test_a_digest_is_of_the_weights_wherever_they_are(workspace: Workspace, tmp_path: Path) -> None:
    copy = shutil.copytree(workspace.root / "llm", tmp_path / "copy")
    assert weights_of(str(copy)) == weights_of(str(workspace.root / "llm"))
    assert weights_of(str(copy)) != weights_of(str(workspace.root / "encoder"))
    retrained(copy)
    assert weights_of(str(copy)) != weights_of(str(workspace.root / "llm"))
    with pytest.raises(cfg.ConfigError, match="no model at"):
        weights_of(str(tmp_path))


def test_targets_of_an_llm_that_was_trained_since_are_not_taken_for_its_own(
    workspace: Workspace, tmp_path: Path, own: list[str]
) -> None:
    config = stage(workspace, tmp_path / "t", *own)
    run(config)
    retrained(tmp_path / "llm")
    with pytest.raises(cfg.ConfigError, match="was made with another teacher_weights; remove it"):
        run(config)


def test_a_target_shard_without_its_tar_is_made_again(workspace: Workspace, tmp_path: Path) -> None:
    config = stage(workspace, tmp_path / "t")
    run(config)
    whole = digests(tmp_path / "t")
    tar = tmp_path / "t" / "targets-000001.tar"
    assert index_path(tar).exists()
    tar.unlink()
    run(config)
    assert digests(tmp_path / "t") == whole


def test_a_run_takes_targets_of_its_own_llm_and_prompt_alone(
    workspace: Workspace, own: list[str], tmp_path: Path
) -> None:
    path = workspace.config("provenance")
    # The same weights in another place.
    config = cfg.load(path, [*own, "data.any_teacher=false"])
    check_feed(config, open_feed(config), sources_of(config))
    other = cfg.load(path, ["prompt='say {instruction} of {input}'"])
    with pytest.raises(cfg.ConfigError, match=r"^data.targets: made with prompt '.*', but .* 'say"):
        check_feed(other, open_feed(other), sources_of(other))
    retrained(tmp_path / "llm")
    with pytest.raises(
        cfg.ConfigError, match=r"^validation.targets: answered by '.*/llm', whose weights were"
    ):
        check_feed(config, open_feed(config), sources_of(config), "validation")
    meant = cfg.load(path, own)
    check_feed(meant, open_feed(meant), sources_of(meant))


def test_stored_states_are_of_one_encoder_as_it_was(
    workspace: Workspace, own: list[str], tmp_path: Path
) -> None:
    path = workspace.config("provenance")
    config = cfg.load(path, own)
    encode(config, tmp_path / "states", Solo())  # type: ignore[arg-type]
    stored = cfg.load(path, [*own, f"data.states=['{tmp_path}/states/*.tar']"])
    feed = open_feed(stored)
    sources = sources_of(stored, feed)
    assert sources["encoder"] == weights_of(str(tmp_path / "encoder"))
    check_feed(stored, feed, sources)
    with pytest.raises(cfg.ConfigError, match=r"^data.states: of encoders with different weights"):
        check_feed(stored, feed, {**sources, "encoder": "x"})
    retrained(tmp_path / "encoder")
    with pytest.raises(cfg.ConfigError, match=r"made with encoder_weights '.*', expected"):
        encode(config, tmp_path / "states", Solo())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("prompt='{instruction}: {input}'", "prompt was"),
        ("model.encoder.window_seconds=7", "model.encoder.window_seconds was null|None"),
        ("model.adapter.strides=[2, 4]", "model.adapter.strides was"),
        ("model.decoder.lora={rank: 4}", "model.decoder.lora was"),
    ],
)
def test_a_checkpoint_is_of_its_models_and_prompt(
    workspace: Workspace, uninterrupted: str, change: str, told: str
) -> None:
    state = workspace.checkpoint(uninterrupted).state
    path = workspace.root / f"{uninterrupted}.yaml"
    check_checkpoint(cfg.load(path, ["model.decoder.attention=sdpa"]), state, "it")
    with pytest.raises(cfg.ConfigError, match=told):
        check_checkpoint(cfg.load(path, [change]), state, "it")


def test_a_checkpoint_is_of_the_weights_that_it_was_trained_on(
    workspace: Workspace, uninterrupted: str, own: list[str], tmp_path: Path
) -> None:
    state = workspace.checkpoint(uninterrupted).state
    config = cfg.load(workspace.root / f"{uninterrupted}.yaml", own)
    check_checkpoint(config, state, "it")
    retrained(tmp_path / "encoder")
    with pytest.raises(cfg.ConfigError, match=r"model.encoder.path: '.*' has other weights than"):
        check_checkpoint(config, state, "it")


def test_a_strangers_checkpoint_runs_nothing(
    workspace: Workspace, uninterrupted: str, tmp_path: Path
) -> None:
    state = workspace.checkpoint(uninterrupted).state
    ran = tmp_path / "ran"
    command = f"pipe:touch {ran}; cat x.tar"
    assert targets_say([command]) == []
    for section, name, value in (
        ("data", "shards", [command]), ("data", "targets", [command]), ("data", "words", [command]),
        ("data", "states", [command]), ("model", "trust_remote_code", True),
    ):  # fmt: skip
        tree = copy.deepcopy(state.config)
        tree[section][name] = value
        theirs = replace(state, config=tree)
        with pytest.raises(cfg.ConfigError, match=rf"^it has a {section}\.{name} that runs code"):
            recorded_again(theirs, [], "it")
        again = f"{section}.{name}={json.dumps(value)}"
        assert recorded_again(theirs, [again], "it").resolved()[section][name] == value
        if name == "trust_remote_code":
            with pytest.raises(cfg.ConfigError, match="add --trust-remote-code if you trust"):
                cfg.recorded(tree, "it", trusted=False)
            assert cfg.recorded(tree, "it", trusted=True).model.trust_remote_code
    assert not ran.exists()


@pytest.mark.parametrize("main", [listen.main, export.main, serve.main, save_llm.main])
def test_no_entry_point_trusts_by_itself(
    workspace: Workspace, uninterrupted: str, tmp_path: Path, main: Callable[[list[str]], object]
) -> None:
    found = workspace.checkpoint(uninterrupted)
    tree = copy.deepcopy(found.state.config)
    tree["model"]["trust_remote_code"] = True
    theirs = tmp_path / found.path.name
    ckpt.write(theirs, replace(found.state, config=tree), found.weights, found.moments)
    more = {listen.main: ["x.wav", "--instruction", "i"], serve.main: []}
    with pytest.raises(cfg.ConfigError, match="add --trust-remote-code if you trust where it is"):
        main([str(theirs), *more.get(main, [str(tmp_path / "out")])])
