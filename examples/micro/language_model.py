"""Tiny LLMs that follow the micro world's instructions, trained from text alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from examples.micro import grammar, lexicon, tasks, vocabulary
from examples.micro.optimizer import OneCycle
from examples.micro.progress import Report
from examples.micro.settings import CorpusSettings, LanguageModelSettings


@dataclass(frozen=True)
class Document:
    ids: tuple[int, ...]
    prompt_length: int
    task: str


class Documents:
    """Instructions with their answers, as token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rng: random.Random, *, heldout: bool):
        self._meanings = grammar.meanings(rng, heldout=heldout)
        self._rng, self._tokenizer = rng, tokenizer
        before, after = tasks.PROMPT_TEMPLATE.split("{input}")
        self._before, self._suffix = before, self._encode(after)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def draw(self, *, disturbed: float, task: str | None = None) -> Document:
        rng = self._rng
        meaning, language = next(self._meanings), rng.choice(lexicon.LANGUAGES)
        known = tasks.tasks(language)
        # Long answers are the hard ones, so they come more often.
        task = task if task in known else rng.choice([*known, "continue", "repeat"])
        instruction = rng.choice([text for texts in tasks.WORDINGS[task] for text in texts])
        source = grammar.sentence(meaning, language)
        if rng.random() < disturbed:
            source = disturb(source, language, rng)
        prompt = [
            self._tokenizer.bos_token_id,
            *self._encode(self._before.format(instruction=instruction)),
            *self._encode(source),
            *self._suffix,
        ]
        answer = self._encode(tasks.answer(task, meaning, language))
        ids = (*prompt, *answer, self._tokenizer.eos_token_id)
        return Document(ids, len(prompt), task)


def disturb(text: str, language: str, rng: random.Random) -> str:
    """Careless speech: words said twice, fillers, swallowed little words.

    Speech slots do not stand one to a word, and a model that has only ever read clean sentences
    answers nonsense to anything else.
    """
    again, filled, swallowed = 0.4 * rng.random(), 0.15 * rng.random(), 0.3 * rng.random()
    said = []
    for word in text.split():
        if word in _LITTLE_WORDS and rng.random() < swallowed:
            continue
        said.append(word)
        while rng.random() < again:
            said.append(word)
        if rng.random() < filled:
            said.append(lexicon.FILLERS[language])
    return " ".join(said)


# The last word of a phrase is enough to know the phrase.
_LITTLE_WORDS = {
    word
    for table in (lexicon.SUBJECTS, lexicon.OBJECTS, lexicon.PLACES, lexicon.TIMES, lexicon.ADVERBS)
    for row in table
    for phrase in row.values()
    for word in phrase.split()[:-1]
}


def batches(
    documents: Documents, settings: LanguageModelSettings, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids, labels) of documents of one length each, so that nothing is padded."""
    while True:
        by_length: dict[int, list[Document]] = {}
        for _ in range(200 * settings.tokens_per_batch // 50):
            document = documents.draw(disturbed=settings.disturbed)
            by_length.setdefault(len(document.ids), []).append(document)
        filled = []
        for length, alike in by_length.items():
            count = max(1, settings.tokens_per_batch // length)
            filled += [alike[i : i + count] for i in range(0, len(alike) - count // 2, count)]
        rng.shuffle(filled)
        yield from map(_tensors, filled)


def _tensors(documents: list[Document]) -> tuple[torch.Tensor, torch.Tensor]:
    ids_BT = torch.tensor([document.ids for document in documents])
    position_T = torch.arange(ids_BT.shape[1])
    prompt_B = torch.tensor([document.prompt_length for document in documents])
    return ids_BT, ids_BT.masked_fill(position_T < prompt_B[:, None], -100)


def build(settings: LanguageModelSettings, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    common = {
        "vocab_size": -(-len(tokenizer) // 8) * 8,
        "hidden_size": settings.width,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
        "use_cache": False,
    }
    if settings.kind == "bloom":
        bloom = BloomConfig(**common, n_layer=settings.layers, n_head=settings.heads)
        return BloomForCausalLM(bloom)
    llama = LlamaConfig(
        **common,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        intermediate_size=settings.inner,
        max_position_embeddings=1024,
    )
    # Eager: on CPU the fused attention's backward pass is many times slower at these sizes.
    return LlamaForCausalLM._from_config(llama, attn_implementation="eager")


def train(
    settings: LanguageModelSettings,
    _corpus_settings: CorpusSettings,
    _corpus: Path,
    out: Path,
    report: Report,
) -> dict:
    """Train, save to `out`, and return the share of exact answers to held-out sentences."""
    torch.manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    tokenizer = vocabulary.tokenizer()
    model = build(settings, tokenizer).train()
    optimizer = OneCycle(
        model, settings.steps, matrix_lr=settings.matrix_lr, other_lr=settings.other_lr
    )
    stream = batches(Documents(tokenizer, rng, heldout=False), settings, rng)
    for step, (ids_BT, labels_BT) in enumerate(islice(stream, settings.steps), 1):
        with torch.autocast("cpu", torch.bfloat16):
            logits_BTV = model(
                inputs_embeds=_blurred(model, ids_BT, labels_BT, settings.blur)
            ).logits
        loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), labels_BT[:, 1:].flatten())
        optimizer.step(loss)
        report(step, settings.steps, f"loss {loss.item():.3f}")
    model.config.use_cache = True
    model.eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {"exact_match_from_text": exact_match(model, tokenizer)}


def _blurred(
    model: PreTrainedModel, ids_BT: torch.Tensor, labels_BT: torch.Tensor, most: float
) -> torch.Tensor:
    """Embeddings with noise on the prompts, from none to `most` times the embeddings' own spread.

    An adapter's slots never are the embeddings of words, only near them.
    """
    embedded_BTH = model.get_input_embeddings()(ids_BT)
    strength_B11 = most * torch.rand(len(ids_BT), 1, 1) * embedded_BTH.detach().std()
    noise_BTH = torch.randn_like(embedded_BTH) * strength_B11
    return embedded_BTH + noise_BTH * (labels_BT < 0)[..., None]


@torch.no_grad()
def exact_match(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, per_task: int = 200
) -> dict[str, float]:
    """Share of held-out sentences whose greedy answer is right to the last token, by task.

    An answer is what greedy decoding gives exactly if each of its tokens is the likeliest after
    those before it, so one forward pass decides.
    """
    documents = Documents(tokenizer, random.Random(0), heldout=True)
    by_length: dict[int, list[Document]] = {}
    for task in tasks.WORDINGS:
        count = 0
        while count < per_task:
            document = documents.draw(disturbed=0.0, task=task)
            if document.task == task:
                by_length.setdefault(len(document.ids), []).append(document)
                count += 1
    right = dict.fromkeys(tasks.WORDINGS, 0)
    for alike in by_length.values():
        ids_BT, labels_BT = _tensors(alike)
        likeliest_BT = model(input_ids=ids_BT).logits.argmax(-1)
        fits_BT = (likeliest_BT[:, :-1] == labels_BT[:, 1:]) | (labels_BT[:, 1:] < 0)
        for document, fits in zip(alike, fits_BT.all(1).tolist(), strict=True):
            right[document.task] += fits
    return {task: count / per_task for task, count in right.items()}
