"""The exported folder: the model that was trained, by its numbers and by what it says."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jinja2 import TemplateError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, TextIteratorStreamer

from data.prompts import Prompt
from tests import tiny
from tests.train.stored import TURN, stored, tree_of
from tests.train.test_adapters import SMALL
from train import checkpoint as ckpt
from train import config as cfg
from train.export import export
from train.model.attention import set_packed
from train.model.export import HearkenModel, HearkenProcessor
from train.model.export.folder import model_of, processor_of
from train.model.export.template import chat_template
from train.model.generate import generate
from train.model.respond import Question, Responder

SAMPLES = (9_000, 31_999, 14_001, 20_000)
INSTRUCTIONS = ["repeat this", "continue this", "the old dog :", "repeat"]
LORA = {"rank": 2, "alpha": 8}

# Encoder, LLM and further settings: every adapter, and all that changes what is heard.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "conv": ("wav2vec2", "bloom", {}),
    "ebranchformer": ("whisper", "llama", {"adapter": SMALL["languages"]}),
    "stack_mlp": (
        "hubert-base", "gemma2",
        {"adapter": SMALL["stack_mlp"], "encoder": {"layers": "weighted"}},
    ),
    "own_length": ("whisper", "qwen3", {"encoder": {"own_length": True}}),
    "lora": ("wav2vec2", "llama", {"encoder": {"lora": LORA}, "decoder": {"lora": LORA}}),
    "languages": ("mms", "gpt2", {"encoder": {"languages": {"en": "eng", "de": "deu"}}}),
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A checkpoint, both of its exports, and the model as evaluation has it."""

    root: Path
    config: cfg.Config
    found: ckpt.Checkpoint
    responder: Responder

    def load(self, merged: bool = False, **others: Any) -> tuple[HearkenProcessor, HearkenModel]:
        folder = self.root / ("merged" if merged else "adapter")
        return AutoProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder, **others)

    @property
    def languages(self) -> tuple[str, ...]:
        known = self.config.model.encoder.languages
        return tuple("en de de en".split()) if known else ("",) * len(SAMPLES)

    def inputs(self, processor: HearkenProcessor) -> dict[str, Any]:
        spoken = self.languages if self.languages[0] else ()
        return processor(audio=waves(), text=INSTRUCTIONS, languages=spoken)

    def tokens(self, **how: Any) -> list[list[int]]:
        """What evaluation and `listen.py` answer, without the end."""
        inputs_TH, lengths = self.heard()
        end = int(self.responder.tokenizer.eos_token_id)
        said = generate(
            self.responder.model.decoder, inputs_TH, lengths, eos=end, max_new_tokens=9, **how
        )
        return [list(answer.ids) for answer in said]

    def asked(self) -> list[Question]:
        slots = self.responder.listen(waves(), self.languages)
        return [Question(i, s) for i, s in zip(INSTRUCTIONS, slots, strict=True)]

    def heard(self) -> tuple[torch.Tensor, tuple[int, ...]]:
        return self.responder._inputs(self.asked())

    def last_packed(self) -> torch.Tensor:
        """Logits of each conversation's last position, by the packed model that was trained."""
        decoder = self.responder.model.decoder
        logits = decoder.get_output_embeddings()(self.responder.states(self.asked()))
        cap = getattr(decoder.config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits


def waves() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(0.2 * rng.normal(size=n)).astype(np.float32) for n in SAMPLES]


def make(root: Path, case: str) -> Made:
    encoder, llm, settings = CASES[case]
    tree = tree_of(root, encoder, llm, **settings)
    if "languages" in settings.get("encoder", {}):
        tiny.language_adapters(root / encoder, ["eng", "deu"])
    run = stored(root, tree)
    for name in ("adapter", "merged"):
        export(run, root / name, merged=name == "merged")
    found = ckpt.find(run)
    config = cfg.parse(found.state.config, "state")
    return Made(root, config, found, Responder(config, found.weights))


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.set_num_threads(1)
    return make(tmp_path_factory.mktemp("made"), request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("plain"), "ebranchformer")


def without_end(rows: Iterable[torch.Tensor]) -> list[list[int]]:
    """Token ids before the first that ends an answer (2 is `</s>`)."""
    return [list(takewhile(lambda token: token not in (2, TURN), row.tolist())) for row in rows]


@torch.no_grad()
def test_logits_are_those_of_the_trained_model(made: Made) -> None:
    inputs_TH, lengths = made.heard()
    processor, model = made.load()
    inputs = made.inputs(processor)
    here = inputs["attention_mask"].bool()
    assert here.sum(1).tolist() == list(lengths)
    embedded = model.embed(**{k: v for k, v in inputs.items() if k != "attention_mask"})
    assert torch.equal(embedded[here], inputs_TH)
    # The trained model's own decoder, to the last bit.
    decoder, mask = made.responder.model.decoder, inputs["attention_mask"]
    set_packed(decoder, None)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    wanted = decoder(inputs_embeds=embedded, attention_mask=mask, position_ids=places).logits
    logits = model(**inputs).logits
    assert torch.equal(logits, wanted)
    # Packed, as it was trained, and merged: the same sums in another order.
    packed = made.last_packed()
    torch.testing.assert_close(logits[:, -1], packed, rtol=1e-4, atol=1e-4)
    merged = made.load(merged=True)[1](**inputs).logits
    torch.testing.assert_close(merged[:, -1], packed, rtol=1e-4, atol=1e-4)


def test_it_says_what_the_trained_model_says(made: Made) -> None:
    wanted = {beams: made.tokens(num_beams=beams) for beams in (1, 3)}
    assert len({tuple(said) for said in wanted[1]}) > 1  # or it would not have listened
    for merged in (False, True):
        processor, model = made.load(merged)
        inputs = made.inputs(processor)
        for beams, said in wanted.items():
            found = model.generate(**inputs, max_new_tokens=9, num_beams=beams)
            assert without_end(found) == said


def test_an_answer_does_not_depend_on_its_batch(plain: Made) -> None:
    processor, model = plain.load()
    together = model.generate(**plain.inputs(processor), max_new_tokens=9)
    alone = [
        model.generate(**processor(audio=wave, text=text), max_new_tokens=9)[0]
        for wave, text in zip(waves(), INSTRUCTIONS, strict=True)
    ]
    assert without_end(together) == without_end(alone)


def test_tokens_are_streamed(plain: Made) -> None:
    processor, model = plain.load()
    inputs = processor(audio=waves()[0], text=INSTRUCTIONS[0])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_special_tokens=True)
    task = threading.Thread(target=model.generate, kwargs={**inputs, "streamer": streamer})
    task.start()
    pieces = [piece for piece in streamer if piece]
    task.join()
    said = processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)[0]
    assert len(pieces) > 1
    assert "".join(pieces).split() == said.split()


def test_a_conversation_is_its_prompts_and_answers_one_after_another(plain: Made) -> None:
    processor, model = plain.load()
    first, second = waves()[:2]
    talk = [
        {"role": "user", "content": [text("repeat this"), sound(first)]},
        {"role": "assistant", "content": "old dog"},
        {"role": "user", "content": [sound(second), text("the"), sound(first), text("continue")]},
    ]
    found = processor.apply_chat_template(talk, tokenize=True)
    prompt = Prompt(processor.tokenizer, tiny.PROMPT)
    slots = [int(processor.rule.slots(len(wave))) for wave in (first, second)]
    ids = [*prompt.parts("repeat this")[0], *[-1] * slots[0], *prompt.parts("repeat this")[1]]
    ids += [*prompt.encode("old dog"), processor.tokenizer.eos_token_id]
    ids += [*prompt.parts("continue")[0], *[-1] * slots[1], *prompt.encode("the")]
    ids += [*[-1] * slots[0], *prompt.parts("continue")[1]]
    assert torch.where(found["speech_mask"], -1, found["input_ids"])[0].tolist() == ids
    assert found["samples"].tolist() == [len(first), len(second), len(first)]
    assert model.generate(**found, max_new_tokens=3).shape[0] == 1


def test_text_is_read_as_evaluation_reads_it(plain: Made) -> None:
    processor, _ = plain.load()
    talk = [{"role": "user", "content": [text("repeat this"), text("the old cat")]}]
    found = processor.apply_chat_template(talk, tokenize=True)
    wanted = plain.responder.prompt.with_text("repeat this", "the old cat")
    assert found["input_ids"][0].tolist() == wanted
    alone = processor(text="repeat this")["input_ids"][0].tolist()
    assert alone == plain.responder.prompt.with_text("repeat this", "")


@pytest.mark.parametrize(
    ("prompt", "instruction"),
    [
        ("<user> {instruction} : {input} <assistant>", "repeat this"),
        ("{input}\n\"'{instruction}' \\n ü 🙂{%", "what?"),
        ("###[Human]:{instruction} {input}\n\n\n###[Assistant]:", 'Is "{input}" good or bad?'),
    ],
)
def test_the_chat_template_is_the_runs_prompt(plain: Made, prompt: str, instruction: str) -> None:
    processor = plain.load()[0]
    talk = [{"role": "user", "content": [text(instruction), {"type": "audio"}]}]
    found = processor.apply_chat_template(talk, chat_template=chat_template(prompt))
    before, after = Prompt(processor.tokenizer, prompt).halves(instruction)
    assert found == f"{before}<|seam|><|speech|><|seam|>{after}"


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def sound(wave: np.ndarray) -> dict[str, Any]:
    return {"type": "audio", "audio": wave}


@pytest.mark.parametrize(
    ("roles", "content", "said"),
    [
        (["system"], "a", "beginning with user"),
        (["user", "user"], "a", "must alternate"),
        (["user", "assistant"], "a", "last message must be of user"),
        (["user"], "a <|speech|>", "may not hold"),
        (["user"], [text("a"), text("<|seam|>")], "may not hold"),
        (["user"], "{input} {input}", "{input} once"),
        (["user"], [text("a"), {"type": "image"}], "text or audio, found image"),
    ],
)
def test_a_conversation_that_was_not_trained_is_refused(
    plain: Made, roles: list[str], content: Any, said: str
) -> None:
    talk = [{"role": role, "content": content} for role in roles]
    with pytest.raises(TemplateError, match=said):
        plain.load()[0].apply_chat_template(talk)


@pytest.mark.parametrize(
    ("audio", "how", "said"),
    [
        (np.zeros((2, 9000), np.float32), {}, r"one channel, \[samples\].*found float32 \[2, 9000"),
        (np.zeros(9000, np.int16), {}, "found int16"),
        (np.zeros(9000), {"sampling_rate": 8000}, "16000 Hz, found 8000"),
        (np.full(9000, np.nan), {}, "NaN"),
        (np.zeros(33_000), {}, "over the 2 s"),
        (np.zeros(100), {}, "6 ms is too short"),
    ],
)
def test_a_recording_that_cannot_be_heard_is_refused(
    plain: Made, audio: np.ndarray, how: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        plain.load()[0](audio=audio, text="repeat this", **how)


def test_an_adapter_refuses_another_model(plain: Made, tmp_path: Path) -> None:
    other = tiny.llm(tmp_path / "other", "llama", seed=9)
    with pytest.raises(cfg.ConfigError, match=r"another decoder than .*SHA-256 .*decoder=PATH"):
        plain.load(decoder=str(other))
    with pytest.raises(cfg.ConfigError, match=r"encoder is not there: no model at 'gone'"):
        plain.load(encoder="gone")
    folder = Path(plain.config.model.encoder.path)
    moved = tmp_path / "moved"
    moved.symlink_to(folder)
    assert plain.load(encoder=str(moved))[1].config.sources["encoder"]["path"] == str(folder)


def test_weights_of_another_shape_are_refused(plain: Made) -> None:
    path = plain.root / "adapter" / "model.safetensors"
    kept = path.read_bytes()
    weights = load_file(path)
    weights["embeddings.bias"] = weights["embeddings.bias"][:3].clone()
    save_file(weights, path)
    try:
        with pytest.raises(cfg.ConfigError, match=r"differ in 1 tensors: embeddings.bias is \[3\]"):
            plain.load()
    finally:
        path.write_bytes(kept)


def test_a_checkpoint_without_a_folder_is_the_same_model(plain: Made) -> None:
    inputs = plain.inputs(processor_of(plain.config))
    direct = model_of(plain.config, plain.found.weights)
    with pytest.raises(RuntimeError, match=r"train/export\.py"):
        direct.save_pretrained("folder")
    assert torch.equal(direct(**inputs).logits, plain.load()[1](**inputs).logits)


def test_a_run_that_trained_the_whole_llm(tmp_path: Path) -> None:
    tree = tree_of(tmp_path, decoder={"train": "full"})
    run = stored(tmp_path, tree)
    with pytest.raises(cfg.ConfigError, match="add --merged"):
        export(run, tmp_path / "adapter", merged=False)
    export(run, tmp_path / "merged", merged=True)
    found = ckpt.find(run)
    responder = Responder(cfg.parse(found.state.config, "state"), found.weights)
    wave = waves()[0]
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    model = AutoModel.from_pretrained(tmp_path / "merged")
    said = model.generate(**processor(audio=wave, text="repeat this"), max_new_tokens=9)
    asked = [Question("repeat this", responder.listen([wave])[0])]
    answers = responder.answer(asked, max_new_tokens=9)
    assert processor.batch_decode(said, skip_special_tokens=True) == answers
    assert model.decoder.config.vocab_size == len(tiny.SPECIAL) + len(tiny.WORDS)


def test_the_card_has_data_targets_scores_and_limits(tmp_path: Path) -> None:
    run = stored(tmp_path, tree_of(tmp_path))
    row = {"task": "repeat", "language": "all", "wording": "all", "metric": "wer", "count": 10}
    rows = [row | {"input": kind, "value": v} for kind, v in (("speech", 7.25), ("text", 0.5))]
    path = ckpt.find(run).path / "evaluation.json"
    path.write_text(json.dumps([*rows, row | {"input": "speech", "language": "en", "value": 99}]))
    export(run, tmp_path / "out", merged=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| repeat | wer | 10 | 7.25 | 0.50 |" in card
    assert "of this checkpoint" in card
    assert "99" not in card
    assert "shards/train-*.tar" in card
    assert "targets/targets-*.tar" in card
    assert "up to 2 s" in card
    with pytest.raises(cfg.ConfigError, match="exists"):
        export(run, tmp_path / "out", merged=False)
    path.rename(run / "evaluation.json")
    export(run, tmp_path / "again", merged=False)
    assert "of its run" in (tmp_path / "again" / "README.md").read_text()


@torch.no_grad()
def test_the_runs_precision_is_the_exports(tmp_path: Path) -> None:
    tree = tree_of(tmp_path)
    tree["train"]["precision"] = "bf16"
    run = stored(tmp_path, tree)
    export(run, tmp_path / "out", merged=False)
    stored_types = {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert stored_types == {torch.bfloat16}
    found = ckpt.find(run)
    responder = Responder(cfg.parse(found.state.config, "state"), found.weights)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    wave = waves()[0]
    inputs = processor(audio=wave, text="repeat this")
    heard = responder._inputs([Question("repeat this", responder.listen([wave])[0])])[0]
    parts = {name: value for name, value in inputs.items() if name != "attention_mask"}
    assert torch.equal(model.embed(**parts)[0], heard)
    exact = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert {p.dtype for p in exact.parameters()} == {torch.float32}
