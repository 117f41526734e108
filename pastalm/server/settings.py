"""How a server behaves."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from pastalm.core.params import SamplingParams
from pastalm.engines.processors.chain import named
from pastalm.errors import RequestError, complaint

_ORIGIN = re.compile("[a-z][a-z0-9+.-]*://[^/?#]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of a server.

    name: the model's name for clients.
    api_key: key that clients must send (None: no key is needed).
    parallelism: of requests that give none.
    drafts: of requests that give none, as in SamplingParams.
    logits_processors: names of those that requests may name. Each is made once at the start, without settings.
    thread_target: with more live threads than this, a new request without `parallelism` does not fork (0: no limit).
    max_queue: answers that may wait while others decode.
    max_tokens: limit of a chat request that gives none.
    max_prompt_tokens: limit for one prompt (None: the engine's).
    max_body: limit for a request body, in bytes.
    client_timeout: seconds that a client may take to send its body, or to read a chunk.
    timeout: seconds for a request, waiting included.
    cors_origins: origins of web pages on other hosts that may send requests ("*": all).
    hosts: host names besides localhost that a server on loopback without a key accepts ("*": any). Otherwise a web page
        could send requests through a host name that resolves to this machine (DNS rebinding).

    Raises RequestError for invalid values.
    """

    name: str
    api_key: str | None = None
    parallelism: float = 1.0
    drafts: str = "auto"
    logits_processors: tuple[str, ...] = ()
    thread_target: int = 32
    max_queue: int = 64
    max_tokens: int = 1024
    max_prompt_tokens: int | None = None
    max_body: int = 1 << 20
    client_timeout: float = 30.0
    timeout: float = 600.0
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        SamplingParams(drafts=self.drafts)  # says what is wrong with it
        for processor in self.logits_processors:
            named(processor, {})
        checks = (
            (self.api_key != "", "the API key is empty: give one, or leave it out"),
            (0 <= self.parallelism < math.inf, "parallelism must be 0 or more, and finite"),
            (min(self.thread_target, self.max_queue) >= 0, "thread_target and max_queue must be 0 or more"),
            (
                min(self.max_tokens, self.max_body, self.max_prompt_tokens or 1) >= 1,
                "max_tokens, max_prompt_tokens and max_body must be 1 or more",
            ),
            (min(self.client_timeout, self.timeout) > 0, "timeouts must be above 0"),
            (
                all(o == "*" or _ORIGIN.fullmatch(o) for o in self.cors_origins),
                "an origin is scheme://host or scheme://host:port, without a path, or *",
            ),
        )
        if problem := complaint(checks):
            raise RequestError(problem)
