"""Stored states of the frozen encoder, in place of the encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data.archive import ContentError, ShardError
from data.collate import Batch
from data.states import parse_states, states_record
from tests import tiny
from tests.launch import launch
from tests.ranks import Solo
from tests.train.conftest import STEPS, Workspace
from train import config as cfg
from train import encode
from train.feed import open_feed
from train.model.build import build

KINDS = ["wav2vec2", "wav2vec2-base", "whisper", "wav2vec2-bert"]


def stored(
    workspace: Workspace, tmp_path: Path, **changes: object
) -> tuple[cfg.Config, cfg.Config]:
    """The same run with its encoder, and with what that left in `tmp_path`."""
    plain = cfg.load(workspace.config("plain", **changes))
    encode.run(plain, tmp_path / "states", Solo())
    states = {"states": (f"{tmp_path}/states/states-*.tar",)}
    return plain, plain.model_copy(update={"data": plain.data.model_copy(update=states)})


def first_batches(config: cfg.Config) -> list[Batch]:
    return [batch for step in open_feed(config).stream.steps(0) for batch in step]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_hears_stored_states_as_it_hears_the_speech(
    workspace: Workspace, tmp_path: Path, kind: str
) -> None:
    encoder = tiny.encoder(tmp_path / "encoder", kind)
    plain, kept = stored(workspace, tmp_path, model__encoder={"path": str(encoder)})
    one = build(plain.model, "fp32", seed=1).eval()
    other = build(kept.model, "fp32", seed=1, stored=True).eval()
    other.load_state_dict(
        {k: v for k, v in one.state_dict().items() if not k.startswith("encoder.")}, strict=False
    )
    batches = list(zip(first_batches(plain), first_batches(kept), strict=True))
    assert len(batches) > 3
    for heard, brought in batches:
        assert heard.keys == brought.keys
        assert torch.equal(heard.source, brought.source)
        with torch.no_grad():
            slots, sums = one.listen(*_clips(heard)), one(heard)
            # In other batches, so with other sums; rounded to float32 either way.
            torch.testing.assert_close(other.listen(*_clips(brought)), slots, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(other(brought), sums, rtol=1e-5, atol=1e-5)


def _clips(batch: Batch) -> tuple[object, ...]:
    return batch.features, batch.samples, batch.frames, batch.languages


def test_states_are_of_the_encoders_own_clip(workspace: Workspace, tmp_path: Path) -> None:
    """What is stored does not depend on the batch in which it was made."""
    _, kept = stored(workspace, tmp_path / "many")
    _, alone = stored(workspace, tmp_path / "one", data__seconds_per_bin=2.0)
    one, other = (open_feed(config).stream for config in (kept, alone))
    for i in range(len(one.shards)):
        a, b = (stream._stored(i, int(one.shards.num_samples[i])) for stream in (one, other))
        torch.testing.assert_close(*map(torch.from_numpy, (a.features, b.features)),
                                   rtol=1e-4, atol=1e-5)  # fmt: skip


def test_made_once_and_by_the_right_encoder(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, kept = stored(workspace, tmp_path)
    shards = sorted((tmp_path / "states").glob("*.tar"))
    before = {path: path.stat().st_mtime_ns for path in shards}
    shards[1].unlink()
    encode.run(plain, tmp_path / "states", Solo())
    assert "3 of 4 shards of states" in capsys.readouterr().out
    assert {path for path in shards if path.stat().st_mtime_ns != before[path]} == {shards[1]}
    other = plain.train.model_copy(update={"precision": "bf16"})
    with pytest.raises(cfg.ConfigError, match="precision 'fp32', expected 'bf16'"):
        open_feed(kept.model_copy(update={"train": other}))
    with pytest.raises(cfg.ConfigError, match="precision"):
        encode.run(plain.model_copy(update={"train": other}), tmp_path / "states", Solo())
    shards[2].unlink()
    with pytest.raises(ShardError):
        open_feed(kept)


def test_states_that_are_none_are_skipped(workspace: Workspace, tmp_path: Path) -> None:
    good = torch.arange(12.0).view(4, 3)
    assert parse_states(states_record(good), 4).tolist() == good.T.tolist()
    half = parse_states(states_record(good.bfloat16()), 4)
    assert half.dtype.name == "float32"
    for data, said in (
        (states_record(good), "expected 5 frames"),
        (b"no safetensors at all", "not safetensors"),
        (states_record(good.long()), "no floating-point"),
        (states_record(good[0]), "expected 5 frames"),
    ):
        with pytest.raises(ContentError, match=said):
            parse_states(data, 5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__augment": {"speeds": [0.9]}}, "augment changes what the encoder hears"),
        ({"model__encoder": {"path": "e", "lora": {"rank": 2}}}, "lora or weighted layers"),
        ({"model__encoder": {"path": "e", "layers": "weighted"}}, "lora or weighted layers"),
    ],
)
def test_what_changes_with_training_is_not_stored(
    workspace: Workspace, changes: dict[str, object], said: str
) -> None:
    path = workspace.config("refused", data__states=["s"], **changes)
    with pytest.raises(cfg.ConfigError, match=said):
        cfg.load(path)


@pytest.mark.slow
def test_two_ranks_encode_and_train_behind_it(
    workspace: Workspace, uninterrupted: str, tmp_path: Path
) -> None:
    config = workspace.config("behind")
    launch("train/encode.py", config, tmp_path, ranks=2)
    states = ("--set", f"data.states=['{tmp_path}/states-*.tar']")
    launch("train/main.py", config, *states, ranks=2)
    found, expected = workspace.curve("behind"), workspace.curve(uninterrupted)
    assert [step for step, _ in found] == list(range(STEPS))
    for (step, loss), (_, other) in zip(found, expected, strict=True):
        assert loss == pytest.approx(other, rel=2e-4 if step else 2e-6), step
