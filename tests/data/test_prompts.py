"""Prompts: the same seams for reading and hearing, and labels exactly on the answer."""

import pickle

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.collate import Clip, Sample, lay_out
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


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """BPE over U+2581 pieces with bytes for what it has not seen, as Llama 2 and Mistral have."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kind = trainers.BpeTrainer(vocab_size=360, special_tokens=specials)
    inner.train_from_iterator(WORDS * 20, kind)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def wordpiece() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordPiece(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    kind = trainers.WordPieceTrainer(vocab_size=150, special_tokens=["<unk>", "</s>"])
    inner.train_from_iterator(WORDS * 20, kind)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")


KINDS = {
    "bytes": ByteTokenizer,
    "bpe": byte_level_bpe,
    "sentencepiece": sentencepiece_like,
    "sentencepiece_bpe": sentencepiece_bpe,
    "wordpiece": wordpiece,
}


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


# Prompt and answer that a tokenizer would merge across the seam, were they one text.
SEAMS = [("the bri", "dge"), ("und", "er a bridge"), ("over ", "the bridge"), ("über", "all, ja!")]


@pytest.mark.parametrize(("end", "answer"), SEAMS)
def test_labelled_positions_decode_to_the_answer(tokenizer, end: str, answer: str) -> None:
    """Through the packed layout, read and heard: what is predicted is the answer and its end."""
    prompt = Prompt(tokenizer, "the user: {instruction} {input} " + end)
    ids = prompt.encode(answer)
    clip = Clip(np.zeros(800, np.float32), 800, 5, 3)
    heard = (*prompt.with_speech("over", 3), prompt.answer(ids, finished=True))
    read = (Text(tuple(prompt.with_text("over", "the user"))), prompt.answer(ids, finished=False))
    layout = lay_out([heard, read], [Sample("a", heard, clip), Sample("b", read, clip)])
    first = layout.cu_seqlens[1] - 1
    labels = [
        layout.label_ids[layout.label_rows < first].tolist(),
        layout.label_ids[layout.label_rows >= first].tolist(),
    ]
    assert labels == [[*ids, tokenizer.eos_token_id], ids]
    if hasattr(tokenizer, "decode"):
        said = [tokenizer.decode(found, skip_special_tokens=True).strip() for found in labels]
        assert said == [answer, answer]
    # Each label is predicted by the position before it; the first one by the prompt's last.
    assert layout.source[layout.label_rows + 1].tolist() == layout.label_ids.tolist()
    at = int(layout.label_rows[0])
    assert layout.source[at] == prompt.parts("over")[1][-1]


def test_the_seams_would_merge() -> None:
    """What the test above would miss, were its seams harmless: one text gives other tokens."""
    for kind in (byte_level_bpe, sentencepiece_like, sentencepiece_bpe, wordpiece):
        prompt = Prompt(kind(), "{input}")
        assert any(
            prompt.encode(end + answer) != prompt.encode(end) + prompt.encode(answer)
            for end, answer in SEAMS
        )


def test_an_instruction_may_say_where_the_input_goes(tokenizer) -> None:
    for template in (TEMPLATE, "<user> {input}\n: {instruction} <assistant>"):
        prompt = Prompt(tokenizer, template)
        assert prompt.halves('is "{input}" good?') == ('<user> is "', '" good? <assistant>')
        before, after = prompt.parts("say {input} over")
        heard = prompt.with_speech("say {input} over", 4)
        assert (heard[0].ids, heard[2].ids) == (before, after)
    for template in ("{input}", "{instruction} {input} {instruction}"):
        with pytest.raises(ValueError, match="do not fit"):
            Prompt(tokenizer, template).parts("say {input} over")


def test_bos_only_where_the_tokenizer_adds_it() -> None:
    assert Prompt(ByteTokenizer(), TEMPLATE).with_text("a", "b").count(1) == 1
    assert Prompt(ByteTokenizer(), TEMPLATE).with_text("a", "b")[0] == 1
    assert Prompt(ByteTokenizer(), "{input}").parts("x") == ((1,), ())
    bpe = byte_level_bpe()
    assert bpe.decode(Prompt(bpe, TEMPLATE).with_text("a", "b")) == "<user> a : b <assistant>"


def test_other_braces_in_instructions_are_text() -> None:
    prompt = Prompt(ByteTokenizer(), TEMPLATE)
    before, after = prompt.parts("{in put} {x}")
    assert (
        bytes(i - 3 for i in (*before[1:], *after)).decode() == "<user> {in put} {x} :  <assistant>"
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
