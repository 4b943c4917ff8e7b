"""The teacher on a server: any that completes prompts as OpenAI's API does, such as vLLM's.

The prompt is sent as text and the answer comes back as text, which the run's own tokenizer turns
into ids: these need not be the ones that the server generated (special tokens have no text), and
the seams of the prompt are the server's tokenizer's. Where the targets must be the LLM's tokens
exactly, the `hf` engine is right. Answers are committed one by one, each as it comes. Sampling is
seeded per target, but only the server decides whether its batches change what it says.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

import openai

from data.remote import shown
from data.retry import ReadError
from train import config as cfg
from train.model.generate import Answer
from train.teachers.journal import Answered
from train.teachers.part import Question


class Client:
    """Asks `server` for completions, `server.concurrent` at a time.

    Waiting after 408, 409, 429, 5xx, time-outs and broken connections is the openai library's:
    exponential with jitter, or as long as `Retry-After` says, up to two minutes.

    Raises:
        ConfigError: the key's variable is not set while the server wants one, or the server
            refuses for good (another 4xx): the model's name, the key, the prompt's length.
        ReadError: it could not be reached, or refused for now, in all tries.
    """

    def __init__(
        self,
        server: cfg.Server,
        model: str,
        encode: Callable[[str], list[int]],
        *,
        max_new_tokens: int,
        temperature: float,
    ):
        self._server, self._model, self._encode = server, server.model or model, encode
        self._limit, self._temperature = max_new_tokens, temperature
        key = os.environ.get(server.key_variable)
        self._has_key = bool(key)
        self._client = openai.OpenAI(
            base_url=server.url,
            api_key=key or "none",  # servers of one's own want none, the library wants any
            max_retries=server.retries,
            timeout=server.timeout_seconds,
        )

    def answers(
        self, batches: Sequence[Sequence[Question]], rounds: int
    ) -> Iterator[list[Answered]]:
        """Each answer as it comes; `rounds` means nothing here."""
        pool = ThreadPoolExecutor(self._server.concurrent)
        try:
            asked: dict[Future[Answer], Question] = {
                pool.submit(self._ask, question): question
                for batch in batches
                for question in batch
            }
            waiting = dict(asked)
            for done in as_completed(asked):
                if done.exception() is not None:
                    # Others may have come meanwhile, which shall not be asked and paid for again.
                    for came, question in waiting.items():
                        if came.done() and came.exception() is None:
                            yield [(question, came.result())]
                yield [(waiting.pop(done), done.result())]
        except BaseException:
            # Requests that wait to be tried again find the client closed, and end.
            self._client.close()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, question: Question) -> Answer:
        try:
            reply = self._client.completions.create(
                model=self._model,
                prompt=question.text,
                max_tokens=self._limit,
                temperature=self._temperature,
                seed=question.seed() if self._temperature else None,
            )
        except openai.APIStatusError as error:
            raise self._refused(error) from None
        except openai.APIConnectionError as error:  # time-outs among them
            why = f"{type(error).__name__}: {error}"
            raise ReadError(f"{self._where()}: {why} in {self._server.retries + 1} tries") from None
        choice = reply.choices[0]
        return Answer(tuple(self._encode(choice.text)), choice.finish_reason == "stop")

    def _refused(self, error: openai.APIStatusError) -> Exception:
        said = " ".join(str(error.message).split())[:300]
        code = error.status_code
        if code in (408, 409, 429) or code >= 500:
            return ReadError(
                f"{self._where()}: HTTP {code} in {self._server.retries + 1} tries: {said}"
            )
        hint = "check behave.server"
        if code in (401, 403):
            has = "is not accepted" if self._has_key else "is not set"
            hint = f"the key in ${self._server.key_variable} {has}"
        elif code == 404:
            hint = f"check behave.server.url and that it serves the model {self._model!r}"
        return cfg.ConfigError(f"{self._where()}: HTTP {code}: {said}; {hint}")

    def _where(self) -> str:
        return shown(self._server.url)
