"""The run's configuration: one YAML file, checked once, frozen afterwards.

Units are in the names (`max_seconds`, `tokens_per_bin`). Paths are relative to the working
directory. `configs/ds/*.json` hold DeepSpeed's engine policy; what stands here (batch, clipping,
precision, optimizer) is injected there by `train.engine` and must not be repeated.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data.augment import Augment


class ConfigError(ValueError):
    """The configuration names something unknown, missing or out of range."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Run(Section):
    name: str
    output: Path
    """Folder for checkpoints and the run's own files; `resume` looks here."""
    seed: int = 1
    experiment: str = "hearken"
    tracking_uri: str = "sqlite:///mlflow.db"
    ledger: bool = False
    """Keep `ledger.jsonl` in `output`: the keys of every step that the newest checkpoint has
    trained, as `data.walk --ledger --state` prints them. An audit; costs a gather per step."""


class Encoder(Section):
    path: str
    """Hub name or local folder of a speech encoder (Wav2Vec2/MMS or Whisper kind)."""
    sharded: bool = False
    """False keeps the frozen encoder whole on every rank: it is small beside the LLM, and
    gathering it for each micro-batch would cost more than it saves."""


class Adapter(Section):
    kind: Literal["conv"] = "conv"
    kernel: int = Field(5, ge=1)
    strides: tuple[int, ...] = (2, 2, 2)
    bottleneck: int = Field(512, ge=1)
    """Width of the residual bottleneck after the convolutions (BLSP: 512)."""


class Decoder(Section):
    path: str
    """Hub name or local folder of any causal language model."""
    table: Literal["whole", "exchange"] = "whole"
    """The frozen text embeddings in training: whole on every rank (one lookup, but BLOOMZ's takes
    2 GB), or partitioned, with the ranks exchanging just the rows that a bin needs."""


class Model(Section):
    encoder: Encoder
    adapter: Adapter = Adapter()
    decoder: Decoder
    ops: Literal["auto", "fused", "reference"] = "auto"
    trust_remote_code: bool = False


class Data(Section):
    shards: tuple[str, ...]
    targets: tuple[str, ...]
    tokens_per_bin: int = Field(8192, ge=1)
    seconds_per_bin: float = Field(600.0, gt=0)
    bins_per_step: int = Field(8, ge=1)
    """Packed micro-batches in one global step, over all ranks."""
    window_shards: int = Field(16, ge=1)
    max_seconds: float = Field(30.0, gt=0)
    max_skipped: float = Field(0.01, ge=0, le=1)
    """Share of samples that may be skipped for bad content before the run stops."""
    workers: int = Field(2, ge=0)
    prefetch: int = Field(4, ge=1)
    cache: Path | None = None
    """Folder for local copies of shards that lie behind HTTP(S) or a `pipe:` command."""
    cache_gb: float = Field(100.0, gt=0)
    """What that folder may hold, over all processes of a host."""
    augment: Augment | None = None
    """What is done to the speech of stage 2 (see `data.augment`); None leaves it as it is."""


class Behave(Section):
    """Stage 1: what the frozen LLM answers to the transcripts (BLSP's continuation)."""

    templates: Path
    """YAML list of {name, task, language, instruction, heldout, origin}."""
    tasks: tuple[str, ...] = ("continue",)
    output: Path
    max_new_tokens: int = Field(64, ge=1)
    batch_size: int = Field(64, ge=1)
    items_per_shard: int = Field(1024, ge=1)
    temperature: float = Field(0.0, ge=0)
    """0 decodes greedily; above, sampling is seeded by key."""


class Train(Section):
    steps: int = Field(ge=1)
    lr: float = Field(gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    final_lr_share: float = Field(0.0, ge=0, le=1)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = Field(1.0, gt=0)
    precision: Literal["bf16", "fp32"] = "bf16"
    engine: Path = Path("configs/ds/zero3.json")
    checkpoint_every: int = Field(200, ge=1)
    keep: int = Field(2, ge=1)
    """How many of the newest checkpoints stay on disk."""


class Evaluate(Section):
    shards: tuple[str, ...]
    tasks: Path
    """JSONL rows {key, task, language, instruction, wording, answer, metric}."""
    inputs: tuple[Literal["speech", "text", "cascade", "shuffled", "none"], ...] = (
        "speech",
        "text",
        "cascade",
        "shuffled",
    )
    max_new_tokens: int = Field(64, ge=1)
    batch_size: int = Field(64, ge=1)
    samples: int = Field(12, ge=0)
    """Clips that are logged to MLflow to listen to."""


class Config(Section):
    run: Run
    model: Model
    prompt: str
    """Template with `{instruction}` and `{input}`; the answer follows it."""
    data: Data
    behave: Behave | None = None
    train: Train
    evaluate: Evaluate | None = None

    def resolved(self) -> dict[str, Any]:
        """Plain JSON-able dict of every setting, defaults included."""
        return self.model_dump(mode="json")

    def flat(self) -> dict[str, str]:
        """`section.key` → text, as logged to the tracker."""

        def walk(name: str, node: Any) -> Iterator[tuple[str, str]]:
            if isinstance(node, dict):
                for key, child in node.items():
                    yield from walk(f"{name}.{key}" if name else key, child)
            else:
                yield name, node if isinstance(node, str) else json.dumps(node)

        return dict(walk("", self.resolved()))


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read `path`, apply `a.b=value` overrides (values are YAML), and check all of it.

    Raises:
        ConfigError: one line per fault; an unknown key names its nearest known neighbour.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"config file {path} is not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path} must be a mapping of sections, found {tree!r}")
    for override in overrides or []:
        _set(tree, override)
    return parse(tree, str(path))


def parse(tree: dict[str, Any], origin: str) -> Config:
    """Check a resolved dict (from YAML, or from a checkpoint's state file)."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as e:
        raise ConfigError("\n".join(_explain(fault, origin) for fault in e.errors())) from None
    if config.prompt.count("{instruction}") != 1 or config.prompt.count("{input}") != 1:
        raise ConfigError(
            f"{origin}: prompt must hold {{instruction}} and {{input}} once each, "
            f"found {config.prompt!r}"
        )
    return config


def _set(tree: dict[str, Any], override: str) -> None:
    name, sep, text = override.partition("=")
    if not sep:
        raise ConfigError(f"--set {override!r} must be of the form section.key=value")
    *parents, last = name.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {name}: {parent!r} is a value, not a section")
        tree = child
    tree[last] = yaml.safe_load(text)


def _explain(fault: Any, origin: str) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):  # a dataclass's
        known = _known_keys(fault["loc"][:-1])
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
        return f"{origin}: unknown key {where!r}; {hint}"
    found = "" if fault["type"] == "missing" else f", found {fault['input']!r}"
    return f"{origin}: {where}: {fault['msg'].lower()}{found}"


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    section: Any = Config
    for part in location:
        if not isinstance(part, str) or part not in _types(section):
            continue  # an item of a list, or the name of one choice of a union
        annotation = _types(section)[part]
        options = getattr(annotation, "__args__", (annotation,))
        section = next(o for o in options if isinstance(o, type) and _types(o))
    return list(_types(section))


def _types(section: Any) -> dict[str, Any]:
    """Key → type of a section; empty for what is none."""
    if isinstance(section, type) and issubclass(section, BaseModel):
        return {name: info.annotation for name, info in section.model_fields.items()}
    if dataclasses.is_dataclass(section):
        return {field.name: field.type for field in dataclasses.fields(section)}
    return {}
