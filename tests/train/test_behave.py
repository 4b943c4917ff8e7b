"""Stage 1: targets, their ends, their provenance, and what a kill leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import mlflow
import pytest
import yaml

from data.archive import ShardError, read_meta
from data.shards import Overlay, ShardSet
from tests.launch import launch, start
from tests.ranks import Solo, on_threads
from tests.train.conftest import Workspace
from train import behave
from train import config as cfg
from train.engine import World
from train.feed import open_feed
from train.model.build import load_tokenizer
from train.teachers.hf import Generator
from train.teachers.part import Question

LIMIT = 6  # behave.max_new_tokens of the tiny config


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def stage(workspace: Workspace, output: Path, *changes: str) -> cfg.Config:
    """The tiny config with another output, as `--set` would change it."""
    config = workspace.root / "targets-run.yaml"
    return cfg.load(config, [f"behave.output={output}", *changes])


def run(config: cfg.Config) -> None:
    behave.run(config, cast(World, Solo()))


def records(workspace: Workspace, output: Path) -> dict[str, list[dict[str, Any]]]:
    base = ShardSet.open(str(workspace.root / "shards" / "train-*.tar"))
    overlay = Overlay.open(str(output / "targets-*.tar"), base)
    return {base.key(i): overlay.record(i)["targets"] for i in range(len(base))}


@pytest.fixture(scope="module")
def targets(workspace: Workspace) -> Overlay:
    base = ShardSet.open(str(workspace.root / "shards" / "train-*.tar"))
    return Overlay.open(str(workspace.root / "targets" / "targets-*.tar"), base)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[Question]]:
    """The batches that were generated, in order."""
    found: list[list[Question]] = []
    generate = Generator._generate

    def counted(self: Generator, batch: Any) -> Any:
        found.append(list(batch))
        return generate(self, batch)

    monkeypatch.setattr(Generator, "_generate", counted)
    return found


def addresses(batches: list[list[Question]]) -> list[str]:
    return [question.address for batch in batches for question in batch]


def test_every_utterance_has_an_answer(targets: Overlay) -> None:
    found = [targets.record(i)["targets"] for i in range(40)]
    assert all(len(targets) == 1 and targets[0]["ids"] for targets in found)


def test_an_answer_is_finished_unless_the_limit_cut_it(targets: Overlay) -> None:
    for i in range(40):
        (target,) = targets.record(i)["targets"]
        assert target["finished"] == (len(target["ids"]) < LIMIT)
        assert 2 not in target["ids"]


def test_a_cut_answer_teaches_no_end_of_sequence(workspace: Workspace) -> None:
    config = cfg.load(workspace.config("labels"))
    eos = load_tokenizer(config.model).eos_token_id
    feed = open_feed(config)
    cut = 0
    for batches in feed.stream.steps(0):
        for batch in batches:
            rows = batch.label_rows.tolist()
            ends = [int(end) for end in batch.cu_seqlens[1:]] if batch.weight else []
            for end in ends:
                # The last position but one predicts a document's last label.
                last = batch.label_ids[rows.index(end - 2)]
                length = sum(end - LIMIT - 2 < row < end - 1 for row in rows)
                cut += last != eos
                assert length == LIMIT or last == eos
    assert cut


def test_targets_say_where_they_came_from(targets: Overlay, workspace: Workspace) -> None:
    for meta in targets.metas:
        assert meta["teacher"] == str(workspace.root / "llm")
        assert {"prompt", "templates", "max_new_tokens", "temperature", "seed", "hash"} <= set(meta)
        assert meta["counts"]["targets"] == meta["counts"]["utterances"]


def test_one_rank_and_two_write_the_same_bytes(workspace: Workspace, tmp_path: Path) -> None:
    run(stage(workspace, tmp_path / "t"))
    assert digests(tmp_path / "t") == digests(workspace.root / "targets")


@pytest.mark.parametrize("size", [2, 3, 5])
def test_batches_are_the_same_on_any_number_of_ranks(
    workspace: Workspace, tmp_path: Path, batches: list[list[Question]], size: int
) -> None:
    changes = ["behave.batch_size=3", "behave.temperature=1", "behave.items_per_shard=8"]
    run(stage(workspace, tmp_path / "one", *changes))
    alone, batches[:] = list(batches), []
    for earlier, later in pairwise(alone):
        if earlier[0].part == later[0].part:
            assert max(len(q.ids) for q in earlier) <= min(len(q.ids) for q in later)
    config = stage(workspace, tmp_path / "many", *changes)
    on_threads(size, lambda here: behave.run(config, here))
    assert sorted(map(str, batches)) == sorted(map(str, alone))
    assert digests(tmp_path / "many") == digests(tmp_path / "one")


@pytest.mark.parametrize(("done", "size"), [(1, 1), (2, 3), (3, 2), (5, 1), (6, 4)])
def test_stopped_after_some_batches_it_asks_only_the_others(
    workspace: Workspace, tmp_path: Path, batches: list[list[Question]], done: int, size: int
) -> None:
    """40 questions in shards of 16, 16 and 8, in batches of 4; it goes on with `size` ranks."""
    whole = stage(workspace, tmp_path / "whole", "behave.batch_size=4", "behave.temperature=1")
    run(whole)
    once, batches[:] = addresses(batches), []

    config = stage(workspace, tmp_path / "cut", "behave.batch_size=4", "behave.temperature=1")

    class Killed(BaseException):
        pass

    class Dying(Generator):
        def answers(self, some: Any, rounds: int) -> Any:
            for answered in super().answers(some, rounds):
                if len(batches) > done:
                    raise Killed  # generated, but not committed yet
                yield answered

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(behave, "Generator", Dying)
        with pytest.raises(Killed):
            run(config)
    lost = addresses(batches[done:])
    on_threads(size, lambda here: behave.run(config, here))
    assert Counter(addresses(batches)) == Counter(once) + Counter(lost)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_killed_for_real_on_two_ranks(workspace: Workspace, tmp_path: Path) -> None:
    changes = ["behave.max_new_tokens=150", "behave.batch_size=1", "behave.temperature=1"]
    whole = stage(workspace, tmp_path / "whole", *changes)
    run(whole)
    args = [word for change in changes for word in ("--set", change)]
    output = tmp_path / "killed"
    process = start(
        "train/behave.py", workspace.root / "targets-run.yaml",
        "--set", f"behave.output={output}", *args, ranks=2, log=tmp_path / "log",
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        lines = [p.read_bytes().count(b"\n") for p in output.glob(".answers/*/rank-*.jsonl")]
        if sum(lines) > 6:
            break
        time.sleep(0.02)
    assert process.poll() is None, (tmp_path / "log").read_text()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list(output.glob("targets-*.tar"))) < 3
    run(stage(workspace, output, *changes))
    assert digests(output) == digests(tmp_path / "whole")


def test_a_line_cut_short_is_as_if_never_written(
    workspace: Workspace, tmp_path: Path, batches: list[list[Question]]
) -> None:
    config = stage(workspace, tmp_path / "t")
    run(config)
    before = digests(tmp_path / "t")
    facts = read_meta(tmp_path / "t" / "targets-000001.parquet")
    header = {k: facts[k] for k in facts if k not in ("counts", "kind", "base_digest", "format")}
    shards = ShardSet.open(list(config.data.shards))
    made = behave.Stage(config, config.behave, cast(World, Solo())).part(
        tmp_path / "t" / "targets-000001.tar", range(16, 32)
    )
    assert len(shards) == 40
    assert len(made.batches) == 2
    for path in (tmp_path / "t").glob("targets-000001.*"):
        path.unlink()
    folder = tmp_path / "t" / ".answers" / "targets-000001"
    folder.mkdir(parents=True)
    lines = [json.dumps([[q.number, [5, 6], True] for q in b]) for b in made.batches]
    journal = f"{json.dumps(header)}\n{lines[0]}\n{lines[1][:-5]}"
    (folder / "rank-0.jsonl").write_text(journal)
    batches.clear()
    run(config)
    assert batches == [made.batches[1]]
    assert before.keys() == digests(tmp_path / "t").keys()
    kept = records(workspace, tmp_path / "t")
    first = {made.asks[question.number].key for question in made.batches[0]}
    assert all((kept[key][0]["ids"] == [5, 6]) == (key in first) for key in
               (ask.key for ask in made.asks))  # fmt: skip


@pytest.mark.parametrize(
    "change", ["behave.max_new_tokens=5", "behave.items_per_shard=32", "run.seed=9"]
)
def test_targets_of_another_making_are_not_mixed_in(workspace: Workspace, change: str) -> None:
    config = stage(workspace, workspace.root / "targets", change)
    name = change.partition("=")[0].partition(".")[2]
    with pytest.raises(cfg.ConfigError, match=f"was made with another {name}; remove it"):
        run(config)


def test_a_journal_of_another_making_is_not_mixed_in(workspace: Workspace, tmp_path: Path) -> None:
    config = stage(workspace, tmp_path)
    folder = tmp_path / ".answers" / "targets-000000"
    folder.mkdir(parents=True)
    facts = behave.Stage(config, config.behave, cast(World, Solo())).facts
    (folder / "rank-3.jsonl").write_text(json.dumps(facts | {"hash": "x", "prompt": "y"}) + "\n")
    with pytest.raises(ShardError, match=r"rank-3.jsonl was made with another prompt; remove it"):
        run(config)


def test_a_sample_does_not_depend_on_its_batch(workspace: Workspace, tmp_path: Path) -> None:
    found = []
    for size, seed in ((8, 1), (3, 1), (8, 2)):
        output = tmp_path / f"{size}-{seed}"
        run(
            stage(
                workspace, output, "behave.temperature=1.5", f"behave.batch_size={size}",
                f"run.seed={seed}",
            )
        )  # fmt: skip
        found.append({k: t[0]["ids"] for k, t in records(workspace, output).items()})
    assert found[0] == found[1]
    assert found[0] != found[2]
    assert len({tuple(ids) for ids in found[0].values()}) > 30


def test_several_targets_and_transcripts(workspace: Workspace, tmp_path: Path) -> None:
    """T + 2 MI: the transcript itself, and two wordings of other tasks."""
    wordings = [
        {"name": "t", "task": "repeat", "language": "*", "instruction": "repeat this",
         "answer": "transcript"},
        *({"name": f"mi{n}", "task": f"mi_{n}", "language": language, "instruction": f"the {n}"}
          for n, language in enumerate(["en", ["de", "en"], "*", "de"])),
        {"name": "unseen", "task": "mi_0", "language": "*", "instruction": "a", "heldout": True},
    ]  # fmt: skip
    (tmp_path / "prompts.yaml").write_text(yaml.safe_dump(wordings))
    config = stage(
        workspace, tmp_path / "t", f"behave.templates={tmp_path / 'prompts.yaml'}",
        "behave.tasks={repeat: 1, mi_*: 2}",
    )  # fmt: skip
    run(config)
    base = ShardSet.open(list(config.data.shards))
    texts = dict(zip(base.keys.to_pylist(), base.texts.to_pylist(), strict=True))
    tokenizer = load_tokenizer(config.model)
    chosen: Counter[str] = Counter()
    for key, (first, *others) in records(workspace, tmp_path / "t").items():
        assert (first["task"], first["text"], first["finished"]) == ("repeat", texts[key], True)
        assert tokenizer.decode(first["ids"]) == texts[key]
        names = [target["template"] for target in others]
        assert len(set(names)) == 2
        chosen.update(names)
    assert chosen.keys() == {"mi0", "mi1", "mi2"}  # mi3 is for German, `unseen` is held out
    assert max(chosen.values()) < 40

    # Stage 2 takes one per epoch, in turn: three epochs train all three.
    config = cfg.load(workspace.config("turns"), [f"data.targets=['{tmp_path}/t/targets-*.tar']"])
    lengths = open_feed(config).stream.lengths
    turns = [lengths.target_of(epoch).tolist() for epoch in range(3)]
    assert all(set(of_one) == {0, 1, 2} for of_one in zip(*turns, strict=True))


def test_transcripts_as_targets_need_no_llm(workspace: Workspace, tmp_path: Path) -> None:
    shutil.copytree(
        workspace.root / "llm", tmp_path / "llm", ignore=shutil.ignore_patterns("*.safetensors")
    )
    wording = {"name": "t", "task": "repeat", "language": "*", "instruction": "repeat this",
               "answer": "transcript"}  # fmt: skip
    (tmp_path / "prompts.yaml").write_text(yaml.safe_dump([wording]))
    changes = [
        f"behave.templates={tmp_path / 'prompts.yaml'}", "behave.tasks=[repeat]",
        f"model.decoder.path={tmp_path / 'llm'}",
    ]  # fmt: skip
    run(stage(workspace, tmp_path / "t", *changes))
    assert all(len(t) == 1 and t[0]["ids"] for t in records(workspace, tmp_path / "t").values())


def test_what_is_filtered_is_listed_and_not_trained(workspace: Workspace, tmp_path: Path) -> None:
    config = stage(
        workspace, tmp_path / "t", "behave.filters={characters_per_second: [0, 25]}",
        "behave.items_per_shard=64",
    )  # fmt: skip
    run(config)
    found = records(workspace, tmp_path / "t")
    base = ShardSet.open(list(config.data.shards))
    fast = set()
    for i, text in enumerate(base.texts.to_pylist()):
        if len(text.replace(" ", "")) / (base.num_samples[i] / 16_000) > 25:
            fast.add(base.key(i))
    assert 0 < len(fast) < 40
    assert {key for key, (target,) in found.items() if "filtered" in target} == fast
    rows = [json.loads(x) for x in (tmp_path / "t/targets-000000.filtered.jsonl").open()]
    assert {row["key"] for row in rows} == fast
    assert all(row["filtered"].startswith("speech rate: ") for row in rows)
    counts = read_meta(tmp_path / "t/targets-000000.parquet")["counts"]
    assert counts["filtered"] == {"speech rate": len(fast)}
    assert counts["targets"] == 40 - len(fast)
    said = json.loads((tmp_path / "t/summary.json").read_text())
    assert said["filtered/speech rate"] == len(fast)
    assert said["tasks/continue"] == said["targets"] == 40 - len(fast)
    client = mlflow.MlflowClient(config.run.tracking_uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
    (newest, *_) = client.search_runs([experiment.experiment_id])  # the last one started
    assert newest.data.metrics["data/filtered/speech_rate"] == len(fast)
    listed = client.list_artifacts(newest.info.run_id, "filtered")
    assert [Path(file.path).name for file in listed] == ["targets-000000.filtered.jsonl"]

    config = cfg.load(workspace.config("left"), [f"data.targets=['{tmp_path}/t/targets-*.tar']"])
    stream = open_feed(config).stream
    assert fast == {base.key(i) for i in stream.lengths.refused()}


def test_a_wording_that_does_not_fit_the_prompt_is_named(
    workspace: Workspace, tmp_path: Path
) -> None:
    wording = {"name": "inside", "task": "t", "language": "*", "instruction": "is {input} good"}
    (tmp_path / "prompts.yaml").write_text(yaml.safe_dump([wording]))
    changes = [f"behave.templates={tmp_path / 'prompts.yaml'}", "behave.tasks=[t]"]
    config = stage(workspace, tmp_path / "t", *changes)
    twice = config.model_copy(update={"prompt": "{instruction} {input} {instruction}"})
    with pytest.raises(cfg.ConfigError, match=r"prompts.yaml: inside: instruction .* do not fit"):
        run(twice)
    run(config)
    (target,) = next(iter(records(workspace, tmp_path / "t").values()))
    assert target["instruction"] == "is {input} good"


@pytest.mark.parametrize("tasks", ["{}", "[]", "{continue: 0}"])
def test_no_tasks_at_all(workspace: Workspace, tmp_path: Path, tasks: str) -> None:
    with pytest.raises(cfg.ConfigError, match=r"behave\.tasks"):
        stage(workspace, tmp_path, f"behave.tasks={tasks}")


@pytest.mark.slow
def test_a_partitioned_teacher_says_the_same(workspace: Workspace, tmp_path: Path) -> None:
    """Three questions a batch on two ranks: the ranks' last rounds and lengths differ."""
    changes = ["behave.batch_size=3", "behave.items_per_shard=20"]
    run(stage(workspace, tmp_path / "whole", *changes))
    args = [w for c in [*changes, "behave.sharded=true"] for w in ("--set", c)]
    output = tmp_path / "sharded"
    launch(
        "train/behave.py", workspace.root / "targets-run.yaml",
        "--set", f"behave.output={output}", *args, ranks=2,
    )  # fmt: skip
    assert digests(output) == digests(tmp_path / "whole")
