"""Scored options, beams and states: against the same model, asked plainly."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from train import config as cfg
from train.model import attention
from train.model.generate import generate
from train.model.options import OptionScore, score_options
from train.model.respond import Question, Responder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> cfg.Config:
    root = tmp_path_factory.mktemp("responder")
    tiny.encoder(root / "encoder")
    tiny.llm(root / "llm")
    return cfg.parse(tiny.config(root, train__precision="fp32"), "test")


@pytest.fixture(scope="module")
def responder(config: cfg.Config) -> Responder:
    return Responder(config, None)


def alone(model: torch.nn.Module, prompt: list[int], option: list[int], eos: int) -> float:
    """Log probability of an option and its end, in one forward without padding or cache."""
    ids = [*prompt, *option, eos]
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return sum(float(logs[len(prompt) - 1 + n, t]) for n, t in enumerate([*option, eos]))


@pytest.mark.parametrize("kind", sorted(tiny.FAMILIES))
def test_options_of_a_batch_score_as_each_alone(tmp_path: Path, kind: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.llm(tmp_path, kind), dtype=torch.float32)
    model.eval()
    attention.prepare(model)
    torch.manual_seed(0)
    prompts = [torch.randint(3, 24, (n,)).tolist() for n in (3, 11, 6)]
    options = [[[4], [5, 6], [5, 6, 7, 8]], [[9], []], [[10, 11], [12, 3, 3]]]
    ids = torch.tensor([i for prompt in prompts for i in prompt])
    inputs_TH = model.get_input_embeddings()(ids)
    found = score_options(model, inputs_TH, [len(p) for p in prompts], options, eos=2)
    for prompt, given, scores in zip(prompts, options, found, strict=True):
        for option, score in zip(given, scores, strict=True):
            # float32 over some ten positions of logits below 20, summed in another order.
            assert score.log_probability == pytest.approx(alone(model, prompt, option, 2), abs=2e-5)
            assert score.tokens == len(option) + 1


def test_length_normalisation_can_change_the_choice() -> None:
    short, long = OptionScore(-4.0, 2), OptionScore(-6.0, 6)
    assert short.by("sum") > long.by("sum")
    assert short.by("mean") < long.by("mean")


def test_a_spoken_question_scores_as_its_slots_do_alone(responder: Responder) -> None:
    rng = np.random.default_rng(0)
    waves = [0.1 * rng.normal(size=n).astype(np.float32) for n in (9_000, 20_000)]
    slots = responder.listen(waves)
    questions = [
        Question("repeat this", slots[0]),
        Question("continue this", "the red cat"),
        Question("repeat this", slots[1]),
        Question("repeat this", ""),
    ]
    options = [("the cat", "a green dog"), ("bird",), ("house today", "well"), ("new", "old dog")]
    together = responder.score(questions, options)
    for question, given, scores in zip(questions, options, together, strict=True):
        for option, score in zip(given, scores, strict=True):
            ((single,),) = responder.score([question], [(option,)])
            assert score.log_probability == pytest.approx(single.log_probability, abs=2e-5)


def test_many_beams_find_what_a_search_of_everything_finds(responder: Responder) -> None:
    inputs_TH, lengths = responder._inputs([Question("repeat this", "the red cat")])
    decoder, eos = responder.model.decoder, int(responder.tokenizer.eos_token_id)
    size = len(responder.tokenizer)
    asked = {"eos": eos, "max_new_tokens": 2}
    (beam,) = generate(decoder, inputs_TH, lengths, num_beams=size, **asked)
    (greedy,) = generate(decoder, inputs_TH, lengths, **asked)
    # Every answer that two tokens hold, and its log probability per token: the prompt with each
    # first token behind it gives all of them.
    words = decoder.get_input_embeddings().weight[:size, None]
    prompts = torch.cat([inputs_TH.expand(size, -1, -1), words], dim=1)
    with torch.no_grad():
        logs_VPV = decoder(inputs_embeds=prompts, use_cache=False).logits.log_softmax(-1)
    first, second = logs_VPV[0, -2], logs_VPV[:, -1]
    values = {(a, b): float(first[a] + second[a, b]) / 2 for a, b in product(range(size), repeat=2)}
    totals = {(a,) if b == eos else (a, b): v for (a, b), v in values.items() if a != eos}
    totals[()] = float(first[eos])
    assert beam.ids == max(totals, key=lambda ids: totals[ids])
    assert totals[beam.ids] > totals[greedy.ids], "the case cannot tell the two apart"


def test_states_do_not_depend_on_batch_mates_and_see_input_and_instruction(
    responder: Responder,
) -> None:
    rng = np.random.default_rng(1)
    slots = responder.listen([0.1 * rng.normal(size=12_000).astype(np.float32)])[0]
    questions = [
        Question("repeat this", slots),
        Question("continue this", slots),
        Question("repeat this", "the red cat"),
    ]
    together = responder.states(questions)
    for question, state in zip(questions, together, strict=True):
        torch.testing.assert_close(responder.states([question])[0], state, atol=1e-5, rtol=1e-5)
    assert (together[0] - together[1]).norm() > 0.1
    assert (together[0] - together[2]).norm() > 0.1
    ids = responder.prompt.with_text("repeat this", "the red cat")
    attention.set_packed(responder.model.decoder, None)
    with torch.no_grad():
        plain = responder.model.decoder.get_decoder()(torch.tensor([ids]), use_cache=False)
    torch.testing.assert_close(together[2], plain.last_hidden_state[0, -1], atol=1e-5, rtol=1e-5)


def test_what_only_a_loss_trained_is_left_out(config: cfg.Config, responder: Responder) -> None:
    weights = {name: p + 1 for name, p in responder.model.trained().items()}
    extra = weights | {"ctc.blank": torch.zeros(32)}
    loaded = Responder(config, extra)
    for name, p in loaded.model.trained().items():
        assert torch.equal(p, weights[name])
    with pytest.raises(ValueError, match=r"only in the checkpoint \['other'\]"):
        Responder(config, weights | {"other": torch.zeros(1)})
