from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from data.templates import load_templates
from tests import tiny
from train import config as cfg
from train.engine import policy


def test_overrides_are_yaml_values(tmp_path: Path) -> None:
    path = tiny.write_config(tmp_path / "c.yaml", tiny.config(tmp_path))
    config = cfg.load(path, ["train.lr=5e-3", "model.adapter.strides=[2, 2]", "run.seed=7"])
    assert config.train.lr == 5e-3
    assert config.model.adapter.strides == (2, 2)
    assert config.run.seed == 7


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lrr=1", "unknown key 'train.lrr'; did you mean 'lr'?"),
        (
            "model.adapter.bottelneck=1",
            "unknown key 'model.adapter.bottelneck'; did you mean 'bottleneck'?",
        ),
        ("model.adapter={kind: ebranchformer, bloks: 2}", "did you mean 'blocks'?"),
        ("model.adapter={kind: stack_mlp, frame: 4}", "did you mean 'frames'?"),
        ("model.adapter.kind=lstm", "expected tags: 'conv', 'stack_mlp', 'ebranchformer'"),
        (
            "model.encoder.lora={rnk: 4}",
            "unknown key 'model.encoder.lora.rnk'; did you mean 'rank'",
        ),
        ("model.decoder={path: d, train: full, lora: {}}", "exclude each other"),
        ("trian.lr=1", "unknown key 'trian'; did you mean 'train'?"),
        ("train.lr=fast", "train.lr"),
        ("train.lr=-1", "found -1"),
        ("data.augment.spedes=[1.0]", "unknown key 'data.augment.spedes'; did you mean 'speeds'?"),
        ("data.augment.speeds=[9.0]", "speeds must lie within"),
        ("prompt=hello", "prompt must hold {instruction} and {input}"),
        ("nonsense", "must be of the form"),
    ],
)
def test_a_fault_is_one_clear_line(tmp_path: Path, override: str, said: str) -> None:
    path = tiny.write_config(tmp_path / "c.yaml", tiny.config(tmp_path))
    with pytest.raises(cfg.ConfigError) as e:
        cfg.load(path, [override])
    assert said in str(e.value)
    assert len(str(e.value).splitlines()) == 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(cfg.ConfigError, match=r"nowhere\.yaml does not exist"):
        cfg.load(tmp_path / "nowhere.yaml")


def test_resolved_config_parses_to_itself(tmp_path: Path) -> None:
    path = tiny.write_config(tmp_path / "c.yaml", tiny.config(tmp_path))
    config = cfg.load(path, ["data.augment={speeds: [0.9, 1.1], noise: noises}"])
    assert cfg.parse(json.loads(json.dumps(config.resolved())), "again") == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"zero_optimization": {"stage": 3}, "gradient_clipping": 1}', "gradient_clipping"),
        ('{"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}', "auto"),
        ('{"zero_optimization": {"stage": 4}}', "stage must be 0, 1, 2 or 3, found 4"),
        ("{", "is not JSON"),
    ],
)
def test_engine_policy_holds_policy_alone(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    tree = tiny.config(tmp_path, train__engine=str(tmp_path / "ds.json"))
    with pytest.raises(cfg.ConfigError, match=said):
        policy(cfg.parse(tree, "tiny").train)


def test_names_of_settings_are_ones_that_the_tracker_takes(root: Path) -> None:
    for path in (root / "configs").glob("**/*.yaml"):
        if path.parent.name in ("configs", "micro"):
            flat = cfg.load(path).flat()
            assert all(re.fullmatch(r"[a-z_.]+", name) for name in flat), path
    flat = cfg.load(root / "configs/micro/mtbi.yaml").flat()
    assert flat["behave.tasks"] == '{"*": 2}'
    assert flat["data.interleave.pure_speech"] == "0.5"
    assert flat["model.decoder.path"] == "build/micro/llm-llama"


def test_stage_0_does_not_round_accumulated_gradients(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 0}}')
    tree = tiny.config(tmp_path, train__engine=str(tmp_path / "ds.json"), train__precision="bf16")
    with pytest.raises(cfg.ConfigError, match="use stage 1"):
        policy(cfg.parse(tree, "tiny").train)


def test_shipped_configs_parse(root: Path) -> None:
    paths = sorted([*(root / "configs").glob("*.yaml"), *(root / "configs/micro").glob("*.yaml")])
    assert paths
    for path in paths:
        config = cfg.load(path)
        policy(config.train)
        tree = yaml.safe_load(path.read_text())
        last = f"-{tree['stages'][-1]['name']}" if "stages" in tree else ""
        assert tree["run"]["name"] + last == config.run.name


def test_shipped_templates_load(root: Path) -> None:
    paths = sorted((root / "configs" / "prompts").glob("*.yaml"))
    assert paths
    for path in paths:
        assert load_templates(path, ("*",))
