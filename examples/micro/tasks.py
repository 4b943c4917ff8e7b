"""What one can ask about a sentence: the tasks, their answers and the wordings of the instruction.

A held-out wording is known to the LLM (it is told of all of them when it is trained on text), but
is never used to train an adapter: it measures whether the *speech* model follows instructions that
it was not aligned on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from examples.micro import lexicon as lex
from examples.micro.grammar import Meaning, continuation, sentence, summary

# Every wording ends where the sentence begins; nothing else in a prompt depends on the task.
PROMPT_TEMPLATE = "<user> {instruction} <input> {input} <assistant>"

# task -> (wordings for training, wordings held out)
WORDINGS: dict[str, tuple[list[str], list[str]]] = {
    "continue": (
        ["continue the text", "what happens next", "write the next sentence", "go on"],
        ["tell me what happens next", "continue the sentence"],
    ),
    "repeat": (
        ["repeat the sentence", "say it again", "write down what was said", "copy the text"],
        ["repeat what was said", "write the sentence again"],
    ),
    "summarise": (
        ["summarise the sentence", "make it short", "give a short version", "say the main point"],
        ["write a short version", "summarise the text"],
    ),
    "topic": (
        ["what is the topic", "name the topic", "what is it about", "classify the topic"],
        ["which topic is it", "tell me the topic"],
    ),
    "sentiment": (
        ["is it good or bad", "name the sentiment", "how does it feel", "classify the sentiment"],
        ["which sentiment is it", "tell me the sentiment"],
    ),
    "who": (
        ["who does it", "name the person", "who is in the sentence", "answer who"],
        ["which person is it", "tell me who does it"],
    ),
    "what": (
        ["what thing is it", "name the thing", "what thing is in the sentence", "answer what"],
        ["which thing is it", "tell me the thing"],
    ),
    "where": (
        ["where does it happen", "name the place", "where is it", "answer where"],
        ["which place is it", "tell me where it is"],
    ),
    "when": (
        ["when does it happen", "name the time", "when is it", "answer when"],
        ["which time is it", "tell me when it is"],
    ),
} | {
    f"translate_{code}": (
        [f"translate to {name}", f"translate the sentence into {name}", f"say it in {name}",
         f"what is it in {name}"],
        [f"give the {name} translation", f"write the sentence in {name}"],
    )
    for code, name in lex.LANGUAGE_NAMES.items()
}  # fmt: skip

CHOICES = {
    "topic": sorted(set(lex.OBJECT_TOPICS)),
    "sentiment": sorted(set(lex.VERB_SENTIMENTS)),
}


@dataclass(frozen=True)
class Wording:
    name: str
    task: str
    language: str  # of the sentences it fits; `*` is any
    instruction: str
    heldout: bool
    origin: str = "micro world"


def wordings() -> list[Wording]:
    found = []
    for task, (trained, unseen) in WORDINGS.items():
        fitting = [language for language in lex.LANGUAGES if task in tasks(language)]
        everywhere = len(fitting) == len(lex.LANGUAGES)
        for number, instruction in enumerate(trained + unseen):
            heldout = instruction in unseen
            for language in ["*"] if everywhere else fitting:
                name = f"{task}_{number}" + ("" if everywhere else f"_from_{language}")
                found.append(Wording(name, task, language, instruction, heldout))
    return found


def tasks(language: str) -> list[str]:
    """The tasks that make sense for a sentence in this language: none translates into itself."""
    return [task for task in WORDINGS if task != f"translate_{language}"]


def answer(task: str, meaning: Meaning, language: str) -> str:
    slots = meaning.slots(language)
    unknown = lex.UNKNOWN[language]
    match task:
        case "continue":
            return continuation(meaning, language)
        case "repeat":
            return sentence(meaning, language)
        case "summarise":
            return summary(meaning, language)
        case "topic":
            return meaning.topic
        case "sentiment":
            return meaning.sentiment
        case "who":
            return slots["subject"]
        case "what":
            return slots["object"]
        case "where":
            return slots["place"] or unknown
        case "when":
            return slots["time"] or unknown
    return sentence(meaning, task.removeprefix("translate_"))


def metrics(task: str) -> list[str]:
    if task == "repeat":
        return ["wer", "cer"]
    if task.startswith("translate_"):
        return ["bleu", "chrf"]
    return ["exact", "accuracy", "f1"] if task in CHOICES else ["exact"]


def evaluation_rows(key: str, meaning: Meaning, language: str, index: int) -> list[dict]:
    """For each task one row with a wording seen in training and one with a held-out wording.

    `index` (of the utterance) turns through the wordings, so that all are used equally often.
    """
    rows = []
    for task in tasks(language):
        for wording, texts in zip(("seen", "unseen"), WORDINGS[task], strict=True):
            row = {
                "key": key,
                "task": task,
                "language": language,
                "instruction": texts[index % len(texts)],
                "wording": wording,
                "answer": answer(task, meaning, language),
                "metric": metrics(task),
            }
            rows.append(row | ({"options": CHOICES[task]} if task in CHOICES else {}))
    return rows


def instruction_rows(meanings: Iterable[tuple[Meaning, str]]) -> Iterator[dict]:
    """Alpaca's form, one row for each meaning and language; tasks and their wordings in turn."""
    for index, (meaning, language) in enumerate(meanings):
        known = tasks(language)
        turn, task = index // len(known), known[index % len(known)]
        wording = WORDINGS[task][0]
        yield {
            "instruction": wording[turn % len(wording)],
            "input": sentence(meaning, language),
            "output": answer(task, meaning, language),
            "language": language,
        }


def prompt_rows() -> list[dict]:
    return [asdict(wording) for wording in wordings()]
