"""Metrics for Prometheus. Each server has its own registry."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pastalm.core.params import DRAFTERS
from pastalm.server.answers import ServedAnswer

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """The server's counts and times."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "pasta_requests", "HTTP requests by path and status.", ["path", "status"], registry=self._registry
        )
        self.disconnects = Counter(
            "pasta_disconnects", "Requests whose client left before the end.", registry=self._registry
        )
        self._prompt_tokens = Counter("pasta_prompt_tokens", "Tokens of prompts answered.", registry=self._registry)
        self._tokens = Counter("pasta_tokens", "Tokens decoded, tags too.", registry=self._registry)
        self._critical_path = Counter(
            "pasta_critical_path_tokens",
            "Tokens on critical paths; pasta_tokens_total over it is the parallelism.",
            registry=self._registry,
        )
        self._passes = Counter(
            "pasta_passes",
            "Forward passes that each answer took part in and needed; pasta_tokens_total over it is tokens per pass.",
            registry=self._registry,
        )
        self._drafted, self._accepted = (
            Counter(name, help, ["drafter"], registry=self._registry)
            for name, help in (
                ("pasta_drafted_tokens", "Guessed tokens that were fed ahead, by drafter."),
                ("pasta_accepted_tokens", "Guessed tokens that came true and saved a pass, by drafter."),
            )
        )
        for counter, drafter in product((self._drafted, self._accepted), DRAFTERS):
            counter.labels(drafter)
        self.first_text = Histogram(
            "pasta_first_text_seconds",
            "From a request to the first text that could be shown.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.seconds = Histogram(
            "pasta_request_seconds",
            "From a request to the end of its answers.",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def watch(self, name: str, help: str, value: Callable[[], float]) -> None:
        """Adds a gauge, whose value is read with each request for the page."""
        Gauge(name, help, registry=self._registry).set_function(value)

    def answered(self, prompt_tokens: int, answers: list[ServedAnswer]) -> None:
        """Counts the tokens of a finished request."""
        self._prompt_tokens.inc(prompt_tokens)
        self._tokens.inc(sum(a.transcript.tokens for a in answers))
        self._critical_path.inc(sum(a.transcript.critical_path for a in answers))
        self._passes.inc(sum(a.transcript.passes for a in answers))
        for transcript in (answer.transcript for answer in answers):
            for counter, tokens in ((self._drafted, transcript.drafted), (self._accepted, transcript.accepted)):
                for drafter, count in tokens.items():
                    counter.labels(drafter).inc(count)

    def text(self) -> bytes:
        """The page in Prometheus' text format."""
        return generate_latest(self._registry)
