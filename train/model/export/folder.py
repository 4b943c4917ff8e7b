"""Writes an exported folder.

config.json, generation_config.json     what it is made of, how it decodes
model.safetensors                        what was trained: adapter, low-rank updates
processor_config.json, tokenizer*        recordings and text → what the model takes
chat_template.jinja                      the run's prompt
hearken_*.py                             the code, for those without a checkout
encoder/, decoder/                       if merged: all else, with low-rank updates in it
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoFeatureExtractor, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

from train import config as cfg
from train.model.build import DTYPES, length_rule, load_tokenizer
from train.model.export.bundle import auto_map, write_code
from train.model.export.configuration import HearkenConfig
from train.model.export.modeling import HearkenModel, is_own, load_encoder
from train.model.export.processing import HearkenProcessor
from train.model.export.sources import fingerprint
from train.model.export.template import chat_template
from train.model.respond import load_trained

Weights = dict[str, torch.Tensor]


def describe(config: cfg.Config, weights: Weights) -> HearkenConfig:
    """config.json of an adapter and what it belongs to, without the hashes.

    Raises:
        ConfigError: the run trained no adapter.
    """
    if not config.model.adapter.train:
        raise cfg.ConfigError(
            "the run did not train its adapter (model.adapter.train: false), so there is nothing "
            "that hears; train/save_llm.py writes the LLM of such a run"
        )
    speech = config.model.model_dump(mode="json")
    for part in ("encoder", "decoder"):
        if speech[part]["lora"]:
            updated = {n.split(".lora_")[0] for n in own_weights(weights) if n.startswith(part)}
            names = {name.rpartition(".")[2] for name in updated if name != part}
            speech[part]["lora"]["targets"] = sorted(names)
    made = HearkenConfig(speech=speech, end_token_id=int(load_tokenizer(config.model).eos_token_id))
    made.architectures = [HearkenModel.__name__]
    made.dtype = DTYPES[config.train.precision]
    made.auto_map = auto_map("AutoConfig", "AutoModel")
    return made


def own_weights(weights: Weights) -> Weights:
    """A checkpoint's weights by the exported model's names; without the LLM, if it was trained."""
    found = {}
    for name, weight in weights.items():
        if name.startswith("encoder_updates."):  # an encoder outside of the module tree
            name = name.replace("encoder_updates.", "encoder.").replace("/", ".")
        if is_own(name) and not name.startswith("ctc."):  # what only a loss has trained
            found[name] = weight
    return found


def processor_of(config: cfg.Config) -> HearkenProcessor:
    """The processor of a run's model."""
    rule = length_rule(config.model)
    made = HearkenProcessor(
        AutoFeatureExtractor.from_pretrained(config.model.encoder.path),
        load_tokenizer(config.model),
        chat_template(config.prompt),
        [[conv.kernel, conv.stride, conv.padding] for conv in rule.front_end],
        [[conv.kernel, conv.stride, conv.padding] for conv in rule.adapter],
        config.model.encoder.own_length,
        config.data.max_seconds,
        sorted(config.model.encoder.languages),
    )
    setattr(made, "auto_map", auto_map("AutoProcessor"))  # noqa: B010 (it declares none)
    return made


def model_of(config: cfg.Config, weights: Weights, device: str = "cpu") -> HearkenModel:
    """The exported model of a checkpoint, without writing it.

    Raises:
        ConfigError: see `describe`; or the whole LLM was trained.
    """
    if config.model.decoder.train == "full":
        raise cfg.ConfigError(
            "the run trained the whole LLM (model.decoder.train: full); export it with --merged"
        )
    paths = (config.model.encoder.path, config.model.decoder.path)
    dtype = DTYPES[config.train.precision]
    model = HearkenModel.of(describe(config, weights), *paths, own_weights(weights), dtype)
    torch.nn.Module.to(model, device)
    return model


def write_folder(config: cfg.Config, weights: Weights, out: Path, merged: bool) -> HearkenConfig:
    """Write the folder, whole or not at all; returns its config.

    Raises:
        ConfigError: it exists, or the run cannot be exported so.
    """
    if out.exists():
        raise cfg.ConfigError(f"{out} exists; remove it, or name another folder")
    if config.model.decoder.train == "full" and not merged:
        raise cfg.ConfigError(
            "the run trained the whole LLM (model.decoder.train: full), so an adapter alone would "
            "belong to nothing; add --merged"
        )
    described = describe(config, weights)
    for part in ("encoder", "decoder"):
        path = described.speech[part]["path"]
        described.sources[part] = {"path": path, "files": fingerprint(path)}
    partial = out.with_name(f".partial-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dtype = DTYPES[config.train.precision]
    own = own_weights(weights)
    if merged:
        _write_encoder(config.model, own, partial / "encoder", dtype)
        _write_decoder(config, weights, own, partial / "decoder")
        own = {name: w for name, w in own.items() if "lora_" not in name}
        described.merged = True
        for part in ("encoder", "decoder"):
            described.speech[part] |= {"path": part, "lora": None}
        described.speech["decoder"]["train"] = "none"
    tensors = {name: w.to(dtype).contiguous() for name, w in own.items()}
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    described.save_pretrained(partial)
    processor_of(config).save_pretrained(partial)
    write_code(partial)
    partial.rename(out)
    return described


def _write_encoder(model: cfg.Model, own: Weights, out: Path, dtype: torch.dtype) -> None:
    path, trust = model.encoder.path, model.trust_remote_code
    encoder = load_encoder(path, dtype, trust)
    if encoder.config.model_type == "whisper":
        encoder = encoder.get_encoder()
        encoder.config.architectures = ["WhisperEncoder"]
    if model.encoder.lora is not None:
        merge(encoder, own, "encoder.model.", model.encoder.lora)
    encoder.save_pretrained(out)
    for language in set(model.encoder.languages.values()):
        name = f"adapter.{language}.safetensors"
        shutil.copyfile(str(cached_file(path, name)), out / name)


def _write_decoder(config: cfg.Config, weights: Weights, own: Weights, out: Path) -> None:
    settings = config.model.decoder
    decoder = AutoModelForCausalLM.from_pretrained(
        settings.path,
        dtype=DTYPES[config.train.precision],
        trust_remote_code=config.model.trust_remote_code,
    )
    if settings.train == "full":
        prefix = "decoder."
        named = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        load_trained(decoder, named)
    if settings.lora is not None:
        merge(decoder, own, "decoder.", settings.lora)
    decoder.save_pretrained(out)


@torch.no_grad()
def merge(model: PreTrainedModel, own: Weights, prefix: str, lora: cfg.LoRA) -> None:
    """Add the low-rank updates that stand under `prefix` to the layers of `model`."""
    for name, down in own.items():
        if not (name.startswith(prefix) and ".lora_A." in name):
            continue
        up = own[name.replace(".lora_A.", ".lora_B.")]
        layer = model.get_submodule(name.removeprefix(prefix).split(".lora_A.")[0])
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        update = up.double() @ down.double() * (lora.alpha / lora.rank)
        weight.copy_(weight.double() + update.to(weight.device))
