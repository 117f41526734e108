"""Asks an OpenAI-compatible server many questions at once, for annotating and judging.

Retries, backoff and `Retry-After` are the openai client's. A question that the server refuses, or fails on to the last
retry, gets the reason for its reply. A server that knows no such model, takes no such key, answers nothing at all or
fails `patience` times in a row ends the run with RemoteError. What is said of each failure, here and by the engine over
a server, is `explain`'s: what happened, and what to do.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from pastalm.errors import RemoteError, RequestError

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
        check_address(self.base_url)
        return OpenAI(
            base_url=self.base_url,
            api_key=key(self.api_key),
            max_retries=self.retries,
            timeout=self.timeout,
        )

    def _one(self, client: Any, messages: Messages) -> Any:
        import openai

        try:
            reply = client.chat.completions.create(model=self.model, messages=list(messages), **self.options)
        except openai.APIConnectionError as error:
            return Answer(refused=explain(error, self.base_url, self.timeout), failed=True)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            return Answer(refused=line(error))
        except openai.APIStatusError as error:
            said = explain(error, self.base_url, self.timeout)
            if error.status_code >= 500 or error.status_code == 429:
                return Answer(refused=said, failed=True)
            raise RemoteError(f"{said}; start again to go on") from None
        except (openai.OpenAIError, ValueError) as error:  # a body that is no JSON is the latter
            return Answer(refused=f"not an answer: {line(error)}")
        if isinstance(reply, str):
            raise RemoteError(no_api(self.base_url))
        return reply

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


# ------------------------------------------------------------------------------ what went wrong, and what to do


def line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def check_address(base_url: str) -> None:
    """Raises RequestError for a base URL that no request can be sent to."""
    try:
        parts = urlsplit(base_url)
        named = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        named = False
    if not named:
        raise RequestError(f"--base-url must be like http://127.0.0.1:8000/v1, got {base_url!r}")


def key(given: str | None = None) -> str:
    """The key to send: that which is given, else OPENAI_API_KEY's, else a word. Raises RequestError for one that no
    header can hold."""
    found = given or os.environ.get("OPENAI_API_KEY") or "none"
    if not found.isascii() or not found.isprintable() or " " in found:
        raise RequestError("OPENAI_API_KEY holds more than a key (a line end, a space, no ASCII): set it anew")
    return found


def explain(error: Exception, base_url: str, timeout: float) -> str:
    """What it means that the openai client raised: one line that ends in what to do."""
    import openai

    if isinstance(error, openai.APITimeoutError):
        return f"{base_url} does not answer within {timeout:g} s: wait until it has loaded, or is less busy"
    if isinstance(error, openai.APIConnectionError):
        return f"cannot reach {base_url} ({line(error.__cause__ or error)}): {_way(error, base_url)}"
    if isinstance(error, openai.APIStatusError):
        said = _said(error)
        what = _remedy(error.status_code, said.lower(), base_url)
        return f"{base_url} answers {error.status_code}: {said.rstrip('.')}" + (what and f": {what}")
    return f"{base_url} gives no answer: {line(error)}"


def no_api(base_url: str) -> str:
    """What it means that a reply was no JSON, which the client hands on as text, or stumbles over."""
    return f"{base_url} answers with a web page or another text that is no JSON: {_address(base_url)}"


def _address(base_url: str) -> str:
    if urlsplit(base_url).path.rstrip("/").endswith("/v1"):
        return "give the --base-url of the API"
    return f"base URLs end in /v1, try --base-url {base_url.rstrip('/')}/v1"


def _way(error: BaseException, base_url: str) -> str:
    """What to do about a connection that was not made."""
    causes = list(_causes(error))
    said = " ".join(map(str, causes)).lower()
    if any(isinstance(c, ssl.SSLCertVerificationError) for c in causes) or "certificate" in said:
        return "its certificate is not trusted here, name the authority's file in SSL_CERT_FILE"
    if any(isinstance(c, ssl.SSLError) for c in causes) or "ssl" in said:
        return f"it does not speak TLS, try --base-url http{base_url.removeprefix('https')}"
    if any(isinstance(c, socket.gaierror) for c in causes) or "name or service" in said or "getaddrinfo" in said:
        return f"there is no host {urlsplit(base_url).hostname!r}, check --base-url"
    broken = any(isinstance(c, ConnectionResetError | BrokenPipeError) for c in causes) or "disconnected" in said
    if broken and base_url.startswith("http:"):
        return f"start the server, or, if it speaks TLS, give --base-url https{base_url.removeprefix('http')}"
    return "start the server, or give another --base-url"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, what it came from, and what those grouped in it are."""
    seen: set[int] = set()
    todo = [error]
    while todo:
        each = todo.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            yield each
            todo += [each.__cause__, each.__context__, *getattr(each, "exceptions", ())]


def _said(error: Any) -> str:
    """The server's own words, of whatever form."""
    body: Any = error.body
    for name in ("error", "message", "detail"):
        if isinstance(body, dict):
            body = body.get(name, body)
    text = " ".join(str(body if isinstance(body, str) and body.strip() else error).split())
    return "a web page" if "<html" in text[:2000].lower() or "<!doctype" in text.lower() else text[:200]


def _remedy(code: int, said: str, base_url: str) -> str:
    if code in (401, 403):
        known = bool(os.environ.get("OPENAI_API_KEY"))
        return "give another key in OPENAI_API_KEY" if known else "set OPENAI_API_KEY to a key that it takes"
    if code == 404 and "chat model" in said:
        return "give a --model that completes text"
    if code == 404 and "model" in said:
        return f"give a --model that {base_url.rstrip('/')}/models lists"
    if code in (404, 405):
        return _address(base_url)
    if code == 400 and "https" in said and base_url.startswith("http:"):
        return f"try --base-url https{base_url.removeprefix('http')}"
    if code == 429:
        return "ask again later, or less at once"
    return "look into the server's log" if code >= 500 else ""
