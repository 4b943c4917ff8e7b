"""A tiny speech encoder of the Whisper kind: log-mel windows of fixed length, text by a decoder.

Attention alone is slow to find out which sound is which word; a CTC head on the encoder, thrown
away after training, shows it.
"""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path

import jiwer
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from examples.micro import recordings
from examples.micro.lexicon import LANGUAGES
from examples.micro.optimizer import OneCycle
from examples.micro.progress import Report
from examples.micro.recordings import Recording
from examples.micro.settings import CorpusSettings, WhisperSettings
from examples.micro.voices import SAMPLE_RATE

_SAMPLES_PER_FRAME = 320  # 20 ms: a hop of 10 ms, halved by the second convolution


def train(
    settings: WhisperSettings,
    corpus_settings: CorpusSettings,
    corpus: Path,
    out: Path,
    report: Report,
) -> dict:
    """Train, save to `out`, and return the word error rate on held-out voices and sentences."""
    torch.manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    training = recordings.load(corpus, corpus_settings, "train")
    processor = build_processor(settings, training)
    model = build(settings, processor)
    ctc_head = nn.Linear(settings.width, len(processor.tokenizer))
    optimizer = OneCycle(
        nn.ModuleList([model, ctc_head]),
        settings.steps,
        matrix_lr=settings.matrix_lr,
        other_lr=settings.other_lr,
    )
    seconds = 2.0 * settings.utterances_per_batch  # an utterance lasts about two
    stream = recordings.batches(training, seconds, rng)
    for step, batch in enumerate(islice(stream, settings.steps), 1):
        decoder_loss, ctc_loss = _losses(model, ctc_head, processor, batch)
        optimizer.step(decoder_loss + ctc_loss)
        report(step, settings.steps, f"loss {decoder_loss.item():.3f} CTC {ctc_loss.item():.3f}")
    model.eval()
    model.save_pretrained(out)
    processor.save_pretrained(out)
    heldout = recordings.load(corpus, corpus_settings, "test")
    return {"heldout_wer": word_error_rate(model, processor, heldout)}


def build_processor(settings: WhisperSettings, training: list[Recording]) -> WhisperProcessor:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((f" {recording.text}" for recording in training), trainer)
    bpe = json.loads(core.to_str())["model"]
    marks = ["<|startoftranscript|>", *(f"<|{language}|>" for language in LANGUAGES)]
    marks += ["<|translate|>", "<|transcribe|>", "<|startofprev|>", "<|nospeech|>"]
    entries = ["<|endoftext|>", *marks, "<|notimestamps|>"]
    tokenizer = WhisperTokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(merge) for merge in bpe["merges"]],
        extra_special_tokens=entries[1:],
        pad_token="<|endoftext|>",
        task="transcribe",
        predict_timestamps=False,
    )
    extractor = WhisperFeatureExtractor(
        feature_size=settings.mel_bins, sampling_rate=SAMPLE_RATE, chunk_length=settings.seconds
    )
    return WhisperProcessor(feature_extractor=extractor, tokenizer=tokenizer)


def build(
    settings: WhisperSettings, processor: WhisperProcessor
) -> WhisperForConditionalGeneration:
    ids = processor.tokenizer.convert_tokens_to_ids
    end, start = ids("<|endoftext|>"), ids("<|startoftranscript|>")
    config = WhisperConfig(
        vocab_size=len(processor.tokenizer),
        num_mel_bins=settings.mel_bins,
        d_model=settings.width,
        encoder_layers=settings.encoder_layers,
        decoder_layers=settings.decoder_layers,
        encoder_attention_heads=settings.heads,
        decoder_attention_heads=settings.heads,
        encoder_ffn_dim=settings.inner,
        decoder_ffn_dim=settings.inner,
        max_source_positions=settings.seconds * SAMPLE_RATE // _SAMPLES_PER_FRAME,
        max_target_positions=64,
        dropout=0.0,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    # Eager: on CPU the fused attention's backward pass is many times slower at these sizes.
    model = WhisperForConditionalGeneration._from_config(config, attn_implementation="eager")
    model.generation_config = GenerationConfig(
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start,
        is_multilingual=True,
        lang_to_id={f"<|{language}|>": ids(f"<|{language}|>") for language in LANGUAGES},
        task_to_id={"transcribe": ids("<|transcribe|>"), "translate": ids("<|translate|>")},
        no_timestamps_token_id=ids("<|notimestamps|>"),
        max_length=64,
    )
    return model.train()


def _features(processor: WhisperProcessor, batch: list[Recording]) -> torch.Tensor:
    return processor.feature_extractor(
        [recording.wave for recording in batch], sampling_rate=SAMPLE_RATE, return_tensors="pt"
    ).input_features


def _losses(
    model: WhisperForConditionalGeneration,
    ctc_head: nn.Linear,
    processor: WhisperProcessor,
    batch: list[Recording],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the decoder's tokens and CTC of the encoder's, both per token."""
    tokenizer = processor.tokenizer
    ids = tokenizer.convert_tokens_to_ids
    texts = [tokenizer(f" {r.text}", add_special_tokens=False).input_ids for r in batch]
    rows = [
        [
            ids("<|startoftranscript|>"), ids(f"<|{recording.language}|>"),
            ids("<|transcribe|>"), ids("<|notimestamps|>"), *text, ids("<|endoftext|>"),
        ]
        for recording, text in zip(batch, texts, strict=True)
    ]  # fmt: skip
    length = max(map(len, rows))
    row_BT = torch.tensor([row + [-100] * (length - len(row)) for row in rows])
    features = _features(processor, batch)
    with torch.autocast("cpu", torch.bfloat16):
        result = model(
            input_features=features,
            decoder_input_ids=row_BT[:, :-1].clamp(min=0),
            use_cache=False,
        )
        ctc_BTV = ctc_head(result.encoder_last_hidden_state)
    decoder_loss = F.cross_entropy(result.logits.flatten(0, 1).float(), row_BT[:, 1:].flatten())
    frames_B = torch.tensor([-(-len(r.wave) // _SAMPLES_PER_FRAME) for r in batch])
    targets = torch.tensor([token for text in texts for token in text])
    ctc_loss = F.ctc_loss(
        ctc_BTV.float().log_softmax(-1).transpose(0, 1),
        targets,
        frames_B.clamp(max=ctc_BTV.shape[1]),
        torch.tensor([len(text) for text in texts]),
        blank=ids("<|endoftext|>"),
        reduction="sum",
    )
    return decoder_loss, ctc_loss / len(targets)


@torch.no_grad()
def word_error_rate(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, heldout: list[Recording]
) -> float:
    """The language is told, as it is in training."""
    said, heard = [], []
    for language in LANGUAGES:
        spoken = [recording for recording in heldout if recording.language == language]
        for batch in recordings.cut(spoken, 64.0):
            ids_BT = model.generate(
                _features(processor, batch), language=language, task="transcribe"
            )
            said += [recording.text for recording in batch]
            heard += [t.strip() for t in processor.batch_decode(ids_BT, skip_special_tokens=True)]
    return jiwer.wer(said, heard)
