"""From configuration to model: the one place that knows the loading order."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from train import config as cfg
from train.model import attention
from train.model.adapter import ConvAdapter, conv_geometry
from train.model.encoder import SpeechEncoder, front_end
from train.model.lengths import LengthRule
from train.model.speech_llm import (
    ExchangedTable,
    Gathered,
    Partition,
    SpeechEmbeddings,
    SpeechLLM,
)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def whole(params: list[nn.Parameter]) -> AbstractContextManager[None]:
    """`Gathered` of a model that is not partitioned: nothing to do."""
    return nullcontext()


def length_rule(model: cfg.Model) -> LengthRule:
    """The clip-length arithmetic of a configuration, without loading weights."""
    return LengthRule(
        front_end(model.encoder.path, model.trust_remote_code),
        conv_geometry(model.adapter.kernel, model.adapter.strides),
    )


def load_tokenizer(model: cfg.Model) -> PreTrainedTokenizerBase:
    """The decoder's tokenizer.

    Raises:
        ConfigError: it has no end-of-sequence token, so no answer could ever end.
    """
    tokenizer = AutoTokenizer.from_pretrained(
        model.decoder.path, trust_remote_code=model.trust_remote_code
    )
    if tokenizer.eos_token_id is None:
        raise cfg.ConfigError(
            f"model.decoder.path {model.decoder.path!r}: its tokenizer has no eos_token, "
            "which every answer ends with; set one in its tokenizer_config.json"
        )
    return tokenizer


def load_decoder(
    model: cfg.Model, dtype: torch.dtype, device: torch.device | str | None = None
) -> PreTrainedModel:
    """The frozen LLM, with its packed mode."""
    decoder: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model.decoder.path, dtype=dtype, trust_remote_code=model.trust_remote_code
    )
    attention.prepare(decoder)
    decoder.requires_grad_(False)
    decoder.eval()
    if device is not None:
        torch.nn.Module.to(decoder, device)
    return decoder


def build(
    model: cfg.Model,
    precision: str,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    partitioned: AbstractContextManager[None] | None = None,
    gathered: Gathered = whole,
    partition: Partition | None = None,
    capacity: int = 0,
) -> SpeechLLM:
    """Pretrained encoder and decoder, and a new adapter that `seed` alone determines.

    Args:
        partitioned: context in which the decoder's weights are born partitioned (ZeRO-3).
            The encoder is loaded before it: Whisper's and Wav2Vec2's initialisers read their
            own weights and crash on partitioned ones.
        gathered: see `Gathered`.
        partition: see `Partition`; without it (the model is not partitioned) the text table is
            whole, whatever the configuration says.
        capacity: LLM positions of the largest batch, for a table that is exchanged.
    """
    dtype = DTYPES[precision]
    encoder = SpeechEncoder(model.encoder.path, dtype, model.trust_remote_code).to(device)
    with partitioned or nullcontext():
        decoder = load_decoder(model, dtype)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapter = ConvAdapter(
            encoder.width,
            decoder.config.hidden_size,
            kernel=model.adapter.kernel,
            strides=model.adapter.strides,
            bottleneck=model.adapter.bottleneck,
            impl=model.ops,
        )
    exchanged = None
    if partition is not None and model.decoder.table == "exchange":
        embed = cast(nn.Embedding, decoder.get_input_embeddings())
        exchanged = ExchangedTable(embed, partition, capacity)
    embeddings = SpeechEmbeddings(decoder, gathered, model.ops, exchanged)
    speech_llm = SpeechLLM(
        encoder, adapter, decoder, embeddings, sharded_encoder=model.encoder.sharded
    )
    adapter.to(dtype)
    embeddings.to(dtype)
    return speech_llm.to(device) if partitioned is None else speech_llm
