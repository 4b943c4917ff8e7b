"""Prompts: the same seams for reading and hearing, and labels exactly on the answer."""

import pickle

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.prompts import Prompt, Speech, Text
from tests.data.made import ByteTokenizer

TEMPLATE = "<user> {instruction} : {input} <assistant>"
WORDS = ["over the bridge", "under a bridge", "the user says", "überall, ja!", "<user> on it"]


def byte_level_bpe() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    kind = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator(WORDS * 20, kind)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Unigram pieces with U+2581 for spaces and bytes for the rest; BOS added, as Llama 2 does."""
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    kind = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>"
    )
    inner.train_from_iterator(WORDS * 20, kind)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


KINDS = {"bytes": ByteTokenizer, "bpe": byte_level_bpe, "sentencepiece": sentencepiece_like}


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


def test_reading_and_hearing_have_the_same_seams(tokenizer) -> None:
    prompt = Prompt(tokenizer, TEMPLATE)
    read = prompt.with_text("over the bridge", "the user")
    before, speech, after = prompt.with_speech("over the bridge", 7)
    assert speech == Speech(0, 7)
    assert read == [*before.ids, *prompt.encode("the user"), *after.ids]
    assert prompt.parts("over the bridge") == (before.ids, after.ids)


def test_labels_are_the_answer_and_nothing_else(tokenizer) -> None:
    prompt = Prompt(tokenizer, TEMPLATE)
    ids = prompt.encode("under a bridge")
    cut, whole = prompt.answer(ids, finished=False), prompt.answer(ids, finished=True)
    assert cut == Text(tuple(ids), labelled=True)
    assert whole == Text((*ids, tokenizer.eos_token_id), labelled=True)
    if hasattr(tokenizer, "decode"):
        assert tokenizer.decode(list(cut.ids)).strip() == "under a bridge"
    assert not any(part.labelled for part in prompt.with_speech("x", 2) if isinstance(part, Text))


def test_bos_only_where_the_tokenizer_adds_it() -> None:
    assert Prompt(ByteTokenizer(), TEMPLATE).with_text("a", "b").count(1) == 1
    assert Prompt(ByteTokenizer(), TEMPLATE).with_text("a", "b")[0] == 1
    assert Prompt(ByteTokenizer(), "{input}").parts("x") == ((1,), ())
    bpe = byte_level_bpe()
    assert bpe.decode(Prompt(bpe, TEMPLATE).with_text("a", "b")) == "<user> a : b <assistant>"


def test_braces_in_instructions_are_text() -> None:
    prompt = Prompt(ByteTokenizer(), TEMPLATE)
    before, after = prompt.parts("{input} {x}")
    assert (
        bytes(i - 3 for i in (*before[1:], *after)).decode() == "<user> {input} {x} :  <assistant>"
    )


@pytest.mark.parametrize("template", ["no input", "{input} {input}"])
def test_wrong_templates(template: str) -> None:
    with pytest.raises(ValueError, match="exactly once"):
        Prompt(ByteTokenizer(), template)


def test_finished_needs_an_eos() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.eos_token_id = None
    prompt = Prompt(tokenizer, TEMPLATE)
    assert prompt.answer([5], finished=False).ids == (5,)
    with pytest.raises(ValueError, match="no EOS"):
        prompt.answer([5], finished=True)


def test_it_pickles(tokenizer) -> None:
    prompt = Prompt(tokenizer, TEMPLATE)
    assert pickle.loads(pickle.dumps(prompt)).parts("over") == prompt.parts("over")
