"""The LLM's tokenizer: one token per word of the micro world."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from examples.micro import lexicon as lex
from examples.micro.grammar import CONTINUATIONS
from examples.micro.tasks import CHOICES, PROMPT_TEMPLATE, wordings

PAD, UNKNOWN, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"
_PUNCTUATION = Regex(r"[.,;:!?¿¡\"]")


def words() -> list[str]:
    tables = [
        lex.SUBJECTS, lex.VERBS, lex.OBJECTS, lex.PLACES, lex.TIMES, lex.ADVERBS,
        [*lex.TOPIC_VERBS.values()], [lex.UNKNOWN, lex.FILLERS],
    ]  # fmt: skip
    texts = [phrase for table in tables for row in table for phrase in row.values()]
    texts += [wording.instruction for wording in wordings()]
    texts += [choice for choices in CHOICES.values() for choice in choices]
    patterns = [pattern for kinds in CONTINUATIONS.values() for pattern in kinds.values()]
    found = {word for text in texts for word in text.split()}
    return sorted(found | {w for pattern in patterns for w in pattern.split() if w[0] != "{"})


def tokenizer() -> PreTrainedTokenizerFast:
    marks = [word for word in PROMPT_TEMPLATE.split() if word[0] == "<"]
    entries = [PAD, UNKNOWN, BOS, EOS, *marks, *words()]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(entries)}, UNKNOWN))
    # A user may well write "Say it in Spanish."
    core.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase(), normalizers.Replace(_PUNCTUATION, " ")]
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=marks,
        model_max_length=1024,
    )
