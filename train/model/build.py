"""From configuration to model: the one place that knows the loading order."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from train import config as cfg
from train.model import adapters, attention
from train.model.encoder import LayerSum, SpeechEncoder, StoredStates, front_end
from train.model.lengths import LengthRule
from train.model.lora import add_lora
from train.model.recompute import recompute_layers
from train.model.speech_llm import (
    ExchangedTable,
    Gathered,
    LiveTable,
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
        adapters.geometry(model.adapter),
    )


def encoder_width(model: cfg.Model) -> int:
    """Channels of the encoder's hidden states, without loading weights."""
    config = AutoConfig.from_pretrained(
        model.encoder.path, trust_remote_code=model.trust_remote_code
    )
    return int(config.hidden_size)


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
    """The LLM, with its packed mode; frozen.

    Args:
        device: where its weights go; partitioned ones (ZeRO-3) go where DeepSpeed has them.
    Raises:
        ConfigError: it is wanted in 8 bit where that cannot be.
    """
    placed: dict[str, Any] = {}
    if model.decoder.eight_bit:
        placed = eight_bit(device)
    if is_deepspeed_zero3_enabled():
        device = None
    elif not placed and device is not None and torch.device(device).type != "cpu":
        # One tensor at a time: the ranks of a host would else hold a whole LLM each in its memory.
        placed = {"device_map": {"": device}}
    decoder: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model.decoder.path, dtype=dtype, trust_remote_code=model.trust_remote_code, **placed
    )
    attention.prepare(decoder, model.decoder.attention)
    decoder.requires_grad_(False)
    decoder.eval()
    if device is not None:
        torch.nn.Module.to(decoder, device)
    return decoder


def eight_bit(device: torch.device | str | None) -> dict[str, Any]:
    """What `from_pretrained` is told so that it quantises (2208.07339), weight by weight as it
    loads them. Raises ConfigError where it cannot."""
    if is_deepspeed_zero3_enabled():
        raise cfg.ConfigError(
            "model.decoder.eight_bit: weights in 8 bit cannot be partitioned, but train.engine is "
            "ZeRO-3; take configs/ds/zero2.json, zero1.json or zero0.json"
        )
    if find_spec("bitsandbytes") is None:
        raise cfg.ConfigError(
            "model.decoder.eight_bit needs bitsandbytes; pip install -e '.[int8]'"
        )
    where = torch.device(device or "cpu")
    return {
        "quantization_config": BitsAndBytesConfig(load_in_8bit=True),
        "device_map": {"": torch.cuda.current_device() if where.type == "cuda" else where.type},
    }


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
    losses: cfg.Losses | None = None,
    stored: bool = False,
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
        losses: what training computes; the cross entropy alone where None.
        stored: batches bring the encoder's states, and it is not loaded (see `train/encode.py`).
    """
    dtype = DTYPES[precision]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder: SpeechEncoder | StoredStates
        if stored:
            encoder = StoredStates(encoder_width(model))
        else:
            encoder = SpeechEncoder.load(model.encoder, dtype, model.trust_remote_code).to(device)
    with partitioned or nullcontext():
        decoder = load_decoder(model, dtype, device)
    hidden = decoder.config.hidden_size
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapter = adapters.make(model.adapter, encoder.width, hidden, model.ops).to(dtype)
        if model.decoder.lora is not None:
            add_lora(decoder, model.decoder.lora, "model.decoder.lora")
    if model.decoder.train == "full":
        decoder.requires_grad_(True)
    if model.decoder.checkpointing:
        recompute_layers(decoder)
    layer_sum = None
    if model.encoder.layers == "weighted":
        assert isinstance(encoder, SpeechEncoder)  # the configuration stores no layers
        layer_sum = LayerSum(encoder.num_layers).to(dtype)
    embed = cast(nn.Embedding, decoder.get_input_embeddings())
    lookup: ExchangedTable | LiveTable | None = None
    if model.decoder.train == "full":
        lookup = LiveTable(embed)
    elif partition is not None and model.decoder.table == "exchange":
        lookup = ExchangedTable(embed, partition, capacity)
    embeddings = SpeechEmbeddings(decoder, gathered, model.ops, lookup)
    for part in (adapter, layer_sum, embeddings):
        if part is not None:
            part.requires_grad_(model.adapter.train)
    speech_llm = SpeechLLM(
        encoder,
        adapter,
        decoder,
        embeddings.to(dtype),
        layer_sum=layer_sum,
        sharded_encoder=model.encoder.sharded,
        losses=losses,
        seed=seed,
    )
    return speech_llm.to(device) if partitioned is None else speech_llm
