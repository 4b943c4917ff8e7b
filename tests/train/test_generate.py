"""Generation: where it ends, what it takes from a checkpoint's settings, and how it samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests import tiny
from train.model.generate import Answer, OwnNoise, Sampling, generate
from train.teachers.part import Question

EOS, LIMIT = 2, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llm(tmp_path_factory.mktemp("llm") / "llm")


@pytest.fixture
def decoder(folder: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return loaded.eval()


def answers(
    decoder: PreTrainedModel, prompts: list[list[int]], sampling: Sampling | None = None
) -> list[Answer]:
    ids = torch.tensor([i for prompt in prompts for i in prompt])
    return generate(
        decoder, decoder.get_input_embeddings()(ids), tuple(map(len, prompts)), eos=EOS,
        max_new_tokens=LIMIT, sampling=sampling,
    )  # fmt: skip


PROMPTS = [[3, 9, 10], [5, 11, 12, 13, 14, 15], [4], [8, 8, 20, 21]]


def test_a_checkpoints_own_settings_do_not_change_the_targets(decoder: PreTrainedModel) -> None:
    plain = answers(decoder, PROMPTS)
    settings = decoder.generation_config
    assert settings is not None
    settings.repetition_penalty, settings.no_repeat_ngram_size = 5.0, 1
    settings.do_sample, settings.temperature, settings.top_k = True, 9.0, 3
    settings.max_length, settings.num_beams = 5, 3
    assert answers(decoder, PROMPTS) == plain
    assert any(len(set(answer.ids)) < len(answer.ids) for answer in plain)


def test_it_ends_where_the_checkpoint_says_too(decoder: PreTrainedModel) -> None:
    plain = answers(decoder, PROMPTS)
    turn = next(a.ids[4] for a in plain if len(a.ids) > 4 and a.ids[4] not in a.ids[:4])
    assert decoder.generation_config is not None
    decoder.generation_config.eos_token_id = [EOS, turn]
    ended = answers(decoder, PROMPTS)
    for before, after in zip(plain, ended, strict=True):
        if turn in before.ids:
            assert after == Answer(before.ids[: before.ids.index(turn)], True)
        else:
            assert after == before


def test_sampling_follows_the_distribution() -> None:
    draws = 40_000
    logits = torch.tensor([0.0, 2.0, -1.0, 1.0, float("-inf")])
    uniforms = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    noise = OwnNoise(Sampling(0.7, uniforms[:, None]))
    chosen = noise(torch.empty(draws, 0), logits.expand(draws, -1)).argmax(-1)
    share = torch.bincount(chosen, minlength=5) / draws
    # Evenly spread numbers miss a probability by one of them at most.
    torch.testing.assert_close(share, (logits / 0.7).softmax(-1), atol=2 / draws, rtol=0)


def test_a_targets_numbers_are_uniform_and_its_own() -> None:
    asked = [Question("part", n, (), "", f"1/key{n}/t/w") for n in range(400)]
    numbers = np.stack([question.uniforms(50) for question in asked])
    assert 0 <= numbers.min() < numbers.max() < 1
    # 20,000 numbers: mean within five standard errors, deciles within five of a binomial.
    assert abs(numbers.mean() - 0.5) < 5 * (1 / 12) ** 0.5 / 20_000**0.5
    tenths = np.histogram(numbers, bins=10, range=(0, 1))[0]
    assert np.abs(tenths - 2000).max() < 5 * (20_000 * 0.09) ** 0.5
    assert len(np.unique(numbers)) == numbers.size
    elsewhere = Question("other", 7, (1,), "x", "1/key3/t/w")
    assert (elsewhere.uniforms(50) == numbers[3]).all()
    assert all(0 <= question.seed() < 2**31 for question in asked)


def test_a_sampled_answer_does_not_depend_on_its_batch(decoder: PreTrainedModel) -> None:
    asked = [Question("p", n, tuple(p), "", f"a/{n}") for n, p in enumerate(PROMPTS)]
    numbers = torch.stack([torch.from_numpy(q.uniforms(LIMIT)) for q in asked])
    together = answers(decoder, PROMPTS, Sampling(1.0, numbers))
    alone = [
        answers(decoder, [prompt], Sampling(1.0, numbers[n : n + 1]))[0]
        for n, prompt in enumerate(PROMPTS)
    ]
    assert together == alone
    assert together != answers(decoder, PROMPTS)
    # Cold sampling is greedy.
    assert answers(decoder, PROMPTS, Sampling(1e-4, numbers)) == answers(decoder, PROMPTS)
