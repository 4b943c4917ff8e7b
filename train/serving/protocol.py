"""OpenAI's chat completions, as far as this model can: requests in, answers out.

What it cannot do is refused rather than passed over. Beyond OpenAI's own, `input_audio` takes
`flac`, and `language`, which models with adapters of languages need.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from data.audio import SAMPLE_RATE, AudioError, decode
from train.serving.faults import Fault
from train.serving.limits import Limits


class Given(BaseModel):
    """Unknown keys are faults; a null is as good as nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        return {name: value for name, value in tree.items() if value is not None}


class Audio(Given):
    data: str
    """Base64 of a whole file."""
    format: Literal["wav", "flac", "mp3"]
    language: str = ""


class TextPart(Given):
    type: Literal["text"]
    text: str

    @field_validator("text")
    @classmethod
    def _whole(cls, text: str) -> str:
        text.encode()  # JSON can say half of a surrogate pair, of which no tokenizer knows
        return text


class AudioPart(Given):
    type: Literal["input_audio"]
    input_audio: Audio


class Message(Given):
    role: str
    content: list[Annotated[TextPart | AudioPart, Field(discriminator="type")]]

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class StreamOptions(Given):
    include_usage: bool = False


class TextFormat(Given):
    type: Literal["text"]


class Request(Given):
    """Without a temperature it decodes greedily, as `listen.py` does."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int = Field(64, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    seed: int | None = Field(None, ge=0)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: Literal[1] = 1
    top_p: Annotated[float, Field(ge=1, le=1)] = 1.0
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    logprobs: Literal[False] = False
    store: Literal[False] = False
    modalities: list[Literal["text"]] = ["text"]
    response_format: TextFormat = TextFormat(type="text")
    user: str = ""
    metadata: dict[str, str] = {}

    @property
    def answer_tokens(self) -> int:
        return self.max_completion_tokens or self.max_tokens


def parse(body: bytes, limits: Limits) -> Request:
    """A request out of a body.

    Raises:
        Fault: 400, naming the field.
    """
    try:
        tree = json.loads(body)
    # A plain ValueError, too: a number of more digits than Python reads.
    except (ValueError, RecursionError) as e:
        raise Fault(400, f"the body is not JSON: {e}") from None
    if not isinstance(tree, dict):
        raise Fault(400, f"the body must be a JSON object, found {type(tree).__name__}")
    try:
        request = Request.model_validate(tree)
    except ValidationError as e:
        first = e.errors()[0]
        where = _place(first["loc"])
        said = "unknown, or not supported" if first["type"] == "extra_forbidden" else first["msg"]
        raise Fault(400, f"{where}: {said}", param=where) from None
    if request.answer_tokens > limits.tokens:
        raise Fault(
            400,
            f"max_completion_tokens must be at most {limits.tokens}, found {request.answer_tokens}",
            param="max_completion_tokens",
        )
    return request


def conversation(
    request: Request, limits: Limits, clip_seconds: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages as the processor takes them, with their recordings decoded; and their languages.

    Args:
        clip_seconds: that the model can hear of one recording.
    Raises:
        Fault: 400 on a recording that cannot be heard, or on too many of them.
    """
    seconds = 0.0
    languages: list[str] = []
    made: list[dict[str, Any]] = []
    for at, message in enumerate(request.messages):
        parts: list[dict[str, Any]] = []
        for n, part in enumerate(message.content):
            if isinstance(part, TextPart):
                parts.append({"type": "text", "text": part.text})
                continue
            where = f"messages.{at}.content.{n}.input_audio"
            if len(languages) == limits.clips:
                raise Fault(400, f"at most {limits.clips} recordings in a request", param=where)
            left = limits.audio_seconds - seconds
            wave = _heard(part.input_audio, min(clip_seconds, left), where)
            seconds += len(wave) / SAMPLE_RATE
            languages.append(part.input_audio.language)
            parts.append({"type": "audio", "audio": wave})
        made.append({"role": message.role, "content": parts})
    return made, languages


def _place(location: tuple[int | str, ...]) -> str:
    """A field as it is written: pydantic also names the kind of a part, behind its number."""
    named = [
        str(part)
        for at, part in enumerate(location)
        if not (at > 1 and location[at - 2] == "content")
    ]
    return ".".join(named)


def _heard(audio: Audio, max_seconds: float, where: str) -> np.ndarray:
    try:
        file = base64.b64decode(audio.data, validate=True)
    except (binascii.Error, ValueError) as e:
        raise Fault(400, f"{where}.data is not base64: {e}", param=f"{where}.data") from None
    try:
        return decode(file, max_seconds=max_seconds)
    except AudioError as e:
        raise Fault(400, f"{where}: {e}", param=where) from None


def completion(
    name: str, id: str, text: str, reason: str, prompt: int, heard: int, said: int
) -> dict[str, Any]:
    """A whole answer."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None,
        "finish_reason": reason,
    }
    head = {"id": id, "object": "chat.completion", "created": int(time.time()), "model": name}
    return head | {"choices": [choice], "usage": usage(prompt, heard, said)}


def chunk(
    name: str, id: str, created: int, delta: dict[str, str], reason: str | None = None
) -> dict[str, Any]:
    """A piece of an answer."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    head = {"id": id, "object": "chat.completion.chunk", "created": created, "model": name}
    return head | {"choices": [choice]}


def usage(prompt: int, heard: int, said: int) -> dict[str, Any]:
    """LLM positions of the prompt, those of slots among them, and tokens of the answer."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": said,
        "total_tokens": prompt + said,
        "prompt_tokens_details": {"audio_tokens": heard, "cached_tokens": 0},
    }
