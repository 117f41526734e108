"""A chat client that sends many requests at once to an OpenAI-compatible server, for annotating and judging.

The openai client handles retries, backoff and `Retry-After`. If the server rejects a request, or all retries fail, the
reply holds the reason. A run ends with RemoteError if the model is unknown, the key is rejected, no request succeeds,
or `patience` requests in a row fail. `explain` turns each failure into a message that says what to do; the engine for
completions servers uses it too.
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
class Completion:
    """The server's reply to one request.

    text: of the first choice.
    finish_reason: as the server reports it.
    top_logprobs: log-probabilities of the first token's alternatives, by text.
    refused: why there is no reply; the fields above are then empty.
    failed: the server failed; a request that it rejected is not counted as failed.
    """

    text: str = ""
    finish_reason: str = ""
    top_logprobs: dict[str, float] = field(default_factory=dict)
    refused: str = ""
    failed: bool = False


@dataclass(slots=True)
class Usage:
    """Requests and tokens so far, as the server counts them. prices: US dollars per million input and output tokens."""

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
class ChatClient(Generic[Key]):
    """A chat model on a server.

    base_url: the API's address, ending in /v1.
    model: the model's name on the server.
    api_key: None: the value of OPENAI_API_KEY.
    concurrency: requests at once.
    retries: retries of a failed request.
    timeout: seconds for one reply.
    patience: consecutive failed requests that end the run.
    options: further request fields, such as temperature and max_tokens.
    usage: counts requests and tokens.
    """

    base_url: str
    model: str
    api_key: str | None = None
    concurrency: int = 8
    retries: int = 6
    timeout: float = 300.0
    patience: int = 16
    options: dict[str, Any] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)

    def ask(self, conversations: Iterable[tuple[Key, Messages]]) -> Iterator[tuple[Key, Completion]]:
        """Yields (key, reply) in the order of completion. Raises RemoteError if the run cannot go on."""
        client = self._client()
        waiting = iter(conversations)
        pool = ThreadPoolExecutor(self.concurrency)
        under_way: dict[Future[Any], Key] = {}
        failures, answered, last_failure = 0, False, Completion()
        try:
            while True:
                for key, messages in islice(waiting, self.concurrency - len(under_way)):
                    under_way[pool.submit(self._one, client, messages)] = key
                if failures >= self.patience or (failures and not answered and not under_way):
                    raise RemoteError(f"{last_failure.refused}; all results so far are written, run again to resume")
                if not under_way:
                    return
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    reply = self._counted(future.result())
                    failures, answered = (failures + 1, answered) if reply.failed else (0, True)
                    last_failure = reply if reply.failed else last_failure
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
            return Completion(refused=explain(error, self.base_url, self.timeout), failed=True)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            return Completion(refused=line(error))
        except openai.APIStatusError as error:
            message = explain(error, self.base_url, self.timeout)
            if error.status_code >= 500 or error.status_code == 429:
                return Completion(refused=message, failed=True)
            raise RemoteError(f"{message}; run again to resume") from None
        except (openai.OpenAIError, ValueError) as error:  # ValueError: the body is not JSON
            return Completion(refused=f"not an answer: {line(error)}")
        if isinstance(reply, str):
            raise RemoteError(no_api(self.base_url))
        return reply

    def _counted(self, reply: Any) -> Completion:
        """The reply in our form. Adds its tokens to `usage`."""
        self.usage.requests += 1
        if isinstance(reply, Completion):
            return reply
        if (usage := getattr(reply, "usage", None)) is not None:
            self.usage.tokens_in += usage.prompt_tokens or 0
            self.usage.tokens_out += usage.completion_tokens or 0
        choices = getattr(reply, "choices", None)
        if not choices or choices[0].message is None:
            return Completion(refused="not an answer: no choices")
        first = getattr(choices[0].logprobs, "content", None) or []
        top = {t.token: t.logprob for t in first[0].top_logprobs} if first else {}
        return Completion(choices[0].message.content or "", choices[0].finish_reason or "", top)


# ------------------------------------------------------------------------------ error messages


def line(error: BaseException) -> str:
    """An exception's message in one line of at most 160 characters."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def check_address(base_url: str) -> None:
    """Raises RequestError if the base URL is not a valid http(s) address."""
    try:
        parts = urlsplit(base_url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        valid = False
    if not valid:
        raise RequestError(f"--base-url must be like http://127.0.0.1:8000/v1, got {base_url!r}")


def key(api_key: str | None = None) -> str:
    """The API key to send: `api_key`, else OPENAI_API_KEY, else a placeholder. Raises RequestError if it cannot be sent
    in an HTTP header."""
    key_text = api_key or os.environ.get("OPENAI_API_KEY") or "none"
    if not key_text.isascii() or not key_text.isprintable() or " " in key_text:
        raise RequestError("OPENAI_API_KEY has a space, a line break or a non-ASCII character: set it to the key alone")
    return key_text


def explain(error: Exception, base_url: str, timeout: float) -> str:
    """One line for an exception of the openai client: what happened and what to do.

    error: the exception.
    base_url: the address that was asked.
    timeout: seconds after which requests time out.
    """
    import openai

    if isinstance(error, openai.APITimeoutError):
        return f"{base_url} did not answer within {timeout:g} s: wait until it has loaded the model or is less busy"
    if isinstance(error, openai.APIConnectionError):
        return f"cannot reach {base_url} ({line(error.__cause__ or error)}): {_connection_advice(error, base_url)}"
    if isinstance(error, openai.APIStatusError):
        message = _server_message(error)
        advice = _status_advice(error.status_code, message.lower(), base_url)
        return f"{base_url} answers {error.status_code}: {message.rstrip('.')}" + (advice and f": {advice}")
    return f"{base_url} gave no valid answer: {line(error)}"


def no_api(base_url: str) -> str:
    """The message for a reply that is not JSON."""
    return f"{base_url} answers with a web page or other text that is not JSON: {_address_advice(base_url)}"


def _address_advice(base_url: str) -> str:
    if urlsplit(base_url).path.rstrip("/").endswith("/v1"):
        return "give the --base-url of the API"
    return f"base URLs end in /v1, try --base-url {base_url.rstrip('/')}/v1"


def _connection_advice(error: BaseException, base_url: str) -> str:
    """What to do after a connection failed."""
    causes = list(_causes(error))
    text = " ".join(map(str, causes)).lower()
    if any(isinstance(c, ssl.SSLCertVerificationError) for c in causes) or "certificate" in text:
        return "its certificate is not trusted, set SSL_CERT_FILE to the certificate authority's file"
    if any(isinstance(c, ssl.SSLError) for c in causes) or "ssl" in text:
        return f"it does not use TLS, try --base-url http{base_url.removeprefix('https')}"
    if any(isinstance(c, socket.gaierror) for c in causes) or "name or service" in text or "getaddrinfo" in text:
        return f"the host {urlsplit(base_url).hostname!r} is unknown, check --base-url"
    broken = any(isinstance(c, ConnectionResetError | BrokenPipeError) for c in causes) or "disconnected" in text
    if broken and base_url.startswith("http:"):
        return f"start the server, or, if it uses TLS, give --base-url https{base_url.removeprefix('http')}"
    return "start the server, or give another --base-url"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, its causes and contexts, and the members of exception groups."""
    visited: set[int] = set()
    queue = [error]
    while queue:
        each = queue.pop()
        if each is not None and id(each) not in visited:
            visited.add(id(each))
            yield each
            queue += [each.__cause__, each.__context__, *getattr(each, "exceptions", ())]


def _server_message(error: Any) -> str:
    """The server's own message, from any of the usual forms of error bodies."""
    body: Any = error.body
    for name in ("error", "message", "detail"):
        if isinstance(body, dict):
            body = body.get(name, body)
    text = " ".join(str(body if isinstance(body, str) and body.strip() else error).split())
    return "a web page" if "<html" in text[:2000].lower() or "<!doctype" in text.lower() else text[:200]


def _status_advice(code: int, message: str, base_url: str) -> str:
    """What to do about an HTTP status; "" if unknown."""
    if code in (401, 403):
        has_key = bool(os.environ.get("OPENAI_API_KEY"))
        return "set OPENAI_API_KEY to another key" if has_key else "set OPENAI_API_KEY to a key that the server accepts"
    if code == 404 and "chat model" in message:
        return "give a --model that completes text"
    if code == 404 and "model" in message:
        return f"give a --model that {base_url.rstrip('/')}/models lists"
    if code in (404, 405):
        return _address_advice(base_url)
    if code == 400 and "https" in message and base_url.startswith("http:"):
        return f"try --base-url https{base_url.removeprefix('http')}"
    if code == 429:
        return "try again later, or with fewer requests at once"
    return "see the server's log" if code >= 500 else ""
