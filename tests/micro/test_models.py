"""Two steps of training each tiny model, and the folders that it leaves."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoFeatureExtractor,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
)

from examples.micro import corpus, language_model, tasks, vocabulary, wav2vec2, whisper
from examples.micro.settings import (
    CorpusSettings,
    LanguageModelSettings,
    Wav2Vec2Settings,
    WhisperSettings,
)

SMALL = CorpusSettings(train_per_language=37, test_per_language=4, seed=5)


def _quiet(_done: int, _total: int, _text: str) -> None:
    pass


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    corpus.write(SMALL, folder, processes=2, spoken=lambda _: None)
    return folder


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_language_model(kind: str, tmp_path: Path) -> None:
    settings = LanguageModelSettings(kind, width=32, layers=1, heads=2, steps=2)
    report = language_model.train(settings, SMALL, tmp_path, tmp_path / "llm", _quiet)
    assert set(report["exact_match_from_text"]) == set(tasks.WORDINGS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    assert model.config.model_type == kind
    assert list((tmp_path / "llm").glob("*.safetensors"))
    prompt = tasks.PROMPT_TEMPLATE.format(instruction="go on", input="the girl finds the bread")
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(prompt)]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
    assert out.shape[1] > ids.shape[1]


def test_the_answer_alone_is_labelled() -> None:
    tokenizer = vocabulary.tokenizer()
    documents = language_model.Documents(tokenizer, random.Random(0), heldout=False)
    settings = LanguageModelSettings("llama", tokens_per_batch=200)
    for _, (ids_BT, labels_BT) in zip(
        range(20), language_model.batches(documents, settings, random.Random(0)), strict=False
    ):
        for ids, labels in zip(ids_BT, labels_BT, strict=True):
            prompt = tokenizer.decode(ids[labels < 0])
            assert prompt.startswith("<s> <user>")
            assert prompt.endswith("<assistant>")
            assert ids[-1] == labels[-1] == tokenizer.eos_token_id


def test_exact_match_is_what_greedy_decoding_gives() -> None:
    torch.manual_seed(0)
    tokenizer = vocabulary.tokenizer()
    settings = LanguageModelSettings("llama", width=32, layers=1, heads=2)
    model = language_model.build(settings, tokenizer).eval()
    ids = tokenizer.encode("<s> <user> answer who <input> the girl <assistant>")
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    greedy = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0]
    likeliest = model(greedy[None]).logits[0].argmax(-1)
    assert torch.equal(likeliest[len(ids) - 1 : -1], greedy[len(ids) :])


def test_disturbed_sentences_keep_what_matters() -> None:
    rng = random.Random(0)
    for _ in range(200):
        said = language_model.disturb("the girl finds the bread in the garden", "en", rng).split()
        assert {"girl", "finds", "bread", "garden"} <= set(said)
        assert set(said) <= {"the", "girl", "finds", "bread", "in", "garden", "uh"}


def test_wav2vec2(root: Path, tmp_path: Path) -> None:
    settings = Wav2Vec2Settings(width=32, layers=1, heads=2, inner=32, steps=2, bands=10)
    report = wav2vec2.train(settings, SMALL, root, tmp_path / "encoder", _quiet)
    assert report["heldout_wer"] > 0
    model = AutoModelForCTC.from_pretrained(tmp_path / "encoder")
    processor = AutoProcessor.from_pretrained(tmp_path / "encoder")
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "encoder")
    assert extractor.return_attention_mask
    assert model.config.do_stable_layer_norm
    inputs = processor(np.zeros(16_000, np.float32), sampling_rate=16_000, return_tensors="pt")
    logits = model(**inputs).logits
    assert logits.shape == (1, 49, len(processor.tokenizer))
    letters = processor.tokenizer("la niña hört").input_ids
    assert processor.tokenizer.unk_token_id not in letters


def test_whisper(root: Path, tmp_path: Path) -> None:
    settings = WhisperSettings(width=32, encoder_layers=1, heads=2, inner=32, steps=2)
    report = whisper.train(settings, SMALL, root, tmp_path / "encoder", _quiet)
    assert report["heldout_wer"] > 0
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "encoder")
    processor = AutoProcessor.from_pretrained(tmp_path / "encoder")
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "encoder")
    assert extractor.nb_max_frames == 2 * model.config.max_source_positions
    features = extractor(np.zeros(16_000), sampling_rate=16_000, return_tensors="pt").input_features
    assert model.generate(features, language="de", task="transcribe").shape[0] == 1
    text = " das mädchen verkauft"
    assert processor.tokenizer.decode(processor.tokenizer(text).input_ids, True) == text


def test_filters_answer_to_their_band() -> None:
    filters = wav2vec2.filter_bank(bands=8)[:, 0]
    spectra = np.abs(np.fft.rfft(filters, axis=1))
    peaks = spectra.argmax(1).reshape(8, 4)
    assert (peaks.min(1) == peaks.max(1)).all()  # the phases of a band share its frequency
    assert (np.diff(peaks[:, 0]) > 0).all()
