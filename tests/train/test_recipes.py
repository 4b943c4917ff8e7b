"""Every recipe of configs/micro/ through all its stages on two ranks, on tiny models. Minutes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import tiny
from tests.launch import ROOT, launch, python
from tests.train.conftest import Workspace
from train import config as cfg

pytestmark = pytest.mark.slow

STEPS = 3
RECIPES = sorted(path.stem for path in (ROOT / "configs/micro").glob("*.yaml"))
TASKS = ("continue", "repeat", "sentiment", "topic", "summarise", "who", "translate_en")


@pytest.fixture(scope="module")
def world(workspace: Workspace) -> Path:
    """Wordings of the micro world's tasks, and word times by the tiny encoder's own head."""
    root = workspace.root
    rows = [
        {"name": f"{task}-{n}", "task": task, "language": "*", "instruction": f"{word} this",
         **({"answer": "transcript"} if task == "repeat" else {})}
        for task in TASKS
        for n, word in enumerate(("repeat", "continue"))
    ]  # fmt: skip
    (root / "wordings.yaml").write_text(yaml.safe_dump(rows))
    python("-m", "data.align", root / "shards", root / "words", "--model", root / "encoder")
    pairs = [("repeat this", "the cat sees"), ("continue this", "a dog finds the house")] * 40
    asked = [{"instruction": i, "output": o, "language": "en"} for i, o in pairs]
    (root / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    python("-m", "data.build", "instructions", root / "asked.jsonl", root / "asked")
    return root


def recipe(root: Path, name: str, tasks: Path) -> Path:
    """A micro recipe with the tiny world in place of its own."""
    tree: dict[str, Any] = yaml.safe_load((ROOT / f"configs/micro/{name}.yaml").read_text())
    folder = root / f"recipe-{name}"
    tree["run"] |= {"output": str(folder), "tracking_uri": f"sqlite:///{folder}.db"}
    tree["model"]["encoder"]["path"] = str(root / "encoder")
    tree["model"]["decoder"]["path"] = str(root / "llm")
    tree["prompt"] = tiny.PROMPT
    tree["data"] |= {
        "shards": [f"{root}/shards/train-*.tar"], "targets": [f"{folder}-targets/*.tar"],
        "tokens_per_bin": 200,
    }  # fmt: skip
    if "words" in tree["data"]:
        tree["data"]["words"] = [f"{root}/words/*.tar"]
    tree["behave"] |= {"output": f"{folder}-targets", "max_new_tokens": 6}
    # The tiny world's tones are shorter than any speech of so many letters.
    tree["behave"].get("filters", {}).pop("characters_per_second", None)
    if tree["behave"]["templates"].startswith("build/"):
        tree["behave"]["templates"] = str(root / "wordings.yaml")
    if tree["behave"]["tasks"] == ["instruct"]:
        tree["data"]["shards"] = [f"{root}/asked/*.tar"]
    tree["train"] |= {"steps": STEPS, "checkpoint_every": STEPS}
    tree["train"].pop("init", None)
    if "evaluate" in tree:
        tree["evaluate"] |= {"shards": [f"{root}/shards/train-*.tar"], "tasks": str(tasks)}
    return tiny.write_config(root / f"recipe-{name}.yaml", tree)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_from_targets_to_scores(
    workspace: Workspace, world: Path, tasks: Path, name: str
) -> None:
    config = recipe(world, name, tasks)
    launch("train/behave.py", config, ranks=2)
    said = launch("train/main.py", config, ranks=2)
    stages = cfg.load_stages(config)
    assert said.count(f"train {STEPS}/{STEPS}") >= len(stages)
    for stage in stages:
        assert workspace.checkpoint(str(stage.run.output.relative_to(world))).state.step == STEPS
    asked = yaml.safe_load(config.read_text()).get("evaluate")
    if asked:
        rows = world / f"recipe-{name}.json"
        launch("train/evaluate.py", config, "--json", rows, ranks=2)
        inputs = {row["input"] for row in json.loads(rows.read_text())}
        assert inputs == set(asked.get("inputs", cfg.Evaluate.model_fields["inputs"].default))
