"""Asks an OpenAI-compatible server many questions at once, for annotating and judging.

Retries, backoff and `Retry-After` are the openai client's. A question that the server refuses, or fails on to the last
retry, gets the reason for its reply. A server that knows no such model, takes no such key, answers nothing at all or
fails `patience` times in a row ends the run with RemoteError.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypeVar

from pastalm.errors import RemoteError

Key = TypeVar("Key")
Messages = Sequence[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Answer:
    """text: of the first choice. finish_reason: the server's. top_logprobs: of the first token, by its text.
    refused: why there is no answer; the rest is empty then. failed: that was the server's fault, not the question's."""

    text: str = ""
    finish_reason: str = ""
    top_logprobs: dict[str, float] = field(default_factory=dict)
    refused: str = ""
    failed: bool = False


@dataclass(slots=True)
class Usage:
    """What was asked and answered so far, tokens as the server counts them. prices: US dollars for a million
    tokens in and out."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    prices: tuple[float, float] = (0.0, 0.0)

    @property
    def cost(self) -> float:
        return (self.tokens_in * self.prices[0] + self.tokens_out * self.prices[1]) / 1e6

    def __str__(self) -> str:
        cost = f", {self.cost:.2f} dollars" if any(self.prices) else ""
        return f"{self.requests} requests, {self.tokens_in} tokens in, {self.tokens_out} out{cost}"


@dataclass(slots=True)
class Remote(Generic[Key]):
    """A chat model behind `base_url`. api_key: else of OPENAI_API_KEY. concurrency: questions at once; retries: of
    each; timeout: seconds for one answer; patience: questions in a row that may fail. options: further fields of the
    request (temperature, max_tokens)."""

    base_url: str
    model: str
    api_key: str | None = None
    concurrency: int = 8
    retries: int = 6
    timeout: float = 300.0
    patience: int = 16
    options: dict[str, Any] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)

    def ask(self, questions: Iterable[tuple[Key, Messages]]) -> Iterator[tuple[Key, Answer]]:
        """Replies as they come, each with its question's key. Raises RemoteError."""
        client = self._client()
        todo = iter(questions)
        pool = ThreadPoolExecutor(self.concurrency)
        under_way: dict[Future[Any], Key] = {}
        failures, answered, last = 0, False, Answer()
        try:
            while True:
                for key, messages in islice(todo, self.concurrency - len(under_way)):
                    under_way[pool.submit(self._one, client, messages)] = key
                if failures >= self.patience or (failures and not answered and not under_way):
                    raise RemoteError(f"{last.refused}; what was written is whole, start again to go on")
                if not under_way:
                    return
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    reply = self._counted(future.result())
                    failures, answered = (failures + 1, answered) if reply.failed else (0, True)
                    last = reply if reply.failed else last
                    yield under_way.pop(future), reply
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            client.close()

    def _client(self) -> Any:
        try:
            from openai import OpenAI
        except ImportError:
            raise RemoteError("asking a server needs the openai package: pip install 'pastalm[remote]'") from None
        return OpenAI(
            base_url=self.base_url,
            api_key=self.api_key or os.environ.get("OPENAI_API_KEY") or "none",
            max_retries=self.retries,
            timeout=self.timeout,
        )

    def _one(self, client: Any, messages: Messages) -> Any:
        import openai

        try:
            return client.chat.completions.create(model=self.model, messages=list(messages), **self.options)
        except openai.APIConnectionError as error:
            said = f"cannot reach {self.base_url} ({error}): start the server, or give another --base-url"
            return Answer(refused=said, failed=True)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            return Answer(refused=_line(error))
        except openai.APIStatusError as error:
            said = f"{self.base_url} answers {error.status_code}: {_line(error)}"
            if error.status_code >= 500 or error.status_code == 429:
                return Answer(refused=said, failed=True)
            raise RemoteError(f"{said}; start again to go on") from None
        except (openai.OpenAIError, ValueError) as error:  # a body that is no JSON is the latter
            return Answer(refused=f"not an answer: {_line(error)}")

    def _counted(self, reply: Any) -> Answer:
        self.usage.requests += 1
        if isinstance(reply, Answer):
            return reply
        if (used := getattr(reply, "usage", None)) is not None:
            self.usage.tokens_in += used.prompt_tokens or 0
            self.usage.tokens_out += used.completion_tokens or 0
        choices = getattr(reply, "choices", None)
        if not choices or choices[0].message is None:
            return Answer(refused="not an answer: no choices")
        first = getattr(choices[0].logprobs, "content", None) or []
        top = {t.token: t.logprob for t in first[0].top_logprobs} if first else {}
        return Answer(choices[0].message.content or "", choices[0].finish_reason or "", top)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
