"""The run's configuration: one YAML file, checked once, frozen afterwards.

Units are in the names (`max_seconds`, `tokens_per_bin`). Paths are relative to the working
directory. `configs/ds/*.json` hold DeepSpeed's engine policy; what stands here (batch, clipping,
precision, optimizer) is injected there by `train.engine` and must not be repeated.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from data.augment import Augment
from data.filters import Filters
from data.interleave import Interleave
from data.languages import LanguageLabels
from data.parsing import brief, parse_yaml
from data.secrets import redacted, redacted_tree


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
    pictures: bool = True
    """Draw the data for the tracker when the run begins: lengths, and how the plan packs them."""


class LoRA(Section):
    """Low-rank updates of a pretrained part (2106.09685), by peft; trained, and checkpointed."""

    rank: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    """The updates are scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Last names of the linear layers to update; none for the usual ones of the model's family."""


class Encoder(Section):
    path: str
    """Hub name or local folder of a speech encoder: Whisper, Wav2Vec2/MMS, HuBERT, WavLM or
    Wav2Vec2-BERT."""
    sharded: bool = False
    """False keeps the frozen encoder whole on every rank: it is small beside the LLM, and
    gathering it for each micro-batch would cost more than it saves."""
    own_length: bool = False
    """Whisper: encode each clip at its own length instead of the window of 30 s that it was trained
    on: a fraction of the work at some loss of fidelity, which `docs/log.md` has measured."""
    window_seconds: float | None = Field(None, gt=0)
    """Clips that are longer are encoded in overlapping windows (see `train.model.windows`). None:
    Whisper in its own of 30 s, the others as a whole."""
    layers: Literal["last", "weighted"] = "last"
    """What the adapter hears: the last layer, or a trained weighted sum of all of them."""
    languages: dict[str, str] = {}
    """MMS: the corpus's language code -> the language of the adapter weights beside the encoder
    (`adapter.LANGUAGE.safetensors`), each clip by its own. None leaves the encoder's own."""
    lora: LoRA | None = None


class AnyAdapter(Section):
    train: bool = True
    """False leaves it as it is made, with its last norm and the encoder's weighted layers: for a
    run without speech (BLSP's preparation), or one that trains low-rank updates alone."""


class ConvAdapter(AnyAdapter):
    """BLSP's: strided convolutions with GLU, then a residual bottleneck."""

    kind: Literal["conv"] = "conv"
    kernel: int = Field(5, ge=1)
    strides: tuple[Annotated[int, Field(ge=1)], ...] = (2, 2, 2)
    bottleneck: int = Field(512, ge=1)
    """Width of the residual bottleneck after the convolutions (BLSP: 512)."""


class StackMLPAdapter(AnyAdapter):
    """AZeroS's and Ultravox's kind: frames joined side by side, then two linear layers."""

    kind: Literal["stack_mlp"]
    frames: int = Field(8, ge=1)
    """Frames that become one slot."""
    hidden: int | None = Field(None, ge=1)
    """Width between the two layers; None for the LLM's."""


class EBranchformerAdapter(AnyAdapter):
    """BLOOMZMMS's: an E-Branchformer between a convolution x4 and one x2."""

    kind: Literal["ebranchformer"]
    inputs: int = Field(128, ge=8)
    """Width that the frames are projected to before the first convolutions."""
    width: int = Field(1024, ge=1)
    heads: int = Field(8, ge=1)
    blocks: int = Field(17, ge=1)
    feed_forward: int = Field(2048, ge=1)
    cgmlp: int = Field(8192, ge=2)
    """Width of the gated branch; half of it gates the other half."""
    kernel: int = Field(31, ge=1)
    """Of the depthwise convolutions, in the gate and in the merge of the branches; odd."""
    dropout: float = Field(0.0, ge=0, lt=1)
    layerdrop: float = Field(0.0, ge=0, lt=1)
    """Share of blocks that are passed over in training (they run all the same)."""
    languages: tuple[str, ...] = ()
    """Languages that a head behind `language_block` tells apart, slot by slot; what it finds goes
    into the blocks behind it, and `losses.language` trains it. A code of the corpus each, `a|b`
    where it has several; or the path of a YAML list of them."""
    language_block: int = Field(3, ge=1)

    @field_validator("languages", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        # Kept as a list in checkpoints, since the file may change and the order is the classes'.
        if not isinstance(value, str):
            return value
        try:
            return parse_yaml(Path(value).read_bytes())
        except (OSError, ValueError) as e:
            raise ValueError(f"no YAML list of languages: {e}") from None

    @model_validator(mode="after")
    def _fits(self) -> EBranchformerAdapter:
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of 2 x {self.heads} heads")
        if not self.kernel % 2 or self.cgmlp % 2:
            raise ValueError("kernel must be odd and cgmlp even")
        LanguageLabels(self.languages)
        if self.languages and self.language_block > self.blocks:
            raise ValueError(f"language_block must be at most blocks = {self.blocks}")
        return self


def _kind(section: Any) -> str:
    """The choice of a union of sections; a section without a `kind` is a conv adapter."""
    if isinstance(section, dict):
        return str(section.get("kind", "conv"))
    return str(getattr(section, "kind", section))


Adapter = Annotated[
    Annotated[ConvAdapter, Tag("conv")]
    | Annotated[StackMLPAdapter, Tag("stack_mlp")]
    | Annotated[EBranchformerAdapter, Tag("ebranchformer")],
    Discriminator(_kind),
]


class Decoder(Section):
    path: str
    """Hub name or local folder of any causal language model."""
    table: Literal["whole", "exchange"] = "whole"
    """The frozen text embeddings in training: whole on every rank (one lookup, but BLOOMZ's takes
    2 GB), or partitioned, with the ranks exchanging just the rows that a bin needs."""
    train: Literal["none", "full"] = "none"
    """`full` trains every weight of the LLM beside the adapter (BLSP's preparation stage)."""
    lora: LoRA | None = None
    eight_bit: bool = False
    """The frozen LLM's linear layers in 8 bit, all but the head (LLM.int8, as BLOOMZMMS has it); by
    bitsandbytes, and under ZeRO 0 to 2: what is quantised cannot be partitioned."""
    attention: Literal["auto", "flash_attn", "varlen", "flex", "sdpa"] = "auto"
    """Of packed batches, see `train.model.kernels`: `auto` takes the fastest that can."""
    checkpointing: bool = False
    """Keep each layer's input alone, and run the layer again in the backward pass: less memory for
    more work, see `train.model.recompute`."""

    @model_validator(mode="after")
    def _one_way(self) -> Decoder:
        if self.lora and self.train == "full":
            raise ValueError("lora and train: full exclude each other; remove one")
        if self.eight_bit and self.train == "full":
            raise ValueError("weights in 8 bit cannot be trained; remove eight_bit, or take lora")
        return self


class Model(Section):
    encoder: Encoder
    adapter: Adapter = ConvAdapter()
    decoder: Decoder
    ops: Literal["auto", "fused", "reference"] = "auto"
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _something_learns(self) -> Model:
        llm = self.decoder.lora or self.decoder.train == "full"
        if not (self.adapter.train or llm or self.encoder.lora):
            raise ValueError("nothing is trained; set adapter.train or decoder.train, or add lora")
        return self


class Data(Section):
    shards: tuple[str, ...]
    targets: tuple[str, ...]
    any_teacher: bool = False
    """Whether targets may be the answers of another LLM than the run's, in the run's tokens."""
    tokens_per_bin: int = Field(8192, ge=1)
    seconds_per_bin: float = Field(600.0, gt=0)
    bins_per_step: int = Field(8, ge=1)
    """Packed micro-batches in one global step, over all ranks."""
    share_prompts: bool = False
    """Whether what several documents of a bin begin with is run once (see `data.sharing`)."""
    window_shards: int = Field(16, ge=1)
    max_seconds: float = Field(30.0, gt=0)
    """Longest clip: of training data longer ones are left out and named, elsewhere refused."""
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
    words: tuple[str, ...] = ()
    """Word shards of the same speech, made by `data.align`."""
    interleave: Interleave | None = None
    """Which utterances are partly read, partly heard (see `data.interleave`); needs `words`."""
    states: tuple[str, ...] = ()
    """Shards of what the frozen encoder makes of this speech, by `train/encode.py`: it is then
    neither loaded nor run."""

    @model_validator(mode="after")
    def _stored(self) -> Data:
        if self.states and self.augment:
            raise ValueError("augment changes what the encoder hears, but states are stored; "
                             "remove one of the two")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _aligned(self) -> Data:
        if self.interleave and not self.words:
            raise ValueError("interleave needs words; make word shards by data.align and name them")
        return self


class Server(Section):
    """An OpenAI-compatible server (such as vLLM's) that has the same LLM and completes prompts."""

    url: str
    """Up to its version: `http://host:8000/v1`."""
    model: str | None = None
    """Its name there; None takes `model.decoder.path`."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself is never logged or written."""
    concurrent: int = Field(32, ge=1)
    """Requests of one rank that are under way at once."""
    timeout_seconds: float = Field(120.0, gt=0)
    retries: int = Field(8, ge=0)
    """Tries after the first, on 408, 409, 429, 5xx and time-outs; then the run stops, resumable."""

    @field_validator("url")
    @classmethod
    def _no_secrets(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")) or "@" in url or "?" in url:
            raise ValueError("must be http(s)://host[:port]/path, without user, key or query")
        return url


class Behave(Section):
    """Stage 1: what the frozen LLM answers to the transcripts."""

    templates: Path
    """YAML list of wordings, see `data.templates`."""
    tasks: dict[str, Annotated[int, Field(ge=1)]] = Field({"continue": 1}, min_length=1)
    """How many targets an utterance gets of which task, each with another wording; a list of
    tasks gives one each. A task may be a pattern: `{repeat: 1, "mi_*|summarise": 2}`. Stage 2
    trains one of an utterance's targets per epoch, in turn: n epochs train n targets, all of
    them equally often (BLOOMZMMS T + 2 MI: three epochs)."""
    output: Path
    engine: Literal["hf", "openai"] = "hf"
    """`hf` generates here, on all ranks; `openai` asks `server`."""
    server: Server | None = None
    sharded: bool = False
    """With `hf`: partition the LLM over the ranks (ZeRO-3) rather than keep it whole on each."""
    max_new_tokens: int = Field(64, ge=1)
    batch_size: int = Field(64, ge=1)
    items_per_shard: int = Field(1024, ge=1)
    temperature: float = Field(0.0, ge=0)
    """0 decodes greedily; above, each target is sampled with random numbers of its own."""
    filters: Filters = Filters()
    """What is kept out of training, see `data.filters`; without any, empty answers alone."""

    @field_validator("tasks", mode="before")
    @classmethod
    def _one_each(cls, value: Any) -> Any:
        return dict.fromkeys(value, 1) if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _served(self) -> Behave:
        if (self.engine == "openai") != (self.server is not None):
            raise ValueError("engine openai needs a server, and no other engine takes one")
        if self.engine == "openai" and self.sharded:
            raise ValueError("sharded is for engine hf")
        return self


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
    init: Path | None = None
    """Run or checkpoint whose trained weights this run begins with, as the stage before it
    (BLOOMZMMS: `losses.ctc` alone, then `ce`). Moments, schedule and data begin anew."""
    checkpoint_every: int = Field(200, ge=1)
    keep: int = Field(2, ge=1)
    """How many of the newest checkpoints stay on disk."""
    verify_frozen: bool = False
    """Digest every frozen weight before and after the run, and fail where one has changed; reads
    all of the encoder and the LLM twice."""
    max_nonfinite: int = Field(0, ge=0)
    """How many steps of the run may be skipped because their loss or gradient is not finite; the
    next one stops it. None is ever trained on; see `train/replay.py`."""
    hang_seconds: float = Field(300.0, gt=0)
    """A rank that has not finished a step, or its wait for data, in this time ends the job,
    saying where each rank is; so does one that has not come to the start. Below the collectives'
    own timeout of 10 minutes."""
    communication_every: int = Field(100, ge=0)
    """Rank 0 profiles every so manyth step for `perf/communication_share`; 0 never does."""


class Evaluate(Section):
    shards: tuple[str, ...]
    tasks: Path
    """A task file, see `data.tasks`."""
    inputs: tuple[Literal["speech", "text", "cascade", "shuffled", "none"], ...] = (
        "speech",
        "text",
        "cascade",
        "shuffled",
        "none",
    )
    recogniser: str | None = None
    """Hub name or folder of the model that transcribes for `cascade`; None takes the encoder's
    own CTC head (Wav2Vec2/MMS) or decoder (Whisper)."""
    max_new_tokens: int = Field(64, ge=1)
    num_beams: int = Field(1, ge=1)
    """1 decodes greedily; a batch has so many rows less."""
    option_score: Literal["mean", "sum"] = "mean"
    """How options are compared: log probability per token, or of the whole answer."""
    normaliser: Literal["lower", "plain", "whisper"] = "plain"
    """What is done to texts before they are compared (see `train.metrics.NORMALISERS`)."""
    resamples: int = Field(1000, ge=0)
    """Bootstrap resamples behind the 95 % intervals; 0 for none."""
    states: int = Field(100, ge=0)
    """Utterances whose hidden states are compared between speech and text; 0 for none."""
    batch_size: int = Field(64, ge=1)
    """Rows that the LLM runs at once: prompts, beams or options."""
    samples: int = Field(12, ge=0)
    """Clips that are logged to MLflow to listen to."""
    pictures: int = Field(3, ge=0)
    """Of these, how many are drawn: slots against words, speech against text inside the LLM."""


class ResponseKL(Section):
    """BLSP-KD: the LLM that hears against the same LLM that reads, over each label's position."""

    weight: float = Field(1.0, gt=0)
    temperature: float = Field(2.0, gt=0)
    top_k: int | None = Field(None, ge=1)
    """Only the teacher's likeliest tokens, renormalised; None for all."""


class EmbeddingCTC(Section):
    """BLOOMZMMS's first stage: slots spell the transcript in the LLM's own embeddings."""

    weight: float = Field(1.0, gt=0)
    scale: float = Field(1.0, gt=0)
    """Of the logits: embeddings of a small norm make flat distributions."""


class LanguageCTC(Section):
    """BLOOMZMMS's first stage, beside `ctc`: slots say the clip's language, once for each token of
    its transcript (needs `model.adapter.languages`)."""

    weight: float = Field(1.0, gt=0)


class Alignment(Section):
    """The slots of a word against the mean of its tokens' embeddings (needs word shards)."""

    weight: float = Field(1.0, gt=0)
    distance: Literal["cosine", "l2"] = "cosine"


class Losses(Section):
    """What stage 2 descends: a sum of losses, each a mean over all that it counts in a step.

    One that is off costs nothing; with neither `ce` nor `kl` the decoder does not run.
    """

    ce: float = Field(1.0, ge=0)
    """Weight of the cross entropy of the targets, per label; 0 is off."""
    kl: ResponseKL | None = None
    """Per label."""
    ctc: EmbeddingCTC | None = None
    """Per token of the transcripts."""
    language: LanguageCTC | None = None
    """Per label, of which there are about as many."""
    align: Alignment | None = None
    """Per word."""
    kernel: Literal["auto", "chunked", "liger", "plain"] = "auto"
    """How `ce`, `kl` and `ctc` meet the vocabulary: in chunks, by Liger-Kernel (`ce` alone, CUDA),
    or with all logits at once. `auto` is chunked wherever the head is a plain linear layer."""

    @model_validator(mode="after")
    def _one_is_on(self) -> Losses:
        if not self.weights.keys() - {"language"}:
            raise ValueError("every loss is off, but for languages; give one a weight")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each loss that is on; the order in which they are computed."""
        parts = {
            "kl": self.kl, "ctc": self.ctc, "language": self.language, "align": self.align,
        }  # fmt: skip
        ce = {"ce": self.ce} if self.ce else {}
        return ce | {name: part.weight for name, part in parts.items() if part is not None}


class Validation(Section):
    """Held-out data, scored by the run's own losses at every checkpoint that is due."""

    shards: tuple[str, ...]
    targets: tuple[str, ...]
    words: tuple[str, ...] = ()
    """Only where `losses.align` is on."""
    states: tuple[str, ...] = ()
    """Where `data.states` are."""
    patience: int | None = Field(None, ge=1)
    """End the run after so many validations without a new best."""
    keep_best: int = Field(1, ge=0)
    """Checkpoints that stay on disk for their loss, beside the newest `train.keep`."""


class Config(Section):
    run: Run
    model: Model
    prompt: str
    """Template with `{instruction}` and `{input}`; the answer follows it."""
    data: Data
    behave: Behave | None = None
    losses: Losses = Losses()
    train: Train
    validation: Validation | None = None
    evaluate: Evaluate | None = None

    def resolved(self) -> dict[str, Any]:
        """Plain JSON-able dict of every setting, defaults included."""
        return self.model_dump(mode="json")

    def shown(self) -> dict[str, Any]:
        """`resolved` without secrets, for whatever others may read."""
        tree: dict[str, Any] = redacted_tree(self.resolved())
        return tree

    def flat(self) -> dict[str, str]:
        """`section.key` → text, as logged to the tracker.

        A mapping with keys of the user's own, such as `behave.tasks`, is one value.
        """

        def walk(name: str, node: Any, shown: Any) -> Iterator[tuple[str, str]]:
            keys = types(type(node))
            for key in keys:
                yield from walk(f"{name}.{key}" if name else key, getattr(node, key), shown[key])
            if not keys:
                yield name, shown if isinstance(shown, str) else json.dumps(shown)

        return dict(walk("", self, self.resolved()))


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read `path`, apply `a.b=value` overrides (values are YAML), and check all of it.

    Of a file with `stages` the last one, which ends in what is evaluated and exported.

    Raises:
        ConfigError: one line per fault; an unknown key names its nearest known neighbour.
    """
    return load_stages(path, overrides)[-1]


def load_stages(path: str | Path, overrides: list[str] | None = None) -> list[Config]:
    """Like `load`, all stages in their order; a file without `stages` is one.

    `stages: [{name: NAME, ...}, ...]` has what each stage changes in the rest of the file. A stage
    runs as NAME below `run.output`, and begins with the weights of the one before it, unless its
    own `train.init` says otherwise. Overrides go to every stage, or by `stages.NAME.a.b` to one.
    """
    tree, origin, given = _read(Path(path)), str(path), overrides or []
    everywhere = [text for text in given if not text.startswith("stages.")]
    if "stages" not in tree:
        for override in given:
            _set(tree, override)
        return [parse(tree, origin)]
    stages = _by_name(tree.pop("stages"), origin)
    for override in (text.removeprefix("stages.") for text in given if text not in everywhere):
        if (name := override.partition(".")[0]) not in stages:
            known = ", ".join(stages)
            raise ConfigError(f"--set stages.{override}: no stage {name!r}; there are {known}")
        _set(stages, override)
    found: list[Config] = []
    for name, changes in stages.items():
        staged = _merged(tree, changes)
        for override in everywhere:
            _set(staged, override)
        train = staged.setdefault("train", {})
        if found and isinstance(train, dict) and not _own_init(changes):
            train["init"] = str(found[-1].run.output)
        config = parse(staged, f"{origin}: stage {name}")
        run = {"name": f"{config.run.name}-{name}", "output": config.run.output / name}
        found.append(config.model_copy(update={"run": config.run.model_copy(update=run)}))
    return found


def _by_name(stages: Any, origin: str) -> dict[str, dict[str, Any]]:
    """Name → changes of each stage, in the file's order."""
    if not isinstance(stages, list) or not stages:
        raise ConfigError(f"{origin}: stages must be a list of changes, found {stages!r}")
    found: dict[str, dict[str, Any]] = {}
    for entry in stages:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name) or name in found:
            raise ConfigError(
                f"{origin}: a stage must be a mapping with a `name` of its own, of letters, "
                f"digits, - and _; found {entry!r}"
            )
        found[name] = {key: value for key, value in entry.items() if key != "name"}
    return found


def _own_init(changes: dict[str, Any]) -> Any:
    train = changes.get("train")
    return train.get("init") if isinstance(train, dict) else None


def _merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A new tree; mappings in both are merged, anything else in `changes` takes the place."""
    made = copy.deepcopy(tree)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(made.get(name), dict)
        made[name] = _merged(made[name], value) if both else copy.deepcopy(value)
    return made


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = parse_yaml(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except ValueError as e:
        raise ConfigError(f"config file {path} is {e}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path} must be a mapping of sections, found {brief(tree)}")
    return tree


def changed(tree: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The same settings with `a.b=value` overrides (values are YAML); changes `tree`."""
    for override in overrides:
        _set(tree, override)
    return tree


def parse(tree: dict[str, Any], origin: str) -> Config:
    """Check a resolved dict (from YAML, or from a checkpoint's state file)."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as e:
        raise ConfigError("\n".join(_explain(fault, origin) for fault in e.errors())) from None
    if config.prompt.count("{instruction}") != 1 or config.prompt.count("{input}") != 1:
        raise ConfigError(
            f"{origin}: prompt must hold {{instruction}} and {{input}} once each, "
            f"found {brief(config.prompt)}"
        )
    # The plan bounds the rows of what is heard, not of what these look up beside it.
    more = config.losses.kl or config.losses.ctc or config.losses.align
    if more and config.model.decoder.table == "exchange":
        raise ConfigError(
            f"{origin}: losses.kl, .ctc and .align need the text embeddings whole; set "
            "model.decoder.table: whole"
        )
    if config.losses.language and not getattr(config.model.adapter, "languages", ()):
        raise ConfigError(
            f"{origin}: losses.language needs an adapter that tells languages apart; name them in "
            "model.adapter.languages (kind ebranchformer), or remove it"
        )
    if (config.losses.kl or config.losses.ctc) and config.model.decoder.train == "full":
        raise ConfigError(
            f"{origin}: losses.kl and .ctc hold speech against a frozen LLM, but "
            "model.decoder.train: full trains it; remove one"
        )
    encoder, held_out = config.model.encoder, config.validation
    for name, section in (("data", config.data), ("validation", held_out)):
        if config.losses.align and section is not None and not section.words:
            raise ConfigError(
                f"{origin}: losses.align needs word times, but {name}.words is empty; make word "
                "shards by data.align and name them, or remove the loss"
            )
    if config.data.states and (encoder.lora is not None or encoder.layers != "last"):
        raise ConfigError(
            f"{origin}: data.states are a frozen encoder's last layer, but model.encoder has lora "
            "or weighted layers; remove one"
        )
    if held_out is not None and bool(config.data.states) != bool(held_out.states):
        raise ConfigError(
            f"{origin}: data.states and validation.states go together: with stored states no "
            "encoder is loaded; make them of both by train/encode.py"
        )
    return config


def recorded(tree: dict[str, Any], origin: str, trusted: bool) -> Config:
    """The configuration in a checkpoint, which may be a stranger's: what it says runs no code.

    Args:
        trusted: the code that comes with its models may be run all the same.
    Raises:
        ConfigError: there is such code, or see `parse`.
    """
    config = parse(tree, origin)
    distrust(config.model.trust_remote_code and not trusted, origin)
    return config


def distrust(found: bool, origin: str) -> None:
    """Raise `ConfigError` if it was `found` that a model of others' making wants to run code."""
    if found:
        raise ConfigError(
            f"{origin} says model.trust_remote_code: its encoder or LLM comes with code of its "
            "own; add --trust-remote-code if you trust where it is from"
        )


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
    try:
        tree[last] = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"--set {name}: the value is {error}") from None


def _explain(fault: Any, origin: str) -> str:
    # The place as it is written: pydantic also names the choice that `kind` made.
    where = ".".join(str(part) for part in fault["loc"] if part not in _choices(Adapter))
    if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):  # a dataclass's
        known = _known_keys(fault["loc"][:-1])
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
        return f"{origin}: unknown key {where!r}; {hint}"
    found = "" if fault["type"] == "missing" else f", found {redacted(brief(fault['input']))}"
    return f"{origin}: {where}: {fault['msg'].lower()}{found}"


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    section: Any = Config
    for part in location:
        if part in (choices := _choices(section)):
            section = choices[part]
        elif isinstance(part, str) and part in types(section):
            section = types(section)[part]
        # else an item of a list, or the name of a choice that `_choices` took already
        below = [o for o in (section, *options(section)) if types(o)]
        if len(below) == 1:
            section = below[0]
    return list(types(section))


def options(annotation: Any) -> list[Any]:
    """What a union, or a list of them, may hold; without the tags."""
    return [leaf for arg in get_args(annotation) for leaf in (arg, *options(arg))]


def _choices(annotation: Any) -> dict[str, Any]:
    """Name -> section of a union told apart by `kind`."""
    sections = [o for o in options(annotation) if types(o).get("kind")]
    return {kind: o for o in sections for kind in get_args(types(o)["kind"])}


def types(section: Any) -> dict[str, Any]:
    """Key → type of a section; empty for what is none."""
    if isinstance(section, type) and issubclass(section, BaseModel):
        return {name: info.annotation for name, info in section.model_fields.items()}
    if dataclasses.is_dataclass(section):
        return {field.name: field.type for field in dataclasses.fields(section)}
    return {}
