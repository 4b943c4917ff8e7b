"""Tiny random checkpoints, corpora and configs in the real formats, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForCTC,
    PreTrainedTokenizerFast,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertProcessor,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from data.build import main as build_shards

RATE = 16_000
WORDS = "the a red green old new cat dog bird house sees finds likes today there well".split()
SPECIAL = ["<unk>", "<s>", "</s>", "<user>", "<assistant>", ":", "continue", "repeat", "this"]
PROMPT = "<user> {instruction} : {input} <assistant>"


def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.save_pretrained(folder)
    return made


# What a family needs beyond the sizes, small enough that windows are shorter than a document.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {
        "head_dim": 8,
        "sliding_window": 5,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
    },
    "gemma3_text": {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "bloom": {},
    "gpt2": {},
}


def llm(folder: Path, kind: str = "llama", seed: int = 0) -> Path:
    """A decoder folder; weights are large enough that every input changes every output."""
    size = len(tokenizer(folder))
    torch.manual_seed(seed)
    if kind == "bloom":
        shape = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
    elif kind == "gpt2":  # learned absolute positions: the family that notices a wrong position id
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    else:
        shape = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        }  # fmt: skip
    config = AutoConfig.for_model(
        kind, vocab_size=size, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        initializer_range=0.2, **shape, **FAMILIES[kind],
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


# Families whose front end is convolutions over the waveform: 20 ms frames.
_WAVEFORM = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
    "conv_dim": (16,) * 3, "conv_kernel": (10, 8, 4), "conv_stride": (8, 8, 5),
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "pad_token_id": 0,
}  # fmt: skip
# The large sizes normalise each frame; the base sizes each channel over the whole clip.
_LARGE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}
_BASE = {"do_stable_layer_norm": False, "feat_extract_norm": "group"}

ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2": ("wav2vec2", _WAVEFORM | _LARGE),
    "wav2vec2-base": ("wav2vec2", _WAVEFORM | _BASE),
    "mms": ("wav2vec2", _WAVEFORM | _LARGE | {"adapter_attn_dim": 4}),
    "hubert": ("hubert", _WAVEFORM | _LARGE),
    "hubert-base": ("hubert", _WAVEFORM | _BASE),
    "wavlm": ("wavlm", _WAVEFORM | _LARGE),
    "wavlm-base": ("wavlm", _WAVEFORM | _BASE),
    "wav2vec2-bert": (
        "wav2vec2-bert",
        {
            "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 32, "feature_projection_input_dim": 160, "pad_token_id": 0,
            "conv_depthwise_kernel_size": 5,
        },
    ),
}  # fmt: skip


def encoder(folder: Path, kind: str = "wav2vec2", seed: int = 0, window: int = 2) -> Path:
    """A speech encoder folder: of `ENCODERS`, with a CTC head, or of the Whisper kind."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "whisper":
        config = WhisperConfig(
            vocab_size=64, d_model=24, encoder_layers=2, decoder_layers=1,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32,
            decoder_ffn_dim=32, num_mel_bins=16, max_source_positions=50 * window, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )  # fmt: skip
        WhisperForConditionalGeneration(config).save_pretrained(folder)
        WhisperFeatureExtractor(feature_size=16, chunk_length=window).save_pretrained(folder)
        return folder
    letters = {c: i for i, c in enumerate(["<pad>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz"])}
    (folder / "vocab.json").write_text(json.dumps(letters))
    ctc = Wav2Vec2CTCTokenizer(folder / "vocab.json", pad_token="<pad>", unk_token="<unk>")
    family, shape = ENCODERS[kind]
    if family == "wav2vec2-bert":
        Wav2Vec2BertProcessor(SeamlessM4TFeatureExtractor(), ctc).save_pretrained(folder)
    else:
        extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
        Wav2Vec2Processor(extractor, ctc).save_pretrained(folder)
    config = AutoConfig.for_model(family, vocab_size=len(letters), **shape)
    AutoModelForCTC.from_config(config).save_pretrained(folder)
    return folder


def language_adapters(folder: Path, languages: Sequence[str]) -> Path:
    """Give an encoder of the kind `mms` random adapters, stored as transformers stores them."""
    model = Wav2Vec2ForCTC.from_pretrained(folder)
    for seed, language in enumerate(languages, 1):
        torch.manual_seed(seed)
        weights = {
            name: torch.randn_like(p) / p.shape[-1] ** 0.5
            for name, p in model._get_adapters().items()
        }
        save_file(weights, folder / f"adapter.{language}.safetensors")
    return folder


def corpus(folder: Path, count: int = 40, seed: int = 0, longest: float = 1.6) -> Path:
    """A JSONL manifest of noisy tones with sentences of three to six words."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        seconds = rng.uniform(0.3, longest)
        at = np.arange(int(seconds * RATE)) / RATE
        wave = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 2000) * at) + 0.05 * rng.normal(
            size=len(at)
        )
        soundfile.write(folder / f"utt{i:04d}.wav", wave.astype(np.float32), RATE)
        text = " ".join(rng.choice(WORDS, size=rng.integers(3, 7)))
        rows.append(
            {"key": f"utt{i:04d}", "audio": f"utt{i:04d}.wav", "text": text,
             "language": "en", "speaker": f"s{i % 3}", "split": "train"}
        )  # fmt: skip
    manifest = folder / "train.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def shards(root: Path, count: int = 40, per_shard: int = 10) -> Path:
    """Build shards by the command that users have, from a corpus made on the spot."""
    manifest = corpus(root / "corpus", count)
    status = build_shards(
        ["manifest", str(manifest), str(root / "shards"), "--samples-per-shard", str(per_shard),
         "--workers", "1", "--language", "en"]
    )  # fmt: skip
    assert status == 0
    return root / "shards"


def config(root: Path, **changes: Any) -> dict[str, Any]:
    """A run over what the functions above made under `root`; `changes` as `section__key=value`."""
    tree: dict[str, Any] = {
        "run": {
            "name": "tiny", "output": str(root / "run"), "experiment": "tiny", "pictures": False,
            "tracking_uri": f"sqlite:///{root}/mlflow.db",
        },
        "model": {
            "encoder": {"path": str(root / "encoder")},
            "adapter": {"bottleneck": 8},
            "decoder": {"path": str(root / "llm")},
        },
        "prompt": PROMPT,
        "data": {
            "shards": [str(root / "shards" / "train-*.tar")],
            "targets": [str(root / "targets" / "targets-*.tar")],
            "tokens_per_bin": 96, "seconds_per_bin": 6.0, "bins_per_step": 4, "workers": 0,
            "max_seconds": 2.0, "any_teacher": True,  # one LLM's answers serve all families
        },
        "behave": {
            "templates": str(root / "prompts.yaml"), "output": str(root / "targets"),
            "max_new_tokens": 6, "batch_size": 8, "items_per_shard": 16,
        },
        "train": {
            "steps": 6, "lr": 0.01, "precision": "fp32", "checkpoint_every": 2,
            "communication_every": 5,
            "engine": "configs/ds/zero3.json",
        },
    }  # fmt: skip
    for name, value in changes.items():
        section, key = name.split("__")
        tree[section][key] = value
    return tree


def write_config(path: Path, tree: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


def prompts(path: Path) -> Path:
    rows = [
        {"name": "continue-1", "task": "continue", "language": "*", "instruction": "continue this"},
        {"name": "repeat-1", "task": "repeat", "language": "*", "instruction": "repeat this"},
    ]
    path.write_text(yaml.safe_dump(rows))
    return path
